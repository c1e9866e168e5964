"""Correlations by minimal filtering in depth and height, block by block; and their gradients for the taps.

In depth two outputs at a time, in height four, take 4 and 6 products instead of 6 and 12 (`_minimal`); the taps in
width lie side by side. Dilated lines are interleaved ones.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from conv3dt_jax._geometry import Axis
from conv3dt_jax.lowerings import _minimal, _tiles
from conv3dt_jax.lowerings._minimal import combine

DEPTH = {1: _minimal.NONE, 3: _minimal.F23}
HEIGHT = {3: _minimal.F43}
"""The algorithm for so many taps."""


class Line(NamedTuple):
    """One axis of a correlation: ``out[i] = sum_t in[i + offset + t * d] taps[t]``."""

    offset: int
    k: int
    d: int
    out: int

    @classmethod
    def forward(cls, axis: Axis) -> Line:
        return cls(axis.lo - (axis.k - 1) * axis.d, axis.k, axis.d, axis.out)

    @classmethod
    def adjoint(cls, axis: Axis) -> Line:
        return cls(-axis.lo, axis.k, axis.d, axis.n)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """An axis in tiles: ``unit`` outputs are ``outputs`` of the algorithm for each of ``d`` interleaved lines."""

    line: Line
    algorithm: _minimal.Algorithm

    @property
    def unit(self) -> int:
        return self.algorithm.outputs * self.line.d

    @property
    def count(self) -> int:
        return -(-self.line.out // self.unit)


def tiles_of(lines: Sequence[Line]) -> tuple[Tiles, Tiles]:
    return Tiles(lines[0], DEPTH[lines[0].k]), Tiles(lines[1], HEIGHT[lines[1].k])


@dataclasses.dataclass(frozen=True)
class Correlation:
    """What is static about a correlation of ``(N, D, H, W, I)`` to ``(N, *out, O)``.

    Attributes:
      lines: the axes.
      channels: O.
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

    def spans(self, batch: Any, inner: int) -> tuple[_tiles.Span, ...]:
        """The blocks of tiles, for ``inner`` channels of the array in a block."""
        depth, height = tiles_of(self.lines)
        width = self.lines[2]
        products = depth.algorithm.products * height.algorithm.products
        cell_bytes = products * depth.line.d * height.line.d * width.k * inner * self.dtype.itemsize
        lengths = (batch, self.blocks, depth.count, height.count, width.out)
        return _tiles.plan(lengths, cell_bytes, 2 * self.tile_bytes)


def correlate(
    array: jax.Array,
    taps: jax.Array | None,
    other: jax.Array | None,
    static: Correlation,
    bias: jax.Array | None = None,
) -> tuple[jax.Array | None, jax.Array | None]:
    """The correlation of ``array`` with ``taps``, and its gradient for the taps where ``other`` is the cotangent.

    Args:
      array: ``(N, D, H, W, I)``, or ``(N, I, D, H, W)``.
      taps: ``(B, kd, kh, kw, I / B, O / B)`` or None.
      other: ``(N, *out, O)`` or None.
      static: the axes, and how to go about it.
      bias: ``(O,)``, added to the correlation.

    Returns:
      ``(N, *out, O)``, or ``(N, O, *out)``, or None, and ``(B, kd, kh, kw, I / B, O / B)`` or None.
    """
    depth, height = tiles = tiles_of(static.lines)
    width, dtype, blocks = static.lines[2], static.dtype, static.blocks
    array_first, found_first = static.channels_first
    ordered = functools.partial(_tiles.ordered, found_first)
    each_i, each_o = array.shape[1 if array_first else 4] // blocks, static.channels // blocks
    batch, spans = array.shape[0], static.spans(array.shape[0], each_i)
    matrices = None if taps is None else _matrices(taps, tiles)
    space = (depth.count, depth.algorithm.outputs, depth.line.d, height.count, height.algorithm.outputs, height.line.d)

    def multiply(patches: list[jax.Array], block: Any) -> list[jax.Array]:
        """``(n, d, dd, h, dh, width, O / B)``, or O / B first, for every product."""
        shape = (spans[0].block, spans[2].block, depth.line.d, spans[3].block, height.line.d, width.out)
        made = []
        for patch, matrix in zip(patches, matrices or [], strict=True):
            weights = lax.dynamic_index_in_dim(matrix, block, keepdims=False)
            if found_first:
                part = lax.dot_general(weights, patch, (((0,), (1,)), ((), ())), precision=static.precision)
                made.append(part.reshape(each_o, *shape))
            else:
                made.append(lax.dot(patch, weights, precision=static.precision).reshape(*shape, each_o))
        return made

    def body(starts: list[Any], carry: tuple[Any, Any]) -> tuple[Any, Any]:
        sample, block, d, h = starts
        found, sums = carry
        patches = _patches(array, tiles, width, spans, starts, each_i, array_first, dtype)
        if matrices is not None:
            for (p, q), part in _sum_up(multiply(patches, block), tiles).items():
                part = _tiles.plus(part, bias, block * each_o, dim=0 if found_first else -1)
                part = _tiles.bits(part.astype(static.result))
                part = part.swapaxes(0, 1) if found_first else part
                part = jnp.expand_dims(part, (3, 6) if found_first else (2, 5))
                found = _tiles.put(found, part, ordered(sample, d, p, 0, h, q, 0, 0, block * each_o))
        if other is not None:
            spread = _spread(other, tiles, width, spans, starts, each_o, dtype)
            contract = (((0,), (0,)), ((), ()))
            parts = [
                lax.dot_general(s, p, contract, precision=static.precision)
                for s, p in zip(spread, patches, strict=True)
            ]
            old = lax.dynamic_index_in_dim(sums, block, keepdims=False)
            sums = lax.dynamic_update_index_in_dim(sums, old + jnp.stack(parts), block, 0)
        return found, sums

    found = sums = None
    if taps is not None:
        found = _tiles.bits(jnp.zeros(ordered(batch, *space, width.out, static.channels), static.result))
    if other is not None:
        products = depth.algorithm.products * height.algorithm.products
        sums = jnp.zeros((blocks, products, each_o, width.k * each_i), dtype)
    found, sums = _tiles.for_each_tile(spans, body, (found, sums))
    if found is not None:
        found = _tiles.values(found, static.result)
        found = found.reshape(ordered(batch, math.prod(space[:3]), math.prod(space[3:]), width.out, static.channels))
        found = lax.slice(
            found, (0,) * 5, ordered(batch, depth.line.out, height.line.out, width.out, static.channels)
        )  # fmt: skip
    if sums is not None:
        sums = _taps(sums.reshape(blocks, products, each_o, width.k, each_i), tiles)
    return found, sums


def _patches(
    array: jax.Array,
    tiles: Sequence[Tiles],
    width: Line,
    spans: Any,
    starts: Any,
    channels: int,
    channels_first: bool,
    dtype: Any,
) -> list[jax.Array]:
    """For every product ``(rows, kw * I)``: the transformed inputs of a block of tiles."""
    sample, block, *corner = starts
    windows = [_tiles.Window.of(spans[0], sample)]
    for axis, span, start in zip(tiles, spans[2:], corner, strict=True):
        extent = axis.unit - 1 + (axis.line.k - 1) * axis.line.d
        windows.append(_tiles.Window.of(span, start, scale=axis.unit, offset=axis.line.offset, extent=extent))
    reach = (width.k - 1) * width.d
    windows.append(_tiles.Window(width.offset, width.out + reach, width.offset, width.offset))
    dim = 1 if channels_first else 4
    windows.insert(dim, _tiles.Window(block * channels, channels, 0, array.shape[dim] - channels))
    slab = _tiles.materialized(lambda: jnp.moveaxis(_read(array, windows, dtype), dim, -1), starts)
    depth, height = tiles
    rows = slab.shape[1] // depth.line.d, depth.line.d, slab.shape[2] // height.line.d, height.line.d
    slab = slab.reshape(slab.shape[0], *rows, *slab.shape[3:])
    found = []
    for first in _transformed(slab, 1, depth, spans[2].block):
        for part in _transformed(lax.optimization_barrier(first), 3, height, spans[3].block):
            part = lax.optimization_barrier(part)
            parts = [lax.slice_in_dim(part, t * width.d, t * width.d + width.out, axis=5) for t in range(width.k)]
            found.append(jnp.concatenate(parts, -1).reshape(-1, width.k * channels))
    return found


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


def _read(array: jax.Array, windows: Sequence[_tiles.Window], dtype: Any) -> jax.Array:
    return _tiles.values(_tiles.read(_tiles.bits(array), windows), array.dtype).astype(dtype)


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
    other: jax.Array, tiles: Sequence[Tiles], width: Line, spans: Any, starts: Any, channels: int, dtype: Any
) -> list[jax.Array]:
    """For every product ``(rows, O)``: A applied to the cotangents of a block of tiles, the transpose of `_sum_up`."""
    sample, block, *corner = starts
    windows = [_tiles.Window.of(spans[0], sample)]
    for axis, span, start in zip(tiles, spans[2:], corner, strict=True):
        windows.append(_tiles.Window.of(span, start, scale=axis.unit, extent=axis.unit - 1))
    windows.append(_tiles.Window(0, width.out, 0, 0))
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
