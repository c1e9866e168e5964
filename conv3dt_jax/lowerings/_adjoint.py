"""Both gradients of the matrix lowerings: the same geometry read backward, as a strided convolution.

    dx[i, c] = sum_{t, f} y[i * s + t * d - lo, f] w[t, f, c],
    dw[t, f, c] = sum_i x[i, c] y[i * s + t * d - lo, f].

Both need, for every input cell i, the patch of cotangents that it reached: ``P[i, (t, f)]``. Then ``dx = P w`` and
``dw = P^T x`` are plain matrix products. The patches are gathered block by block, and one gathering serves both.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from conv3dt_jax._geometry import Axis, Geometry
from conv3dt_jax.lowerings import _blocks, _depthwise, _side_by_side, _tiles
from conv3dt_jax.lowerings._work import Call, Work

SHORT_RUN = 3
"""Filters below which patches are stored tap by tap, since runs of so few values cannot be copied as blocks."""

ROWS, MORE = 1024, 2
"""Of the products in a block, shorter ones of which run at half the pace; for so many it may be that much larger, where
there is but one gradient to hold."""

SHORT_RUN_BYTES = 2 << 20
"""Of the largest temporary of a block there, on a CPU: both copies of the patches stay in the second-level caches."""


def gradients(
    inputs: jax.Array | None,
    kernel: jax.Array | None,
    cotangent: jax.Array,
    geometry: Geometry,
    channels: int,
    *,
    groups: int,
    channels_first: bool = False,
    **static: Any,
) -> tuple[jax.Array | None, jax.Array | None]:
    """The gradient for the inputs (where ``kernel`` is given) and for the kernel (where ``inputs`` is given).

    Args:
      inputs: ``(N, D, H, W, C)`` or None.
      kernel: ``(kd, kh, kw, F / G, C)`` or None.
      cotangent: ``(N, *out, F)``, or ``(N, F, *out)`` with ``channels_first``.
      geometry: of the form: n of the gradient for the inputs, out of the cotangent.
      channels: C.
      groups: G.
      precision: see `jax.lax.dot_general`.
      accumulate: dtype of the sums and of the results, unless an operand's is wider.
      tile_bytes: see `_tiles.plan`.
      result: dtype of the gradient for the inputs, where it is rounded at once.
      channels_first: whether the cotangent has the filters second.

    Returns:
      ``(N, D, H, W, C)`` or None, and ``(kd, kh, kw, F / G, C)`` or None.
    """
    static |= {"groups": groups, "channels_first": channels_first}
    least = _side_by_side.LEAST_FOR_KERNEL if kernel is None else 2
    r = _side_by_side.count(geometry, channels, cotangent.shape[1 if channels_first else 4], groups, least)
    if r == 1:
        return _gradients(inputs, kernel, cotangent, geometry, channels, **static)
    stride = geometry[2].s
    dx, dw = _gradients(
        None if inputs is None else _side_by_side.cells(inputs, r),
        None if kernel is None else _side_by_side.widened(kernel, r, stride),
        cotangent,
        _side_by_side.together(geometry, r),
        channels * r,
        **static,
        long_runs=True,
    )
    dx = None if dx is None else dx.reshape(dx.shape[0], *(axis.n for axis in geometry), channels)
    return dx, None if dw is None else _side_by_side.narrowed(dw, r, stride)


def _gradients(
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
    channels_first: bool,
    result: DTypeLike | None = None,
    long_runs: bool = False,
) -> tuple[jax.Array | None, jax.Array | None]:
    """`gradients`, cell by cell of the geometry; ``long_runs`` says that few filters make no short runs."""
    operands = [a for a in (inputs, kernel, cotangent) if a is not None]
    dtype, sums = _tiles.operand_dtype(accumulate, *operands), _tiles.widest(accumulate, *operands)
    dx_dtype = sums if result is None else result
    static: dict[str, Any] = {"precision": precision, "preferred_element_type": sums}
    filters_dim = 1 if channels_first else 4
    batch, filters = cotangent.shape[0], cotangent.shape[filters_dim]
    space = tuple(axis.n for axis in geometry)
    for dim, axis in enumerate(geometry, start=2 if channels_first else 1):
        if axis.wraps:
            cotangent = unwrap(cotangent, dim, axis)
    # beside the kernel's gradient there are patches anyway
    if kernel is not None and inputs is None and _depthwise.takes_gradient(geometry, channels, filters, groups):
        alone = _depthwise.input_gradient(
            cotangent, kernel, geometry, sums=sums, result=dx_dtype, channels_first=channels_first
        )
        return alone, None
    blocks = _blocks.count(groups, channels, filters)
    each_c, each_f = channels // blocks, filters // blocks
    turns = math.prod(geometry[dim].k for dim in _looped(geometry, each_f))
    columns = math.prod(axis.k for axis in geometry) * each_f // turns
    held = max(columns, math.prod(axis.s for axis in geometry) * each_f)
    transposed = each_f < SHORT_RUN and not long_runs
    if transposed and tile_bytes <= _tiles.LARGEST:
        tile_bytes = min(tile_bytes, SHORT_RUN_BYTES)
    elif inputs is None or kernel is None:
        tile_bytes = _room(tile_bytes, held * dtype.itemsize)
    spans = _tiles.plan((batch, blocks, *space), held * dtype.itemsize, tile_bytes)
    matrices = None
    if kernel is not None:
        order = _tap_order(geometry)
        matrices = _blocks.split_kernel(kernel.astype(dtype), groups).transpose(0, *(1 + t for t in order), 4, 5)
        matrices = matrices.reshape(blocks * turns, columns, each_c)
    turned = dtype.itemsize == 2 and not transposed

    held_inputs = None if inputs is None else _tiles.Held.of(inputs)
    held_cotangent = _tiles.Held.of(cotangent)

    def body(starts: list[Any], carry: tuple[Any, Any]) -> tuple[Any, Any]:
        sample, block, depth, height = starts
        slab = _slab(held_cotangent, spans, starts, geometry, each_f, filters_dim, dtype)
        corner = (sample, depth, height, 0, block * each_c)
        walked = (spans[0], *spans[2:])
        cells = (*(span.block for span in walked), space[2], each_c)
        x = None
        if held_inputs is not None:
            x = _tiles.values(held_inputs.cut(corner, cells), held_inputs.dtype).astype(dtype)
            x = _tiles.once(x, walked, (sample, depth, height), dims=(0, 1, 2)).reshape(-1, each_c)
            if turned:
                x = _tiles.turned(x, starts)

        def turn(index: Any, found: tuple[Any, Any]) -> tuple[Any, Any]:
            part, dw = found
            patches = _patches(slab, cells[:4], geometry, each_f, dtype, transposed, index)
            place = block * turns + index
            if matrices is not None:
                weights = lax.dynamic_index_in_dim(matrices, place, keepdims=False)
                more = lax.dot_general(patches, weights, (((int(not transposed),), (0,)), ((), ())), **static)
                part = more if turns == 1 else part + more
            if x is not None:
                if transposed:
                    more = lax.dot_general(patches, x, (((1,), (0,)), ((), ())), **static)
                else:  # the long side last: twice as fast as its transpose
                    more = lax.dot_general(x, patches, (((int(turned),), (0,)), ((), ())), **static)
                old = lax.dynamic_index_in_dim(dw, place, keepdims=False)
                dw = lax.dynamic_update_index_in_dim(dw, old + more, place, 0)
            return part, dw

        dx, dw = carry
        if turns == 1:
            part, dw = turn(0, (None, dw))
        else:
            part = None if matrices is None else jnp.zeros((math.prod(cells[:4]), each_c), sums)
            part, dw = lax.fori_loop(0, turns, turn, (part, dw))
        if part is not None:
            part = _tiles.bits(part.reshape(cells).astype(dx_dtype))
            dx = part if part.shape == dx.shape else _tiles.put(dx, part, corner)
        return dx, dw

    dx = None if matrices is None else _tiles.bits(jnp.zeros((batch, *space, channels), dx_dtype))
    shape = (columns, each_c) if transposed else (each_c, columns)
    dw = None if inputs is None else jnp.zeros((blocks * turns, *shape), sums)
    dx, dw = _tiles.for_each_tile(spans, body, (dx, dw))
    if dx is not None:
        dx = _tiles.values(dx, dx_dtype)
    if dw is not None:
        dw = dw if transposed else dw.swapaxes(1, 2)
        dw = _unorder(dw, geometry, each_f, each_c)
        dw = _blocks.join_kernel(dw, groups, filters, channels)
    return dx, dw


def _room(tile_bytes: int, cell_bytes: int) -> int:
    """Bytes of a block where there is but one gradient to hold."""
    if tile_bytes >= _tiles.LARGEST:
        return tile_bytes
    return max(tile_bytes, min(ROWS * cell_bytes, MORE * tile_bytes))


def rows(call: Call) -> int:
    """Of the products in a block, where one gradient is computed; at most all there are."""
    patch = math.prod(axis.k for axis in call.geometry) * call.filters * call.itemsize
    cells = call.batch * math.prod(axis.n for axis in call.geometry)
    return min(_room(call.tile_bytes, patch) // patch, cells)


def work(call: Call, gradients: int) -> Work:
    """The patches of all cells, twice (cut out, then side by side), and one or both products with them."""
    r = _side_by_side.count(call.geometry, call.channels, call.filters, call.groups)
    if r > 1:
        call = dataclasses.replace(call, geometry=_side_by_side.together(call.geometry, r), channels=call.channels * r)
    blocks = _blocks.count(call.groups, call.channels, call.filters)
    inputs = call.batch * math.prod(axis.n for axis in call.geometry)
    gathered = inputs * math.prod(axis.k for axis in call.geometry) * call.filters
    kernel = math.prod(axis.k for axis in call.geometry) * call.channels * call.filters // blocks
    room = min(2 * gathered * call.itemsize, 2 * call.tile_bytes)
    around = any(axis.wraps and (axis.lo, axis.full - axis.lo) != (0, axis.out) for axis in call.geometry)
    copied = call.batch * math.prod(axis.full if axis.wraps else axis.out for axis in call.geometry) * call.filters
    held = room + (2 * kernel + 2 * copied * around) * call.itemsize  # padded axis by axis
    return Work(gradients * gathered * call.channels // blocks, gathered, held)


def _steps(geometry: Geometry) -> int:
    """Steps of ``s`` outputs that hold the taps of a cell in width, where they are cut out step by step; else 0.

    They are where they lie side by side, with no taps of an axis without overlap in between.
    """
    width = geometry[2]
    alone = all(axis.overlaps or axis.k == 1 for axis in geometry[:2])
    count = -(-width.k // width.s)
    return count if alone and width.overlaps and width.d == 1 and width.s > 1 and count <= _tiles.MOST_SLICES else 0


def _looped(geometry: Geometry, filters: int) -> list[int]:
    """The dimensions whose taps are walked by a loop; of few filters only where they must be."""
    taps = [axis.k if axis.overlaps else 1 for axis in geometry]
    taps[2] = _steps(geometry) or taps[2]
    count = _tiles.looped(taps, _tiles.MOST_SLICES if filters < SHORT_RUN else _tiles.FEW_SLICES)
    return [dim for dim in range(count) if geometry[dim].overlaps]


def unwrap(cotangent: jax.Array, dim: int, axis: Axis) -> jax.Array:
    """The cotangent of the full result of a circular axis."""
    around = (axis.lo, max(axis.full - axis.lo - axis.out, 0))
    return cotangent if around == (0, 0) else lax.optimization_barrier(_tiles.wrapped(cotangent, dim, *around))


def _tap_order(geometry: Geometry) -> list[int]:
    """The kernel's axes as the patches hold them: those that overlap first, the others beside the filters."""
    return sorted(range(3), key=lambda dim: (not geometry[dim].overlaps, dim))


def _unorder(dw: jax.Array, geometry: Geometry, filters: int, channels: int) -> jax.Array:
    order = _tap_order(geometry)
    dw = dw.reshape(-1, *(geometry[dim].k for dim in order), filters, channels)
    return dw.transpose(0, *(1 + order.index(dim) for dim in range(3)), 4, 5)


def _slab(
    cotangent: _tiles.Held, spans: Any, starts: Any, geometry: Geometry, filters: int, filters_dim: int, dtype: Any
) -> jax.Array:
    """The outputs that the cells of a block have reached, of one block of filters: ``(n, D, H, W, taps * F)``.

    The taps of the axes without overlap, ``(n * s) -> (n, k)``, lie beside the filters.
    """
    sample, block, *corner = starts
    joined = _steps(geometry)
    axes = (*spans[2:], _tiles.Span(geometry[2].n, geometry[2].n))
    extents = [axis.ke - 1 if axis.overlaps else axis.s - 1 for axis in geometry]
    if joined:  # whole steps, whatever is read beyond the last tap
        extents[2] = geometry[2].s * joined - 1
    windows = [_tiles.Window.of(spans[0], sample)]
    for axis, span, start, extent in zip(geometry, axes, (*corner, 0), extents, strict=True):
        lo = 0 if axis.wraps else axis.lo
        windows.append(_tiles.Window.of(span, start, scale=axis.s, offset=-lo, extent=extent))
    many = cotangent.shape[filters_dim] - filters
    windows.insert(filters_dim, _tiles.Window(block * filters, filters, 0, many))
    slab = _tiles.read(cotangent, windows)
    if filters_dim == 1:  # once, not in every slice
        slab = _tiles.materialized(lambda: jnp.moveaxis(slab, 1, -1), starts)
    if cotangent.dtype != dtype:
        slab = _tiles.values(slab, cotangent.dtype).astype(dtype)
    shape: list[int] = [slab.shape[0]]
    for dim, (axis, size) in enumerate(zip(geometry, slab.shape[1:4], strict=True)):
        shape += [size, 1] if axis.overlaps and not (dim == 2 and joined) else [size // axis.s, axis.s]
    slab = slab.reshape(*shape, filters)
    for dim, axis in zip((2, 4, 6), geometry, strict=True):
        if not axis.overlaps:
            slab = lax.slice_in_dim(slab, 0, axis.ke, axis.d, dim)
    if slab.shape[2] * slab.shape[4] > _tiles.FEW_SLICES:
        slab = lax.optimization_barrier(slab.transpose(0, 1, 3, 5, 2, 4, 6, 7))
        return slab.reshape(*slab.shape[:4], -1)
    # copied in runs of the width's taps and filters, which a transposition would move one by one
    rows = [slab[:, :, i, :, j] for i in range(slab.shape[2]) for j in range(slab.shape[4])]
    rows = [row.reshape(*row.shape[:4], -1) for row in rows]
    return lax.optimization_barrier(jnp.concatenate(rows, -1) if len(rows) > 1 else rows[0])


def _patches(
    slab: jax.Array, cells: Sequence[int], geometry: Geometry, filters: int, dtype: Any, transposed: bool, index: Any
) -> jax.Array:
    """``(cells, taps * F)``, or its transpose: what every cell of a block has reached.

    By the taps of the overlapping axes, in width by steps of neighbours; of the axes in `_looped`, by those of the
    turn ``index`` alone.
    """
    width, joined, looped = geometry[2], _steps(geometry), _looped(geometry, filters)
    starts, sizes = [0] * 5, list(slab.shape)
    for dim in reversed(looped):
        axis = geometry[dim]
        starts[1 + dim] = index % axis.k * axis.d
        sizes[1 + dim] = (cells[1 + dim] - 1) * axis.s + 1
        index = index // axis.k
    slab = _tiles.cut(slab, starts, sizes) if looped else slab
    slices = [[(t * axis.d, axis.s) for t in range(axis.k)] if axis.overlaps else [(0, 1)] for axis in geometry]
    if joined:
        slices[2] = [(j, 1) for j in range(joined)]
    for dim in looped:
        slices[dim] = [(0, geometry[dim].s)]
    pieces = []
    for where in itertools.product(*slices):
        offsets, limits, strides = [0], [cells[0]], [1]
        for (offset, stride), count in zip(where, cells[1:], strict=True):
            offsets.append(offset)
            limits.append(offset + (count - 1) * stride + 1)
            strides.append(stride)
        last = min(width.s, width.k - where[2][0] * width.s) * filters if joined else slab.shape[-1]
        pieces.append(lax.slice(slab, (*offsets, 0), (*limits, last), (*strides, 1)))
    rows = math.prod(cells)
    if transposed:
        return _tiles.values(jnp.concatenate([piece.reshape(rows, -1).T for piece in pieces], 0), dtype)
    return _tiles.values(jnp.concatenate(pieces, -1).reshape(rows, -1), dtype)
