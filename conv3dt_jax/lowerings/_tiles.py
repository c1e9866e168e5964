"""Walking over a volume block by block, with temporaries that stay in the cache.

On a CPU the large temporaries of a whole-array algorithm cost more than its arithmetic: every fresh page is a fault,
and every pass leaves the cache. The lowerings for CPUs loop over blocks of (batch, groups, depth, height) instead; the
width is never cut, so that rows stay long.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

LARGEST, SMALLEST = 4 << 20, 1 << 18
"""Bytes of the largest temporary of a block. Blocks of a few second-level caches measured fastest."""

FEW_SLICES, MOST_SLICES = 27, 125
"""Slices for the taps of a kernel that a program holds without a loop, and at most: compile time grows with them."""


def tile_bytes(platform: str, *shapes: Sequence[Any], itemsize: int) -> int:
    """Bytes for a block's largest temporary.

    A fraction of what operands and result hold, so that all temporaries together stay below them. Accelerators take
    the whole volume at once: loops would starve them.
    """
    if platform != "cpu":
        return 1 << 62
    held = sum(math.prod(size for size in shape if isinstance(size, int)) for shape in shapes) * itemsize
    return min(max(held // 4, SMALLEST), LARGEST)


@dataclasses.dataclass(frozen=True)
class Span:
    """An axis of ``length`` cells in blocks of ``block``; the last one starts early where it would stick out."""

    length: Any  # an int; of a batch, it may be symbolic
    block: int

    @property
    def count(self) -> Any:
        return -(-self.length // self.block)

    @property
    def repeats(self) -> bool:
        """Whether the last block does some cells again."""
        return self.length % self.block != 0

    def start(self, index: Any) -> Any:
        """First cell of a block; the integer 0 where there is one block."""
        if self.count == 1:
            return 0
        start = index * self.block
        return jnp.minimum(start, self.length - self.block) if self.repeats else start


def plan(lengths: Sequence[Any], cell_bytes: int, tile_bytes: int) -> tuple[Span, ...]:
    """Blocks of about ``tile_bytes`` over (batch, groups, depth, height, width), innermost filled first.

    A block has one group and whole rows.
    """
    spans: list[Span] = []
    room = max(tile_bytes // max(cell_bytes, 1), 1)
    for length in reversed(lengths):
        block = block_of(length, room)
        spans.append(Span(length, block))
        room = max(room // length, 1) if isinstance(length, int) and block == length else 1
    batch, _, depth, height, _ = reversed(spans)
    return batch, Span(lengths[1], 1), depth, height


def block_of(length: Any, most: int) -> int:
    """The size of blocks, above half of ``most`` where they can be, that does the fewest cells twice; the largest."""
    if not isinstance(length, int):
        return 1
    if most >= length:
        return length
    return min(range(most, most // 2, -1), key=lambda block: -(-length // block) * block)


def operand_dtype(accumulate: Any, *arrays: jax.Array) -> Any:
    """The dtype of a product's operands: that of the sums; but bfloat16 stays, its products are exact, and faster."""
    narrow = jnp.dtype(accumulate) == jnp.float32 and all(array.dtype == jnp.bfloat16 for array in arrays)
    return jnp.dtype(jnp.bfloat16) if narrow else widest(accumulate, *arrays)


def bits(array: jax.Array) -> jax.Array:
    """Bfloat16 as the integers behind it: XLA:CPU moves it through float32, so that a loop converts all it carries."""
    return lax.bitcast_convert_type(array, jnp.uint16) if array.dtype == jnp.bfloat16 else array


def values(array: jax.Array, dtype: Any) -> jax.Array:
    """The inverse of `bits` for an array that was of this dtype."""
    return lax.bitcast_convert_type(array, dtype) if dtype == jnp.bfloat16 else array


def ordered(channels_first: bool, *sizes: Any) -> tuple[Any, ...]:
    """Sizes, or starts, of ``(N, *space, F)`` in the order of an array that may have F second."""
    batch, *space, channels = sizes
    return (batch, channels, *space) if channels_first else (batch, *space, channels)


def plus(array: jax.Array, bias: jax.Array | None, start: Any = 0, dim: int = -1) -> jax.Array:
    """Adds a bias, from the filter ``start`` on, to an array whose axis ``dim`` are filters."""
    if bias is None:
        return array
    filters = array.shape[dim]
    part = bias if bias.shape[0] == filters else lax.dynamic_slice_in_dim(bias, start, filters)
    return array + lax.expand_dims(part, [i for i in range(array.ndim) if i != dim % array.ndim])


def turned(matrix: jax.Array, starts: Any) -> jax.Array:
    """The transpose, made before a product of 16-bit operands: a transposed left side is widened to float32 there."""
    made = materialized(lambda: bits(matrix).T, starts)
    return values(lax.optimization_barrier(made), matrix.dtype)


def materialized(make: Callable[[], jax.Array], starts: Sequence[Any]) -> jax.Array:
    """Makes an array once: XLA:CPU would fuse a read, with its bounds, into all that use it, at twice the cost.

    It fuses across optimization barriers, but not into the branches of a conditional. Nothing is fused where no start
    of a block is traced.
    """
    traced = [start for start in starts if not isinstance(start, int)]
    if not traced:
        return make()
    return lax.cond(traced[0] > jnp.iinfo(jnp.int32).min, make, lambda: jnp.zeros_like(make()))


def widest(accumulate: Any, *arrays: jax.Array) -> Any:
    """The dtype to compute in: that of the sums, or of an operand that is wider."""
    return max([jnp.dtype(accumulate), *(array.dtype for array in arrays)], key=lambda dtype: dtype.itemsize)


def for_each_tile(spans: Sequence[Span], body: Callable[[list[Any], Any], Any], carry: Any) -> Any:
    """``carry = body(starts, carry)`` for every block, in order."""
    counts = [span.count for span in spans]
    if all(count == 1 for count in counts):
        return body([0] * len(spans), carry)

    def step(index: jax.Array, carry: Any) -> Any:
        starts: list[Any] = []
        for dim in reversed(range(len(spans))):
            outermost = all(count == 1 for count in counts[:dim])
            starts.append(spans[dim].start(index if outermost else index % counts[dim]))
            index = index if counts[dim] == 1 or outermost else index // counts[dim]
        return body(starts[::-1], carry)

    total = math.prod(counts)
    return lax.fori_loop(0, total if isinstance(total, int) else jnp.asarray(total, jnp.int32), step, carry)


def looped(taps: Sequence[int], few: int = FEW_SLICES) -> int:
    """How many leading axes, of depth, height and width, have their taps walked by a loop.

    One costs no time and saves slices, which are compiled one by one; more make products narrow.
    """
    if math.prod(taps) <= few:
        return 0
    return next(count for count in (1, 2, 3) if math.prod(taps[count:]) <= MOST_SLICES)


def wrapped(array: jax.Array, dim: int, low: Any, high: Any) -> jax.Array:
    """The array with ``low`` elements of its other end before an axis and ``high`` behind it; sizes may be symbolic."""
    if all(isinstance(size, int) for size in (low, high, array.shape[dim])):
        return jnp.pad(array, [(low, high) if i == dim else (0, 0) for i in range(array.ndim)], mode="wrap")
    places = (jnp.arange(low + array.shape[dim] + high) - low) % jnp.asarray(array.shape[dim])
    return jnp.take(array, places, axis=dim)


def once(x: jax.Array, spans: Sequence[Span], starts: Sequence[Any], dims: Sequence[int]) -> jax.Array:
    """Zeros for the cells of a block that an earlier one has added already."""
    for dim, span, start in zip(dims, spans, starts, strict=True):
        if span.repeats and span.count > 1:
            again = (span.count - 1) * span.block - (span.length - span.block)
            first = jnp.where(start == span.length - span.block, again, 0)
            x = jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, dim) >= first, x, 0)
    return x


def cut(array: jax.Array, starts: Sequence[Any], sizes: Sequence[Any]) -> jax.Array:
    """`lax.dynamic_slice` with starts that may be integers and tracers side by side."""
    return lax.dynamic_slice(array, [jnp.asarray(start, jnp.int32) for start in starts], sizes)


@dataclasses.dataclass(frozen=True)
class Held:
    """What a loop reads from: an array as its `bits`, without the axes of one element.

    Where a plane or a line is given as a volume, XLA lays such an axis out first, and copies the whole array to where a
    loop wants it.
    """

    array: jax.Array
    shape: tuple[Any, ...]
    dtype: Any

    @classmethod
    def of(cls, array: jax.Array) -> Held:
        still = [dim for dim, size in enumerate(array.shape) if _is_one(size)]
        return cls(lax.squeeze(bits(array), still) if still else bits(array), array.shape, array.dtype)

    def cut(self, starts: Sequence[Any], sizes: Sequence[int]) -> jax.Array:
        """`cut` from the array, as its bits."""
        still = [dim for dim, size in enumerate(self.shape) if _is_one(size)]
        moving = [dim for dim in range(len(sizes)) if dim not in still]
        part = self.array
        if [sizes[dim] for dim in moving] != list(part.shape):
            part = cut(part, [starts[dim] for dim in moving], [sizes[dim] for dim in moving])
        part = lax.expand_dims(part, still) if still else part
        return part if part.shape == tuple(sizes) else lax.slice(part, [0] * len(sizes), sizes)


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def put(array: jax.Array, part: jax.Array, starts: Sequence[Any]) -> jax.Array:
    """`lax.dynamic_update_slice`, likewise; in place inside a loop."""
    return lax.dynamic_update_slice(array, part, [jnp.asarray(start, jnp.int32) for start in starts])


@dataclasses.dataclass(frozen=True)
class Window:
    """``length`` elements from ``start`` on, which lies between ``lowest`` and ``highest`` (all equal where known)."""

    start: Any
    length: int
    lowest: int
    highest: int

    @classmethod
    def of(cls, span: Span, start: Any, *, scale: int = 1, offset: int = 0, extent: int = 0) -> Window:
        """The elements ``scale * cell + offset + [0, extent]`` of the cells of a block that begins at ``start``."""
        lowest, highest = offset, scale * (span.length - span.block) + offset
        return cls(scale * start + offset, scale * (span.block - 1) + 1 + extent, lowest, highest)


def read(array: Held, windows: Sequence[Window]) -> jax.Array:
    """Cuts a window out of an array, as its bits, zeros outside of it; only what a block needs is copied."""
    before, after = [], []
    for size, window in zip(array.shape, windows, strict=True):
        before.append(max(-window.lowest, 0))
        after.append(max(window.highest + window.length - size, 0))
    starts: list[Any] = []
    sizes, padding, shifts = [], [], []
    for size, window, low, high in zip(array.shape, windows, before, after, strict=True):
        if isinstance(window.start, int):
            first, last = max(window.start, 0), min(window.start + window.length, size)
            starts.append(min(first, size))
            sizes.append(max(last - first, 0))
            padding.append((min(low, window.length), window.length - min(low, window.length) - sizes[-1], 0))
            shifts.append(0)
        else:
            length = min(window.length, size)
            clipped = jnp.clip(window.start, 0, size - length) if low or high else window.start
            starts.append(clipped)
            sizes.append(length)
            high = max(window.highest - (size - length), 0) + window.length - length if high else 0
            padding.append((low, high, 0))
            shifts.append(window.start - clipped + low if low or high else 0)
    part = array.cut(starts, sizes)
    if any(low or high for low, high, _ in padding):
        part = lax.pad(part, jnp.zeros((), part.dtype), padding)
    lengths = tuple(window.length for window in windows)
    return cut(part, shifts, lengths) if part.shape != lengths else part
