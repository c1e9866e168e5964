"""Constraints by their Keras 3 names: projections of a kernel or a bias after each update of the optimizer.

Each is a frozen object that is called with one array and returns one of the same shape. A layer takes the objects,
their names, their Keras config dicts, Keras's own objects, or any callable of one array; `conv3dt_jax.constrain`
applies them.

``axis`` (an int or several) says which axes a norm sums over: for the kernel ``(kd, kh, kw, F // G, C)``,
``axis=(0, 1, 2, 4)`` gives one norm for each filter. The default, 0, is Keras's: one for each column along depth.

>>> import jax.numpy as jnp
>>> from conv3dt_jax import constraints
>>> constraints.MaxNorm(2.0)(jnp.array([0.0, 4.0]))
Array([0., 2.], dtype=float32)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from optax import projections

from conv3dt_jax import _arguments as args
from conv3dt_jax import _identifiers

Constraint = Callable[[jax.Array], jax.Array]

__all__ = ["MaxNorm", "MinMaxNorm", "NonNeg", "UnitNorm", "get"]

_EPSILON = 1e-7  # Keras's, added to every norm that is divided by


def _check(constraint: Any, *numbers: str) -> None:
    """Numbers as floats, and the axis as an int or a tuple of ints."""
    owner = type(constraint).__name__
    for name in numbers:
        number = args.number(f"{owner}.{name}", getattr(constraint, name), minimum=0.0)
        object.__setattr__(constraint, name, number)
    axis = constraint.axis
    if args.is_sequence(axis):
        axis = tuple(args.integer(f"{owner}.axis", one, minimum=-5, whole=constraint.axis) for one in axis)
    elif axis is not None:
        axis = args.integer(f"{owner}.axis", axis, minimum=-5)
    object.__setattr__(constraint, "axis", axis)


def _wide(w: jax.Array) -> jax.Array:
    """Half precision and integers in float32: neither the norm of a large kernel nor the epsilon fits them."""
    return w.astype(jnp.float32) if w.dtype.itemsize < 4 or not jnp.issubdtype(w.dtype, jnp.inexact) else w


def _as_given(result: jax.Array, w: jax.Array) -> jax.Array:
    return result.astype(w.dtype) if jnp.issubdtype(w.dtype, jnp.inexact) else result


def _norms(w: jax.Array, axis: Any) -> jax.Array:
    return jnp.sqrt(jnp.square(jnp.abs(_wide(w))).sum(axis, keepdims=True))


def _scaled(w: jax.Array, factor: jax.Array) -> jax.Array:
    return _as_given(_wide(w) * factor, w)


@dataclasses.dataclass(frozen=True)
class MaxNorm:
    """Scales down what has a norm above ``max_value``: ``w * clip(norm, 0, max_value) / (norm + 1e-7)``.

    Example:
      >>> MaxNorm(2.0)(jnp.array([[0.0, 0.0], [4.0, 2.0]]))
      Array([[0., 0.],
             [2., 2.]], dtype=float32)
    """

    max_value: float = 2.0
    axis: int | Sequence[int] | None = 0

    def __post_init__(self) -> None:
        _check(self, "max_value")

    def __call__(self, w: jax.Array) -> jax.Array:
        norms = _norms(w, self.axis)
        return _scaled(w, jnp.minimum(norms, self.max_value) / (_EPSILON + norms))


@dataclasses.dataclass(frozen=True)
class NonNeg:
    """Sets what is negative to 0 (`optax.projections.projection_non_negative`).

    Example:
      >>> NonNeg()(jnp.array([-1.0, 2.0]))
      Array([0., 2.], dtype=float32)
    """

    def __call__(self, w: jax.Array) -> jax.Array:
        return projections.projection_non_negative(w)


@dataclasses.dataclass(frozen=True)
class UnitNorm:
    """Scales every norm to 1: ``w / (norm + 1e-7)``.

    Example:
      >>> UnitNorm()(jnp.array([0.0, -4.0]))
      Array([ 0., -1.], dtype=float32)
    """

    axis: int | Sequence[int] | None = 0

    def __post_init__(self) -> None:
        _check(self)

    def __call__(self, w: jax.Array) -> jax.Array:
        return _as_given(_wide(w) / (_EPSILON + _norms(w, self.axis)), w)


@dataclasses.dataclass(frozen=True)
class MinMaxNorm:
    """Moves every norm into ``[min_value, max_value]``, all the way (``rate`` 1) or by a part of it.

    The new norm is ``rate * clip(norm, min_value, max_value) + (1 - rate) * norm``.

    Example:
      >>> MinMaxNorm(4.0, 8.0)(jnp.array([[2.0, 6.0, 16.0]]))
      Array([[4., 6., 8.]], dtype=float32)
    """

    min_value: float = 0.0
    max_value: float = 1.0
    rate: float = 1.0
    axis: int | Sequence[int] | None = 0

    def __post_init__(self) -> None:
        _check(self, "min_value", "max_value", "rate")
        if self.min_value > self.max_value:
            raise ValueError(f"`MinMaxNorm.min_value={self.min_value}` must not be above `max_value={self.max_value}`.")

    def __call__(self, w: jax.Array) -> jax.Array:
        norms = _norms(w, self.axis)
        desired = self.rate * jnp.clip(norms, self.min_value, self.max_value) + (1 - self.rate) * norms
        return _scaled(w, desired / (_EPSILON + norms))


CLASSES: dict[str, type] = {
    "max_norm": MaxNorm,
    "min_max_norm": MinMaxNorm,
    "non_neg": NonNeg,
    "unit_norm": UnitNorm,
}
ALIASES = {"maxnorm": "max_norm", "nonneg": "non_neg", "unitnorm": "unit_norm"}  # of Keras 1 and 2


def get(argument: str, identifier: Any, rank: int) -> Constraint | None:
    """The constraint that a Keras user means by a name, a config dict, an object or a callable; None for none.

    Args:
      argument: the argument's name, for messages.
      identifier: "max_norm", ``{"class_name": "MaxNorm", "config": {"max_value": 2}}``, `MaxNorm(2)`, Keras's own
        object, or a callable.
      rank: dimensions of what is constrained, to which an axis is held.

    Raises:
      ValueError: an unknown name, a config that does not fit, or an axis that the parameter does not have.
      TypeError: none of the above.

    Example:
      >>> get("kernel_constraint", "max_norm", rank=5)
      MaxNorm(max_value=2.0, axis=0)
    """
    constraint = _identifiers.resolve(argument, identifier, CLASSES, ALIASES)
    axis = getattr(constraint, "axis", None) if isinstance(constraint, tuple(CLASSES.values())) else None
    axes = () if axis is None else axis if isinstance(axis, tuple) else (axis,)
    if any(not -rank <= one < rank for one in axes):
        raise ValueError(
            f"{args.received(argument, identifier)} sums over axis {axis}, but the parameter has {rank} axes."
        )
    if len({one % rank for one in axes}) < len(axes):
        raise ValueError(f"{args.received(argument, identifier)} names an axis twice: {axis}.")
    return constraint
