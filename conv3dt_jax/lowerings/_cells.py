"""Outputs block by block: the kept window as cells of ``s`` outputs, and the inputs that a block of cells needs.

Output ``m * s + r`` of the window is reached by the taps with ``t * d - lo = a * s + r``, from input ``m - a``. A block
of cells ``[m0, m0 + b)`` needs the inputs from ``m0 - max(a)`` to ``m0 + b - 1 - min(a)``, zeros beyond the ends.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from conv3dt_jax._geometry import Axis, Geometry
from conv3dt_jax.lowerings import _tiles
from conv3dt_jax.lowerings._result import Part, Result

MOST_RUNS = 3
"""Runs of an axis beyond which all residues are one: the program must not grow with the stride."""


def is_still(axis: Axis) -> bool:
    """Whether an axis does nothing."""
    return bool(axis.n == axis.k == axis.out == 1)


def cells(axis: Axis) -> int:
    """The cells of ``s`` outputs that cover the window."""
    return -(-axis.out // axis.s)


def shifts(axis: Axis, residues: Sequence[int] | None = None) -> list[int]:
    """The shifts ``a`` that the taps of the given residues need (of all, where None)."""
    pairs = [divmod(t * axis.d - axis.lo, axis.s) for t in range(axis.k)]
    return sorted({a for a, r in pairs if residues is None or r in residues})


def span(axis: Axis) -> int:
    """How many more inputs than cells a block needs."""
    return shifts(axis)[-1] - shifts(axis)[0]


def aligned(axis: Axis) -> tuple[Axis, int]:
    """The axis with its window begun up to ``s - 1`` outputs earlier, where that needs fewer products; and how many.

    With a kernel of 4, a stride of 2 and lo = 1 the cells need shifts -1, 0 and 1; begun one earlier, 0 and 1.
    """
    early = [dataclasses.replace(axis, lo=axis.lo - e, out=axis.out + e) for e in range(min(axis.s, axis.ke))]
    best = min(range(len(early)), key=lambda e: cells(early[e]) * len(shifts(early[e])))
    return early[best], best


def runs(axis: Axis) -> list[tuple[int, int]]:
    """Neighbouring residues ``[first, last)`` that need the same shifts; those that no tap reaches are left out."""
    found: list[tuple[int, int]] = []
    for _, group in itertools.groupby(range(axis.s), key=lambda r: shifts(axis, [r])):
        members = list(group)
        if shifts(axis, members):
            found.append((members[0], members[-1] + 1))
    return found if len(found) <= MOST_RUNS else joined(found)


def joined(found: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """All of them as one."""
    return [(found[0][0], found[-1][1])]


def extend(inputs: jax.Array, geometry: Geometry) -> jax.Array:
    """The inputs ``m - a`` of all cells and shifts: zeros, or the other end, where those reach past the inputs."""
    for dim, axis in enumerate(geometry, start=1):
        first, last = shifts(axis)[0], shifts(axis)[-1]
        low, high = last, cells(axis) - first - axis.n
        if axis.wraps and max(low, high) > 0:
            around = [(0, 0)] * inputs.ndim
            around[dim] = (max(low, 0), max(high, 0))
            inputs = lax.optimization_barrier(jnp.pad(inputs, around, mode="wrap"))
            low, high = min(low, 0), min(high, 0)
        padding = [(0, 0, 0)] * inputs.ndim
        padding[dim] = (low, high, 0)
        inputs = lax.pad(inputs, jnp.zeros((), inputs.dtype), padding)
    return lax.optimization_barrier(inputs)


def _is_extended(geometry: Geometry, channels: int, filters: int) -> bool:
    """Whether `walk` extends all inputs at once, rather than each block's: where there is anything beyond them."""
    if all(shifts(axis) == [0] and cells(axis) == axis.n for axis in geometry):
        return False
    inputs, outputs = (math.prod(sizes) for sizes in zip(*((axis.n, axis.out) for axis in geometry), strict=True))
    return any(axis.wraps for axis in geometry) or 2 * inputs * channels <= outputs * filters


def extended_values(geometry: Geometry, channels: int, filters: int) -> int:
    """Of the copies of the inputs that `walk` makes, for one sample; 0 where it makes none."""
    if not _is_extended(geometry, channels, filters):
        return 0
    axes = [(shifts(axis), cells(axis)) for axis in geometry]
    copies = 2 if any(axis.wraps for axis in geometry) else 1  # padded axis by axis
    return copies * channels * math.prod(count + taken[-1] - taken[0] for taken, count in axes)


def walk(
    inputs: jax.Array,
    geometry: Geometry,
    crop: int,
    filters: int,
    blocks: int,
    spans: Sequence[_tiles.Span],
    dtype: Any,
    result: Any,
    compute: Callable[[jax.Array, Any, Sequence[Any]], list[Part]],
    bias: jax.Array | None = None,
    channels_first: bool = False,
) -> jax.Array:
    """``(N, D, H, W, C)`` to ``(N, *out, F)``: ``compute(slab, group, starts)`` gives the phases of a block of cells.

    Args:
      inputs: the inputs.
      geometry: its width may begin early.
      crop: outputs by which the width begins early; ``compute`` has left them out.
      filters: F.
      blocks: blocks of groups, see `_blocks`.
      spans: of batch, groups, depth and height.
      dtype: of the inputs that ``compute`` gets.
      result: dtype of the result.
      compute: takes the inputs ``(n, d + span, h + span, W + span, C / blocks)`` that a block of cells needs. It gets
        and gives bfloat16 as `_tiles.bits`.
      bias: ``(F,)``, what outputs hold that ``compute`` leaves out.
      channels_first: whether ``compute`` gives, and the result has, the filters second: ``(N, F, *out)``.
    """
    depth, height, width = geometry
    given, inputs = inputs.dtype, _tiles.bits(inputs)
    each_c = inputs.shape[-1] // blocks
    if _is_extended(geometry, inputs.shape[-1], filters):
        inputs, offsets = extend(inputs, geometry), [0, 0, 0]
    else:  # padding all of it would cost more than padding every block
        offsets = [-shifts(axis)[-1] for axis in geometry]
    walked = (spans[2], spans[3], _tiles.Span(cells(width), cells(width)))
    found = Result(
        out=(depth.out, height.out, width.out - crop),
        steps=(depth.s, height.s),
        crops=(0, 0),
        spans=spans,
        filters=filters,
        dtype=result,
        channels_first=channels_first,
    )
    held = _tiles.Held.of(inputs)
    fill = jnp.zeros((filters,), result) if bias is None else bias.astype(result)

    def body(starts: list[Any], outputs: jax.Array) -> jax.Array:
        sample, group, *corner = starts
        windows = [
            _tiles.Window.of(spans[0], sample),
            *(
                _tiles.Window.of(cut, start, offset=offset, extent=span(axis))
                for cut, start, offset, axis in zip(walked, (*corner, 0), offsets, geometry, strict=True)
            ),
            _tiles.Window(group * each_c, each_c, 0, inputs.shape[-1] - each_c),
        ]
        slab = _tiles.read(held, windows)
        if given != dtype:
            slab = _tiles.values(slab, given).astype(dtype)
        return found.put(outputs, compute(slab, group, starts), starts, fill)

    return found.finished(_tiles.for_each_tile(spans, body, found.filled(fill)))
