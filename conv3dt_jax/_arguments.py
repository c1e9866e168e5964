"""Canonical form of single arguments: what the user wrote becomes ints, triples and lower-case names, or an error.

Every message names the argument and the value in the caller's spelling, the rule, and what would be right.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax

Triple: TypeAlias = tuple[int, int, int]
Pairs: TypeAlias = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]

DATA_FORMATS = ("channels_last", "channels_first")
PADDINGS = ("valid", "same", "circular")


def received(name: str, value: Any) -> str:
    """The argument as the caller wrote it: ``name=value``, shortened where it is long."""
    text = repr(value)
    return f"`{name}={text if len(text) <= 120 else text[:117] + '...'}`"


def integer(name: str, value: Any, *, minimum: int, whole: Any = None) -> int:
    """An integer of at least ``minimum``; numpy integers count, booleans and floats do not."""
    shown = received(name, value if whole is None else whole)
    if isinstance(value, jax.core.Tracer):
        raise TypeError(f"{shown} must be a static integer; a traced value cannot set a shape. Pass a Python int.")
    if isinstance(value, bool | np.bool_):
        raise TypeError(f"{shown} must be an integer, not a boolean; pass {int(value)} if that is meant.")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{shown} must be an integer, not {type(value).__name__}.") from None
    if number < minimum:
        raise ValueError(f"{shown} must be at least {minimum}.")
    return number


def number(name: str, value: Any, *, minimum: float = -float("inf")) -> float:
    """A finite real number of at least ``minimum``, as a float; booleans and arrays do not count."""
    if isinstance(value, bool | np.bool_ | str | bytes) or np.ndim(value) or isinstance(value, jax.core.Tracer):
        raise TypeError(f"{received(name, value)} must be a number, not {type(value).__name__}.")
    try:
        result = float(value)
    except TypeError:
        raise TypeError(f"{received(name, value)} must be a number, not {type(value).__name__}.") from None
    if not minimum <= result < float("inf") or result == -float("inf"):
        least = "" if minimum == -float("inf") else f" of at least {minimum:g}"
        raise ValueError(f"{received(name, value)} must be a finite number{least}.")
    return result


def is_sequence(value: Any) -> bool:
    if isinstance(value, np.ndarray | jax.Array):
        return value.ndim == 1
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def triple(name: str, value: Any, *, minimum: int) -> Triple:
    """An integer for all axes, or a sequence of three: depth, height, width."""
    if not is_sequence(value):
        if isinstance(value, str | bytes | set | frozenset | dict) or value is None:
            raise TypeError(f"{received(name, value)} must be an integer or 3 integers (depth, height, width).")
        return (integer(name, value, minimum=minimum),) * 3
    if len(value) != 3:
        raise ValueError(
            f"{received(name, value)} must be an integer or 3 integers (depth, height, width), not {len(value)}."
        )
    depth, height, width = (integer(name, item, minimum=minimum, whole=value) for item in value)
    return depth, height, width


def dimension(name: str, value: Any, *, whole: Any) -> Any:
    """A size of an array: an integer of at least 0, or a symbolic dimension of `jax.export`."""
    return value if export.is_symbolic_dim(value) else integer(name, value, minimum=0, whole=whole)


def shape(name: str, value: Any) -> tuple[Any, ...]:
    """The shape of an array."""
    if not is_sequence(value):
        raise TypeError(f"{received(name, value)} must be a shape: a sequence of integers.")
    return tuple(dimension(name, size, whole=value) for size in value)


def padding_value(value: Any, padded: str) -> str | Pairs:
    """ "valid", "same", "circular" (any case), or what is ``padded`` ("cropped", say): an int, 3 ints or 3 pairs."""
    rule = (
        f"{received('padding', value)} must be one of {', '.join(map(repr, PADDINGS))} (any case), "
        f"an integer, 3 integers or 3 pairs of integers (what is {padded} at the start and the end of each axis)"
    )
    if isinstance(value, str):
        if value.lower() == "causal":
            raise ValueError(f"{rule}; causal padding has no meaning in three dimensions.")
        if value.lower() not in PADDINGS:
            raise ValueError(f"{rule}.")
        return value.lower()
    if value is None:
        raise TypeError(f"{rule}; for none write padding='valid' or padding=0.")
    if not is_sequence(value) and not (isinstance(value, np.ndarray | jax.Array) and value.ndim == 2):
        if isinstance(value, set | frozenset | dict):
            raise TypeError(f"{rule}.")
        return (_pair(value, value),) * 3
    if len(value) != 3:
        raise ValueError(f"{rule}; it has {len(value)} items.")
    depth, height, width = (_pair(item, value) for item in value)
    return depth, height, width


def _pair(item: Any, whole: Any) -> tuple[int, int]:
    if not is_sequence(item):
        both = integer("padding", item, minimum=0, whole=whole)
        return both, both
    if len(item) != 2:
        raise ValueError(f"{received('padding', whole)} has an axis with {len(item)} values; give 2: (start, end).")
    start, end = (integer("padding", crop, minimum=0, whole=whole) for crop in item)
    return start, end


def choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """One of a few names, in any case."""
    allowed = " or ".join([", ".join(map(repr, choices[:-1])), repr(choices[-1])])
    if not isinstance(value, str):
        raise TypeError(f"{received(name, value)} must be {allowed}, not {type(value).__name__}.")
    if value.lower() not in choices:
        raise ValueError(f"{received(name, value)} must be {allowed}.")
    return value.lower()


def boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{received(name, value)} must be True or False, not {type(value).__name__}.")
    return bool(value)


def precision_value(value: Any) -> Any:
    """What `jax.lax.conv_general_dilated` takes: None, a name or `jax.lax.Precision`, or a pair of them."""
    if value is None:
        return None
    if is_sequence(value) and len(value) == 2:
        return tuple(map(_one_precision, value))
    return _one_precision(value)


def _one_precision(value: Any) -> lax.Precision:
    try:
        return lax.Precision(value)
    except (ValueError, TypeError):
        raise ValueError(
            f"{received('precision', value)} must be None, 'default', 'high', 'highest', a jax.lax.Precision, "
            "or a pair of them (inputs, kernel)."
        ) from None


def dtype_value(name: str, value: Any) -> np.dtype | None:
    """A numeric dtype, or None."""
    if value is None:
        return None
    if any(value is kind for kind in (float, complex, int)):  # they mean JAX's default width
        value = jax.dtypes.canonicalize_dtype(value)
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        raise TypeError(f"{received(name, value)} is no dtype; pass one such as 'float32' or jnp.bfloat16.") from None
    if not jnp.issubdtype(dtype, jnp.number):
        raise TypeError(f"{received(name, value)} must be a numeric dtype.")
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise TypeError(
            f"{received(name, value)} needs 64-bit types, which JAX has switched off; "
            "set jax.config.update('jax_enable_x64', True) or choose a 32-bit dtype."
        )
    return dtype


def inexact_dtype(name: str, value: Any) -> np.dtype:
    """A dtype that parameters can be trained in."""
    dtype = dtype_value(name, value)
    if dtype is None:
        raise TypeError(f"`{name}=None` must be a dtype such as jnp.float32.")
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(f"`{name}={dtype.name}` must be a floating or complex dtype: the weights are trained.")
    return dtype


def hashable(value: Any) -> Any:
    """Lists and arrays as tuples, dicts as frozen dicts and NumPy's scalars as Python's, all the way down."""
    if isinstance(value, Mapping):
        from flax.core import FrozenDict  # here, so that the function alone does not load Flax

        return FrozenDict({key: hashable(item) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return tuple(map(hashable, value))
    return hashable(np.asarray(value).tolist()) if isinstance(value, np.ndarray | np.generic | jax.Array) else value
