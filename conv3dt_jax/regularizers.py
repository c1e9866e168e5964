"""Regularizers by their Keras 3 names: penalties on a kernel, a bias or a layer's output.

Each is a frozen object that is called with one array and returns a scalar, at least float32 wide. A layer takes the
objects, their names, their Keras config dicts, Keras's own objects, or any callable of one array that returns a scalar.

>>> import jax.numpy as jnp
>>> from conv3dt_jax import regularizers
>>> regularizers.L1L2(l1=0.1, l2=0.01)(jnp.array([1.0, -2.0, 3.0]))
Array(0.74, dtype=float32)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from conv3dt_jax import _arguments as args
from conv3dt_jax import _identifiers

Regularizer = Callable[[jax.Array], jax.Array]

__all__ = ["L1", "L1L2", "L2", "OrthogonalRegularizer", "get"]


def _factors(regularizer: Any, *names: str) -> None:
    """Factors as floats, at least 0; None is the default, as in Keras."""
    for field in dataclasses.fields(regularizer):
        if field.name in names:
            given = getattr(regularizer, field.name)
            value = field.default if given is None else given
            number = args.number(f"{type(regularizer).__name__}.{field.name}", value, minimum=0.0)
            object.__setattr__(regularizer, field.name, number)


def _wide(x: jax.Array) -> jax.Array:
    """Half precision and integers in float32: sums over a volume outgrow them."""
    return x if x.dtype.itemsize >= 4 and jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float32)


def _sum_of_absolutes(x: jax.Array) -> jax.Array:
    return jnp.abs(_wide(x)).sum()


def _sum_of_squares(x: jax.Array) -> jax.Array:
    x = _wide(x)
    return (x.real**2 + x.imag**2).sum() if jnp.iscomplexobj(x) else jnp.square(x).sum()


@dataclasses.dataclass(frozen=True)
class L1:
    """``l1 * sum |x|``.

    Example:
      >>> L1(0.5)(jnp.array([1.0, -2.0]))
      Array(1.5, dtype=float32)
    """

    l1: float = 0.01

    def __post_init__(self) -> None:
        _factors(self, "l1")

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.l1 * _sum_of_absolutes(x)


@dataclasses.dataclass(frozen=True)
class L2:
    """``l2 * sum x**2`` (without the half that some texts have).

    Example:
      >>> L2(0.5)(jnp.array([1.0, -2.0]))
      Array(2.5, dtype=float32)
    """

    l2: float = 0.01

    def __post_init__(self) -> None:
        _factors(self, "l2")

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.l2 * _sum_of_squares(x)


@dataclasses.dataclass(frozen=True)
class L1L2:
    """``l1 * sum |x| + l2 * sum x**2``.

    Both factors are 0 by default, as in Keras; the name "l1_l2" alone means 0.01 for both, as Keras documents it.

    Example:
      >>> L1L2(l1=0.5, l2=1.0)(jnp.array([1.0, -2.0]))
      Array(6.5, dtype=float32)
    """

    l1: float = 0.0
    l2: float = 0.0

    def __post_init__(self) -> None:
        _factors(self, "l1", "l2")

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.l1 * _sum_of_absolutes(x) + self.l2 * _sum_of_squares(x)


@dataclasses.dataclass(frozen=True)
class OrthogonalRegularizer:
    """``factor`` times the mean absolute cosine between the rows (or columns) of a matrix.

    Takes matrices alone, as Keras does: on the kernel of a convolution, which has five dimensions, it is a
    `ValueError`. Wrap it in a function that reshapes the kernel to say which vectors shall be orthogonal.

    Example:
      >>> OrthogonalRegularizer(factor=1.0)(jnp.array([[1.0, 0.0], [0.0, 2.0]]))
      Array(0., dtype=float32)
    """

    factor: float = 0.01
    mode: str = "rows"

    def __post_init__(self) -> None:
        _factors(self, "factor")
        if self.mode not in ("rows", "columns"):
            raise ValueError(f"{args.received('OrthogonalRegularizer.mode', self.mode)} must be 'rows' or 'columns'.")

    def __call__(self, x: jax.Array) -> jax.Array:
        if x.ndim != 2:
            raise ValueError(
                f"OrthogonalRegularizer takes matrices, as in Keras, but was given shape {x.shape}; wrap it in a "
                "function that reshapes, such as lambda w: OrthogonalRegularizer()(w.reshape(-1, w.shape[-1]).T)."
            )
        rows = _wide(x if self.mode == "rows" else x.T)
        rows = rows / jnp.maximum(jnp.sqrt(jnp.square(rows).sum(1, keepdims=True)), 1e-12)
        count = rows.shape[0]
        between = jnp.abs(rows @ rows.T) * (1.0 - jnp.eye(count, dtype=rows.dtype))
        return self.factor * 0.5 * between.sum() / (count * (count - 1.0) / 2.0)


CLASSES: dict[str, type] = {"l1": L1, "l2": L2, "l1l2": L1L2, "orthogonal_regularizer": OrthogonalRegularizer}
ALIASES = {"l1_l2": "l1l2", "orthogonal": "orthogonal_regularizer"}


def get(argument: str, identifier: Any) -> Regularizer | None:
    """The regularizer that a Keras user means by a name, a config dict, an object or a callable; None for none.

    Args:
      argument: the argument's name, for messages.
      identifier: "l2", ``{"class_name": "L2", "config": {"l2": 1e-4}}``, `L2(1e-4)`, Keras's own object, or a callable.

    Raises:
      ValueError: an unknown name, or a config that does not fit.
      TypeError: none of the above.

    Example:
      >>> get("kernel_regularizer", "l2")
      L2(l2=0.01)
    """
    if isinstance(identifier, str) and identifier == "l1_l2":
        return L1L2(l1=0.01, l2=0.01)
    return _identifiers.resolve(argument, identifier, CLASSES, ALIASES)
