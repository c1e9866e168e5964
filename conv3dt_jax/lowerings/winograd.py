"""`winograd`: stride 1 with three taps in height (and one or three in depth), with a third of the multiplications.

Without strides the result is a correlation of the inputs with the flipped kernel. In depth two outputs at a time, in
height four, take 4 and 6 products instead of 6 and 12 (`_minimal`); the taps in width lie side by side. Both gradients
follow the same way: the one for the inputs is a correlation of the cotangent with the kernel, and the one for the
kernel is the transpose of that in the kernel, so one transformed cotangent serves both.

Rounding: the sums and differences of inputs cost accuracy, in float32 a factor of 1.3 to 3.8 on the root mean square
error of the direct sum (`python -m benchmarks.accuracy`). A non-finite input reaches all outputs of its tiles.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from conv3dt_jax._geometry import Axis, Geometry
from conv3dt_jax.lowerings import _blocks, _minimal, _tiles
from conv3dt_jax.lowerings._minimal import combine
from conv3dt_jax.lowerings._work import Call, Work

DEPTH = {1: _minimal.NONE, 3: _minimal.F23}
HEIGHT = {3: _minimal.F43}
"""The algorithm for so many taps."""

TRANSFORM = 8
"""What a value of a transformed kernel costs, in values of transformed inputs."""


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


def refusal(geometry: Geometry, sums: DTypeLike) -> str | None:
    """Says why this lowering cannot take the geometry, or sums of this dtype; None where it can."""
    if not jnp.issubdtype(sums, jnp.inexact):
        return f"it multiplies with fractions, which {jnp.dtype(sums).name} does not hold"
    if not all(isinstance(axis.out, int) for axis in geometry):
        return "it cuts the input into tiles and needs spatial sizes that are known when it is traced"
    if any(axis.s > 1 or axis.wraps for axis in geometry):
        return "it is for strides of 1 and no circular padding"
    if geometry[0].k not in DEPTH or geometry[1].k not in HEIGHT:
        return "it is for kernels of 1 or 3 in depth and 3 in height"
    return None


def work(call: Call, *, gradient: bool) -> Work:
    """The transformed inputs and the products, and the multiply-adds of what the tiles hold."""
    lines = [(Line.adjoint if gradient else Line.forward)(axis) for axis in call.geometry]
    depth, height = _tiles_of(lines)
    width = lines[2]
    rows = call.batch * depth.count * depth.line.d * height.count * height.line.d * width.out
    products = depth.algorithm.products * height.algorithm.products
    blocks = _blocks.count(call.groups, call.channels, call.filters)
    inner, outer = (call.filters, call.channels) if gradient else (call.channels, call.filters)
    times = 2 if gradient else 1
    patches = rows * products * width.k * inner
    matrices = products * width.k * inner * outer // blocks
    turns = -(-patches * call.itemsize // (2 * call.tile_bytes))
    values = patches + times * (rows * products * outer + matrices * (TRANSFORM + turns))
    room = min(patches * call.itemsize, 2 * call.tile_bytes)
    multiply_adds = times * rows * products * width.k * inner * outer // blocks
    return Work(multiply_adds, values, room + 2 * matrices * call.itemsize)


def outputs(
    inputs: jax.Array,
    kernel: jax.Array,
    geometry: Geometry,
    *,
    groups: int,
    precision: lax.PrecisionLike,
    accumulate: DTypeLike,
    tile_bytes: int,
    result: DTypeLike | None = None,
    bias: jax.Array | None = None,
) -> jax.Array:
    """``(N, D, H, W, C)`` and ``(kd, kh, kw, F / groups, C)`` to ``(N, *out, F)``, of dtype ``result``."""
    dtype = _tiles.widest(accumulate, inputs, kernel)
    taps = jnp.flip(_blocks.split_kernel(kernel.astype(dtype), groups), (1, 2, 3)).swapaxes(4, 5)
    taps = lax.optimization_barrier(taps)  # transposed once, not in every sum of `_matrices`
    lines = [Line.forward(axis) for axis in geometry]
    result = dtype if result is None else result
    found, _ = _correlate(
        inputs, taps, None, lines, kernel.shape[3] * groups, taps.shape[0], dtype, precision, tile_bytes, result, bias
    )
    assert found is not None
    return found


def gradients(
    inputs: jax.Array | None,
    kernel: jax.Array | None,
    cotangent: jax.Array,
    geometry: Geometry,
    channels: int,
    *,
    groups: int,
    precision: lax.PrecisionLike,
    accumulate: DTypeLike,
    tile_bytes: int,
    result: DTypeLike | None = None,
) -> tuple[jax.Array | None, jax.Array | None]:
    """See `_adjoint.gradients`."""
    filters = cotangent.shape[-1]
    dtype = _tiles.widest(accumulate, cotangent, *(a for a in (inputs, kernel) if a is not None))
    blocks = _blocks.count(groups, channels, filters)
    taps = None if kernel is None else _blocks.split_kernel(kernel.astype(dtype), groups)
    lines = [Line.adjoint(axis) for axis in geometry]
    result = dtype if result is None else result
    dx, dw = _correlate(cotangent, taps, inputs, lines, channels, blocks, dtype, precision, tile_bytes, result)
    if dw is not None:
        dw = _blocks.join_kernel(dw, groups, filters, channels)
    return dx, dw


def _tiles_of(lines: Sequence[Line]) -> tuple[Tiles, Tiles]:
    return Tiles(lines[0], DEPTH[lines[0].k]), Tiles(lines[1], HEIGHT[lines[1].k])


def _correlate(
    array: jax.Array,
    taps: jax.Array | None,
    other: jax.Array | None,
    lines: Sequence[Line],
    channels: int,
    blocks: int,
    dtype: Any,
    precision: lax.PrecisionLike,
    tile_bytes: int,
    result: DTypeLike,
    bias: jax.Array | None = None,
) -> tuple[jax.Array | None, jax.Array | None]:
    """The correlation of ``array`` with ``taps``, and its gradient for the taps where ``other`` is the cotangent.

    Args:
      array: ``(N, D, H, W, I)``.
      taps: ``(B, kd, kh, kw, I / B, O / B)`` or None.
      other: ``(N, *out, O)`` or None.
      lines: the axes.
      channels: O.
      blocks: B.
      dtype: of the sums.
      precision: see `jax.lax.dot_general`.
      tile_bytes: see `_tiles.plan`.
      result: dtype of the correlation.
      bias: ``(O,)``, added to it.

    Returns:
      ``(N, *out, O)`` or None, and ``(B, kd, kh, kw, I / B, O / B)`` or None.
    """
    depth, height = tiles = _tiles_of(lines)
    width = lines[2]
    batch, each_i, each_o = array.shape[0], array.shape[-1] // blocks, channels // blocks
    products = depth.algorithm.products * height.algorithm.products
    matrices = None if taps is None else _matrices(taps, tiles)
    cell_bytes = products * depth.line.d * height.line.d * width.k * each_i * dtype.itemsize
    spans = _tiles.plan((batch, blocks, depth.count, height.count, width.out), cell_bytes, 2 * tile_bytes)
    space = (depth.count, depth.algorithm.outputs, depth.line.d, height.count, height.algorithm.outputs, height.line.d)

    def body(starts: list[Any], carry: tuple[Any, Any]) -> tuple[Any, Any]:
        sample, block, d, h = starts
        found, sums = carry
        patches = _patches(array, tiles, width, spans, starts, each_i, dtype)
        if matrices is not None:
            weights = [lax.dynamic_index_in_dim(matrix, block, keepdims=False) for matrix in matrices]
            made = [lax.dot(p, w, precision=precision) for p, w in zip(patches, weights, strict=True)]
            shape = (spans[0].block, spans[2].block, depth.line.d, spans[3].block, height.line.d, width.out, each_o)
            for (p, q), part in _sum_up([m.reshape(shape) for m in made], tiles).items():
                part = _tiles.bits(_tiles.plus(part, bias, block * each_o).astype(result))
                place = (sample, d, p, 0, h, q, 0, 0, block * each_o)
                found = _tiles.put(found, jnp.expand_dims(part, (2, 5)), place)
        if other is not None:
            spread = _spread(other, tiles, width, spans, starts, each_o, dtype)
            contract = (((0,), (0,)), ((), ()))
            parts = [lax.dot_general(s, p, contract, precision=precision) for s, p in zip(spread, patches, strict=True)]
            old = lax.dynamic_index_in_dim(sums, block, keepdims=False)
            sums = lax.dynamic_update_index_in_dim(sums, old + jnp.stack(parts), block, 0)
        return found, sums

    found = None if taps is None else _tiles.bits(jnp.zeros((batch, *space, width.out, channels), result))
    sums = None if other is None else jnp.zeros((blocks, products, each_o, width.k * each_i), dtype)
    found, sums = _tiles.for_each_tile(spans, body, (found, sums))
    if found is not None:
        found = _tiles.values(found, result)
        found = found.reshape(batch, math.prod(space[:3]), math.prod(space[3:]), width.out, channels)
        found = found[:, : depth.line.out, : height.line.out]
    if sums is not None:
        sums = _taps(sums.reshape(blocks, products, each_o, width.k, each_i), tiles)
    return found, sums


def _patches(
    array: jax.Array, tiles: Sequence[Tiles], width: Line, spans: Any, starts: Any, channels: int, dtype: Any
) -> list[jax.Array]:
    """For every product ``(rows, kw * I)``: the transformed inputs of a block of tiles."""
    sample, block, *corner = starts
    windows = [_tiles.Window.of(spans[0], sample)]
    for axis, span, start in zip(tiles, spans[2:], corner, strict=True):
        extent = axis.unit - 1 + (axis.line.k - 1) * axis.line.d
        windows.append(_tiles.Window.of(span, start, scale=axis.unit, offset=axis.line.offset, extent=extent))
    reach = (width.k - 1) * width.d
    windows.append(_tiles.Window(width.offset, width.out + reach, width.offset, width.offset))
    windows.append(_tiles.Window(block * channels, channels, 0, array.shape[-1] - channels))
    slab = _materialized(lambda: _read(array, windows, dtype), windows)
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


def _materialized(read: Callable[[], jax.Array], windows: Sequence[_tiles.Window]) -> jax.Array:
    """Reads once: XLA:CPU would fuse the read, with its bounds, into every transform of a block, at twice the cost.

    It fuses across optimization barriers, but not into the branches of a conditional.
    """
    starts = [window.start for window in windows if not isinstance(window.start, int)]
    if not starts:
        return read()
    return lax.cond(starts[0] > jnp.iinfo(jnp.int32).min, read, lambda: jnp.zeros_like(read()))


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
