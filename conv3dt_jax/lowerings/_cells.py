"""Outputs block by block: the kept window as cells of ``s`` outputs, and the inputs that a block of cells needs.

Output ``m * s + r`` of the window is reached by the taps with ``t * d - lo = a * s + r``, from input ``m - a``. A block
of cells ``[m0, m0 + b)`` needs the inputs from ``m0 - max(a)`` to ``m0 + b - 1 - min(a)``, zeros beyond the ends.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from conv3dt_jax._geometry import Axis, Geometry
from conv3dt_jax.lowerings import _tiles

MOST_RUNS = 3
"""Runs of an axis beyond which all residues are one: the program must not grow with the stride."""


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


def _size(geometry: Geometry) -> int:
    return math.prod(axis.out for axis in geometry)


Part = tuple[jax.Array, tuple[int, int]]
"""``(n, cells, rd, cells, rh, width, F)``, or F second, and the first residues rd and rh in their cells."""


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
    each_c, each_f = inputs.shape[-1] // blocks, filters // blocks
    if any(axis.wraps for axis in geometry) or 2 * math.prod(inputs.shape[1:]) <= _size(geometry) * filters:
        inputs, offsets = extend(inputs, geometry), [0, 0, 0]
    else:  # padding all of it would cost more than padding every block
        offsets = [-shifts(axis)[-1] for axis in geometry]
    walked = (spans[2], spans[3], _tiles.Span(cells(width), cells(width)))
    lines = width.out - crop
    whole = all(axis.out % axis.s == 0 for axis in (depth, height))
    ordered = functools.partial(_tiles.ordered, channels_first)
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
        slab = _tiles.read(inputs, windows)
        if given != dtype:
            slab = _tiles.values(slab, given).astype(dtype)
        parts = compute(slab, group, starts)
        first = group * each_f
        if whole:
            return put(outputs, parts, (sample, *corner, first))
        sizes = (
            spans[0].block,
            *(n for cut, axis in zip(spans[2:], geometry[:2], strict=True) for n in (cut.block, axis.s)),
        )
        block = filled(lax.dynamic_slice_in_dim(fill, first, each_f), *sizes)
        block = put(block, parts, (0, 0, 0, 0))
        block = block.reshape(ordered(sizes[0], sizes[1] * sizes[2], sizes[3] * sizes[4], lines, each_f))
        for (d, n), (h, m) in itertools.product(*(_rows(*pair) for pair in zip(geometry[:2], spans[2:], strict=True))):
            part = lax.slice(block, ordered(0, d, h, 0, 0), ordered(sizes[0], d + n, h + m, lines, each_f))
            place = ordered(sample, corner[0] * depth.s + d, corner[1] * height.s + h, 0, first)
            outputs = _tiles.put(outputs, part, place)
        return outputs

    def put(outputs: jax.Array, parts: Sequence[Part], starts: Sequence[Any]) -> jax.Array:
        sample, d, h, first = starts
        for part, (d0, h0) in parts:
            place = ordered(sample, d, d0, h, h0, 0, first)
            outputs = part if part.shape == outputs.shape else _tiles.put(outputs, part, place)
        return outputs

    def filled(fill: jax.Array, *sizes: Any) -> jax.Array:
        shape = ordered(*sizes, lines, fill.shape[0])
        return _tiles.bits(lax.broadcast_in_dim(fill, shape, (1 if channels_first else len(shape) - 1,)))

    cells_of = (spans[2].length, depth.s, spans[3].length, height.s) if whole else (depth.out, height.out)
    outputs = _tiles.for_each_tile(spans, body, filled(fill, inputs.shape[0], *cells_of))
    outputs = _tiles.values(outputs, result)
    return outputs.reshape(ordered(outputs.shape[0], depth.out, height.out, lines, filters))


def _rows(axis: Axis, span: _tiles.Span) -> list[tuple[int, int]]:
    """The outputs of a block of cells along an axis, as ``(start, length)`` in the order of their writing.

    The last block may stick out of the result. What may stick out is written first: it is moved back then, over
    outputs that the second write mends.
    """
    length = span.block * axis.s
    outside = span.length * axis.s - axis.out
    inside = length - outside
    if outside == 0 or span.count == 1:
        return [(0, inside)]
    tails = [(start, min(inside, length - start)) for start in range(inside, length, inside)]
    return [*tails, (0, inside)]
