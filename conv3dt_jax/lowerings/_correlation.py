"""Correlations by minimal filtering in depth and height, block by block; and their gradients for the taps.

A few cells at a time take fewer products (`_minimal`, `_lines`); the taps in width lie side by side.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from conv3dt_jax.lowerings import _tiles
from conv3dt_jax.lowerings._lines import Line, Tiles, tiles_of
from conv3dt_jax.lowerings._minimal import combine
from conv3dt_jax.lowerings._result import Part, Result


@dataclasses.dataclass(frozen=True)
class Correlation:
    """What is static about a correlation.

    Attributes:
      lines: the axes.
      channels: of what is found.
      blocks: B, of groups, see `_blocks`.
      dtype: of the sums.
      result: dtype of the correlation.
      precision: see `jax.lax.dot_general`.
      tile_bytes: see `_tiles.plan`.
      channels_first: whether the array, and the correlation, has its channels second.
    """

    lines: tuple[Line, ...]
    channels: int
    blocks: int
    dtype: Any
    result: Any
    precision: lax.PrecisionLike
    tile_bytes: int
    channels_first: tuple[bool, bool]

    @property
    def products(self) -> int:
        return math.prod(axis.algorithm.products for axis in tiles_of(self.lines))

    def spans(self, batch: Any, inner: int, outer: int) -> tuple[_tiles.Span, ...]:
        """The blocks of tiles, for ``inner`` values taken and ``outer`` found of a cell."""
        depth, height = tiles_of(self.lines)
        width = self.lines[2]
        lanes = depth.line.d * height.line.d
        cell_bytes = self.products * lanes * max(width.k * inner, outer) * self.dtype.itemsize
        lengths = (batch, self.blocks, depth.count, height.count, width.cells)
        planned = _tiles.plan(lengths, cell_bytes, 2 * self.tile_bytes)
        # A block that sticks out of the result at both ends holds two tiles.
        least = [1, 1, *(2 if axis.line.found > 1 and axis.line.early else 1 for axis in (depth, height))]
        return tuple(
            _tiles.Span(span.length, span.block if size == 1 else min(max(span.block, size), span.length))
            for span, size in zip(planned, least, strict=True)
        )


def correlate(
    array: jax.Array,
    taps: jax.Array | None,
    other: jax.Array | None,
    static: Correlation,
    bias: jax.Array | None = None,
) -> tuple[jax.Array | None, jax.Array | None]:
    """The correlation of ``array`` with ``taps``, and its gradient for the taps where ``other`` is the cotangent.

    I and O count what a cell of either side holds: the channels, times the elements of the cell.

    Args:
      array: ``(N, D, H, W, channels)``, or ``(N, channels, D, H, W)``.
      taps: ``(B, kd, kh, kw, I / B, O / B)`` or None.
      other: ``(N, *length, channels)`` or None.
      static: the axes, and how to go about it.
      bias: ``(channels,)``, added to the correlation.

    Returns:
      ``(N, *length, channels)``, or ``(N, channels, *length)``, or None, and ``(B, kd, kh, kw, I / B, O / B)`` or None.
    """
    tiles, width = tiles_of(static.lines), static.lines[2]
    array_first, found_first = static.channels_first
    each, each_o = array.shape[1 if array_first else 4] // static.blocks, static.channels // static.blocks
    inner = each * math.prod(line.given for line in static.lines)
    outer = each_o * math.prod(line.found for line in static.lines)
    spans = static.spans(array.shape[0], inner, outer)
    matrices = None if taps is None else _matrices(taps, tiles)
    result = Result(
        out=tuple(line.length for line in static.lines),
        steps=tuple(axis.unit * axis.line.found for axis in tiles),
        crops=tuple(axis.line.early if axis.line.found > 1 else 0 for axis in tiles),
        spans=spans,
        filters=static.channels,
        dtype=static.result,
        channels_first=found_first,
    )
    fill = jnp.zeros((static.channels,), static.result)

    held, held_other = _tiles.Held.of(array), None if other is None else _tiles.Held.of(other)

    def body(starts: list[Any], carry: tuple[Any, Any]) -> tuple[Any, Any]:
        block = starts[1]
        found, sums = carry
        patches = _patches(held, static, spans, starts, each)
        if matrices is not None:
            weights = [lax.dynamic_index_in_dim(matrix, block, keepdims=False) for matrix in matrices]
            parts = _parts(patches, weights, static, spans, bias, block)
            found = result.put(found, parts, starts, fill)
        if held_other is not None:
            spread = _spread(held_other, tiles, width, spans, starts, outer, static.dtype)
            contract = (((0,), (0,)), ((), ()))
            made = [
                lax.dot_general(s, p, contract, precision=static.precision)
                for s, p in zip(spread, patches, strict=True)
            ]
            old = lax.dynamic_index_in_dim(sums, block, keepdims=False)
            sums = lax.dynamic_update_index_in_dim(sums, old + jnp.stack(made), block, 0)
        return found, sums

    found = None if taps is None else result.filled(fill)
    sums = None
    if other is not None:
        sums = jnp.zeros((static.blocks, static.products, outer, width.k * inner), static.dtype)
    found, sums = _tiles.for_each_tile(spans, body, (found, sums))
    if found is not None:
        found = result.finished(found)
    if sums is not None:
        sums = _taps(sums.reshape(*sums.shape[:3], width.k, inner), tiles)
    return found, sums


def _parts(
    patches: list[jax.Array],
    weights: list[jax.Array],
    static: Correlation,
    spans: Any,
    bias: jax.Array | None,
    block: Any,
) -> list[Part]:
    """The products, summed up: for each output of a tile its elements."""
    depth, height = tiles = tiles_of(static.lines)
    width, found_first = static.lines[2], static.channels_first[1]
    found = [line.found for line in static.lines]
    each = static.channels // static.blocks
    cells = (spans[0].block, spans[2].block, depth.line.d, spans[3].block, height.line.d, width.cells)
    if found_first:
        contract = (((0,), (1,)), ((), ()))
        made = [
            lax.dot_general(matrix, patch, contract, precision=static.precision).reshape(*found, each, *cells)
            for matrix, patch in zip(weights, patches, strict=True)
        ]
        order, filters_dim, row = (4, 3, 5, 6, 0, 7, 8, 1, 9, 2), 3, 6
    else:
        made = [
            lax.dot(patch, matrix, precision=static.precision).reshape(*cells, *found, each)
            for matrix, patch in zip(weights, patches, strict=True)
        ]
        order, filters_dim, row = (0, 1, 2, 6, 3, 4, 7, 5, 8, 9), 9, 5
    parts = []
    crop = width.early if width.found > 1 else 0
    for (p, q), part in _sum_up(made, tiles).items():
        part = _tiles.plus(part, bias, block * each, dim=filters_dim)
        part = _tiles.bits(part.astype(static.result)).transpose(order)
        sizes = (depth.line.d * found[0], spans[3].block, height.line.d * found[1], width.cells * found[2])
        part = part.reshape(_tiles.ordered(found_first, spans[0].block, spans[2].block, *sizes, each))
        part = lax.slice_in_dim(part, crop, crop + width.length, axis=row)
        parts.append((part, (p * sizes[0], q * sizes[2])))
    return parts


def _patches(array: _tiles.Held, static: Correlation, spans: Any, starts: Any, channels: int) -> list[jax.Array]:
    """For every product ``(rows, kw * I)``: the transformed inputs of a block of tiles."""
    depth, height = tiles_of(static.lines)
    width = static.lines[2]
    slab = _tiles.materialized(lambda: _slab(array, static, spans, starts, channels), starts)
    rows = slab.shape[1] // depth.line.d, depth.line.d, slab.shape[2] // height.line.d, height.line.d
    slab = slab.reshape(slab.shape[0], *rows, *slab.shape[3:])
    found = []
    for first in _transformed(slab, 1, depth, spans[2].block):
        for part in _transformed(lax.optimization_barrier(first), 3, height, spans[3].block):
            part = lax.optimization_barrier(part)
            parts = [lax.slice_in_dim(part, t * width.d, t * width.d + width.cells, axis=5) for t in range(width.k)]
            found.append(jnp.concatenate(parts, -1).reshape(-1, width.k * slab.shape[-1]))
    return found


def _slab(array: _tiles.Held, static: Correlation, spans: Any, starts: Any, channels: int) -> jax.Array:
    """``(n, cells, cells, cells, I)`` of the array that a block of tiles needs."""
    sample, block, *corner = starts
    windows = [_tiles.Window.of(spans[0], sample)]
    for axis, span, start in zip(tiles_of(static.lines), spans[2:], corner, strict=True):
        windows.append(_window(axis.line, axis.unit, span, start))
    windows.append(_window(static.lines[2], 1, _tiles.Span(static.lines[2].cells, static.lines[2].cells), 0))
    dim = 1 if static.channels_first[0] else 4
    windows.insert(dim, _tiles.Window(block * channels, channels, 0, array.shape[dim] - channels))
    slab = jnp.moveaxis(_read(array, windows, static.dtype), dim, -1)
    given = [line.given for line in static.lines]
    counts = [(size // n, n) for size, n in zip(slab.shape[1:4], given, strict=True)]
    slab = slab.reshape(slab.shape[0], *(n for pair in counts for n in pair), channels)
    slab = slab.transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return slab.reshape(*slab.shape[:4], -1)


def _window(line: Line, unit: int, span: _tiles.Span, start: Any) -> _tiles.Window:
    """What the cells of a block need of the array, in elements."""
    early = line.early if line.given > 1 else 0
    return _tiles.Window.of(
        span,
        start,
        scale=unit * line.given,
        offset=line.offset * line.given - early,
        extent=(unit + (line.k - 1) * line.d) * line.given - 1,
    )


def _matrices(taps: jax.Array, tiles: Sequence[Tiles]) -> list[jax.Array]:
    """G w for every product: ``(B, kw * I, O)``."""
    depth, height = (axis.algorithm.taps for axis in tiles)
    planes = [
        [taps[:, i, j].reshape(taps.shape[0], -1, taps.shape[-1]) for j in range(taps.shape[2])]
        for i in range(taps.shape[1])
    ]
    found = []
    for row in depth:
        lines = lax.optimization_barrier([combine(row, column) for column in zip(*planes, strict=True)])
        found += [combine(weights, lines) for weights in height]
    return lax.optimization_barrier(found)


def _taps(sums: jax.Array, tiles: Sequence[Tiles]) -> jax.Array:
    """The transpose of `_matrices`: ``(B, products, O, kw, I)`` to ``(B, kd, kh, kw, I, O)``."""
    depth, height = (axis.algorithm.taps for axis in tiles)
    count = len(height)
    columns = []
    for i in range(len(depth)):
        products = [sums[:, i * count + j] for j in range(count)]
        columns.append(lax.optimization_barrier([combine(weights, products) for weights in zip(*height, strict=True)]))
    planes = [
        jnp.stack([combine(row, line) for line in zip(*columns, strict=True)], 1) for row in zip(*depth, strict=True)
    ]
    return jnp.stack(planes, 1).transpose(0, 1, 2, 4, 5, 3)


def _read(array: _tiles.Held, windows: Sequence[_tiles.Window], dtype: Any) -> jax.Array:
    return _tiles.values(_tiles.read(array, windows), array.dtype).astype(dtype)


def _transformed(slab: jax.Array, dim: int, axis: Tiles, block: int) -> list[jax.Array]:
    """B^T x along ``dim``, for each product one of every tile."""
    step = axis.algorithm.outputs
    last = step * (block - 1) + 1
    inputs = [lax.slice_in_dim(slab, o, o + last, step, dim) for o in range(axis.algorithm.products)]
    return [combine(row, inputs) for row in axis.algorithm.data]


def _sum_up(products: Sequence[jax.Array], tiles: Sequence[Tiles]) -> dict[tuple[int, int], jax.Array]:
    """A^T of the products along both axes: for each output of a tile its values."""
    depth, height = (axis.algorithm for axis in tiles)
    rows = [
        lax.optimization_barrier(
            [combine(row, products[i * height.products : (i + 1) * height.products]) for row in height.sums]
        )
        for i in range(depth.products)
    ]
    return {
        (p, q): combine(row, [made[q] for made in rows])
        for p, row in enumerate(depth.sums)
        for q in range(height.outputs)
    }


def _spread(
    other: _tiles.Held, tiles: Sequence[Tiles], width: Line, spans: Any, starts: Any, channels: int, dtype: Any
) -> list[jax.Array]:
    """For every product ``(rows, O)``: A applied to the cotangents of a block of tiles, the transpose of `_sum_up`."""
    sample, block, *corner = starts
    windows = [_tiles.Window.of(spans[0], sample)]
    for axis, span, start in zip(tiles, spans[2:], corner, strict=True):
        windows.append(_tiles.Window.of(span, start, scale=axis.unit, extent=axis.unit - 1))
    windows.append(_tiles.Window(0, width.cells, 0, 0))
    windows.append(_tiles.Window(block * channels, channels, 0, other.shape[-1] - channels))
    slab = _read(other, windows, dtype)
    depth, height = tiles
    parts = [(span.block, axis.algorithm.outputs, axis.line.d) for axis, span in zip(tiles, spans[2:], strict=True)]
    slab = slab.reshape(slab.shape[0], *parts[0], *parts[1], *slab.shape[3:])
    slab = _tiles.once(slab, (spans[0], *spans[2:]), (sample, *corner), dims=(0, 1, 4))
    pieces = [[slab[:, :, p, :, :, q] for q in range(height.algorithm.outputs)] for p in range(depth.algorithm.outputs)]
    found = []
    for column in zip(*depth.algorithm.sums, strict=True):
        rows = [combine(column, [pieces[p][q] for p in range(len(column))]) for q in range(height.algorithm.outputs)]
        rows = lax.optimization_barrier(rows)
        for weights in zip(*height.algorithm.sums, strict=True):
            found.append(combine(weights, rows).reshape(-1, channels))
    return found
