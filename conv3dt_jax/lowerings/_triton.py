"""What the Pallas kernels share: tiles, indices, loads and stores, products, the launch."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


@functools.cache
def toolkit() -> Any:
    """Pallas and its part for Triton, loaded when first asked for; None where this JAX has none."""
    try:
        from jax.experimental import pallas
        from jax.experimental.pallas import triton
    except ImportError:
        return None
    return pallas, triton


def is_present() -> bool:
    return toolkit() is not None


@functools.cache
def is_hopper() -> bool:
    """Whether this process computes on NVIDIA GPUs of compute capability 9, for which the tiles were measured."""
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:
        return False
    return all(str(getattr(device, "compute_capability", "")).startswith("9.") for device in devices)


@contextlib.contextmanager
def without_notice() -> Iterator[None]:
    """JAX announces at every lowering that this part of Pallas will leave it some day: `is_present` will tell."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
        yield


@dataclasses.dataclass(frozen=True)
class Tile:
    """What a program makes, ``rows`` by ``columns`` from ``depth`` values at a time, with so many warps and stages."""

    rows: int
    columns: int
    depth: int
    warps: int = 4
    stages: int = 3


def power(size: int, least: int, most: int) -> int:
    """The power of two from ``size`` up, within bounds that are powers of two."""
    return min(max(1 << max(size - 1, 0).bit_length(), least), most)


# Indices: not negative, so that divisions need no look at signs. Plain integers cost nothing.


def program() -> Any:
    """The number of this program."""
    pallas, _ = toolkit()
    return pallas.program_id(0)


def quotient(value: Any, by: Any) -> Any:
    return value // by if isinstance(value, int) else lax.div(value, _like(by, value))


def remainder(value: Any, by: Any) -> Any:
    return value % by if isinstance(value, int) else lax.rem(value, _like(by, value))


def _like(by: Any, value: Any) -> jax.Array:
    return jnp.broadcast_to(jnp.asarray(by, jnp.int32), value.shape)


def split(value: Any, count: Any) -> tuple[Any, Any]:
    """The remainder and the quotient."""
    return (0, value) if isinstance(count, int) and count == 1 else (remainder(value, count), quotient(value, count))


def unravel(value: Any, sizes: Sequence[Any]) -> list[Any]:
    """Row-major places; the first is not reduced."""
    found = []
    for size in reversed(sizes[1:]):
        place, value = split(value, size)
        found.append(place)
    return [value, *reversed(found)]


def pick(index: Any, values: Sequence[int]) -> Any:
    """``values[index]`` without a table."""
    steps = {after - before for before, after in itertools.pairwise(values)}
    if len(steps) < 2:
        return values[0] + index * max(steps) if steps - {0} else values[0]
    found: Any = jnp.int32(values[0])
    for place, value in enumerate(values[1:], 1):
        found = jnp.where(index == place, jnp.int32(value), found)
    return found


def down(value: Any) -> Any:
    """As a column."""
    return value if value is None or isinstance(value, int) or value.ndim != 1 else value[:, None]


def across(value: Any) -> Any:
    """As a row."""
    return value if value is None or isinstance(value, int) or value.ndim != 1 else value[None, :]


def within(place: jax.Array, size: int) -> jax.Array:
    """Whether ``0 <= place < size``, in one comparison."""
    return place.astype(jnp.uint32) < jnp.uint32(size)


def both(one: Any, other: Any) -> Any:
    """What two masks allow; None allows all."""
    if one is None or other is None:
        return other if one is None else one
    return one & other


def load(ref: Any, index: jax.Array, mask: Any) -> jax.Array:
    """Values of a flat array, zeros where the mask is False."""
    _, triton = toolkit()
    if mask is None:
        return triton.load(ref.at[index])
    return triton.load(ref.at[index], mask=jnp.broadcast_to(mask, index.shape), other=0)


def store(ref: Any, index: jax.Array, value: jax.Array, mask: Any, interpret: bool) -> None:
    """Writes to a flat array, rounded to its dtype, where the mask is True."""
    mask = None if mask is None else jnp.broadcast_to(mask, index.shape)
    if interpret and mask is not None:  # the interpreter rewrites what was there, over what other rows write there
        index = jnp.where(mask, index, ref.shape[0])
    _, triton = toolkit()
    triton.store(ref.at[index], value.astype(ref.dtype), mask=mask)


def repeat(turns: Any, body: Callable[[Any, jax.Array], jax.Array], sums: jax.Array) -> jax.Array:
    """A loop whose turns are counted in 32 bits, also where JAX's integers have 64."""
    return lax.fori_loop(0, turns, lambda turn, sums: body(lax.convert_element_type(turn, jnp.int32), sums), sums)


PARTS = {"two": 2, "three": 3}


def add_product(
    sums: jax.Array, a: Sequence[jax.Array], b: Sequence[jax.Array], arithmetic: str, *, transposed: int
) -> jax.Array:
    """``sums + a @ b`` in float32, the operand of that number transposed.

    ``arithmetic`` of float32 operands: "float32" multiplies them as they are, "tf32" rounded to 11 bits; "two" and
    "three" take each as a sum of so many bfloat16 (`parts`), and leave out the products that are smaller than the
    rounding of the parts. Tensor cores do all but the first.
    """
    count = PARTS.get(arithmetic, 1)
    if count > 1 and len(a) == 1 and a[0].dtype == jnp.float32:
        a, b = parts(a[0], count), parts(b[0], count)
    dims = (((0 if transposed == 0 else 1,), (1 if transposed == 1 else 0,)), ((), ()))
    precision = lax.Precision.HIGHEST if arithmetic == "float32" else lax.Precision.DEFAULT
    made = [
        lax.dot_general(a[i], b[total - i], dims, precision=precision, preferred_element_type=jnp.float32)
        for total in reversed(range(len(a)))
        for i in range(total + 1)
    ]  # the smallest first
    if len(a) > 2:  # tensor cores cut what they add to a sum: a short one first
        return sums + functools.reduce(jnp.add, made)
    return functools.reduce(jnp.add, made, sums)


def parts(value: jax.Array, count: int) -> list[jax.Array]:
    """A float32 as a sum of bfloat16, the largest first; what is not finite is in the first alone. One is itself."""
    if count == 1:
        return [value]
    found = []
    for _ in range(count):
        part = value.astype(jnp.bfloat16)
        found.append(part)
        rest = value - part.astype(jnp.float32)
        value = jnp.where(jnp.abs(rest) < jnp.inf, rest, 0.0)
    return found


def taken_apart(value: jax.Array, count: int) -> list[jax.Array]:
    """As `parts`, outside of a kernel, where XLA would take a rounding there and back for none."""
    if count == 1:
        return [value]
    found = []
    for _ in range(count):
        part = lax.reduce_precision(value, exponent_bits=8, mantissa_bits=7)
        found.append(part.astype(jnp.bfloat16))
        rest = value - part
        value = jnp.where(jnp.abs(rest) < jnp.inf, rest, 0.0)
    return found


def launch(
    program: Callable[..., None],
    operands: Sequence[jax.Array],
    size: int,
    dtype: Any,
    programs: int,
    tile: Tile,
    interpret: bool,
) -> jax.Array:
    """Runs so many programs over whole arrays; the last reference is that of the result, of ``size`` values."""
    varying = jax.typeof(operands[0]).manual_axis_type  # which mesh axes it varies over, under `jax.shard_map`
    pallas, triton = toolkit()
    return pallas.pallas_call(
        program,
        out_shape=jax.ShapeDtypeStruct((size,), dtype, manual_axis_type=varying),
        grid=(programs,),
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="conv3d_transpose",
    )(*operands)
