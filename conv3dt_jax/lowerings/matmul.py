"""`matmul`: every input times every tap in one matrix product, then the pieces are laid out and added.

    taps[i, t] = x[i] @ w[t],        y_full[i * s + t * d] += taps[i, t].

With ``t * d = block * s + residue`` the target is ``(i + block) * s + residue``: the taps of one block, ordered by
their residues, are ``s`` neighbours in the output, so a block is one reshape (depth to space) shifted by ``block * s``.
There are about ``k / s`` blocks; where the kernel is not longer than the stride there is one, and nothing overlaps.

Best where few outputs overlap or there are few filters: the temporary holds ``k`` values per input, axis and filter.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from conv3dt_jax._geometry import Axis, Geometry, tap_phases
from conv3dt_jax.lowerings import _adjoint, _blocks, _tiles
from conv3dt_jax.lowerings._cells import cells, shifts, span, walk
from conv3dt_jax.lowerings._contract import contract
from conv3dt_jax.lowerings._depth_to_space import depth_to_space
from conv3dt_jax.lowerings._result import Part
from conv3dt_jax.lowerings._transposes import transposes
from conv3dt_jax.lowerings._work import Call, Work

MANY_TERMS, UNSTRIDED = 12, 4
"""Products in an output from which on each costs more to lay out; without strides a fourth of them count."""

WHOLE = 20 << 20
"""Bytes of products up to which there are no blocks where products are few: a block copies its inputs first."""

REPEATED, KEPT = 2.0, 32 << 20
"""Products that blocks make for each that is needed, since they share their rims, beyond which there are no blocks
either; and the bytes of products up to which that is so: what the heap keeps, so that no page is new at a call."""


def refusal(geometry: Geometry, sums: DTypeLike) -> str | None:
    """Says why this lowering cannot take the geometry, or sums of this dtype; None where it can."""
    del geometry, sums
    return None


def is_elementwise(call: Call) -> bool:
    """Whether every output is one multiplication: XLA makes one pass of it, which holds nothing on the way."""
    return call.channels == call.groups and not any(axis.overlaps for axis in call.geometry)


def in_blocks(call: Call) -> bool:
    """Whether the products are too many to be made all at once."""
    if is_elementwise(call):
        return False
    products = math.prod(axis.k for axis in call.geometry) * call.filters
    held = products * call.batch * math.prod(axis.n for axis in call.geometry) * call.itemsize
    if products < call.channels or not any(axis.overlaps for axis in call.geometry):
        return held > max(call.tile_bytes, WHOLE)
    return held > call.tile_bytes and (held > KEPT or _repeated(call) <= REPEATED)


def _repeated(call: Call) -> float:
    """How many products blocks make for each that is needed: a block takes all the inputs that reach it."""
    blocks = _blocks.count(call.groups, call.channels, call.filters)
    batch, _, depth, height = _spans(
        call.geometry, call.batch, blocks, call.filters // blocks, call.itemsize, call.tile_bytes
    )
    width = cells(call.geometry[2])
    made = batch.count * batch.block
    for cut, axis in zip((depth, height, _tiles.Span(width, width)), call.geometry, strict=True):
        made *= cut.count * (cut.block + span(axis))
    return made / max(call.batch * math.prod(axis.n for axis in call.geometry), 1)


def _spans(
    geometry: Geometry, batch: Any, blocks: int, filters: int, itemsize: int, tile_bytes: int
) -> tuple[_tiles.Span, ...]:
    """Blocks of cells, by the products that they take, for ``filters`` of one of the ``blocks`` of groups."""
    largest = max(math.prod(axis.k for axis in geometry), math.prod(axis.s for axis in geometry))
    return _tiles.plan((batch, blocks, *map(cells, geometry)), largest * filters * itemsize, tile_bytes)


def work(call: Call, *, gradients: int) -> Work:
    """One product for every input, tap and filter, each laid out and added; a transposed copy, and the sums so far."""
    inputs = call.batch * math.prod(axis.n for axis in call.geometry)
    products = inputs * math.prod(axis.k for axis in call.geometry) * call.filters
    multiply_adds = products * call.channels // call.groups
    values, held = products * _laid_out(call.geometry), products * call.itemsize
    if is_elementwise(call) and not gradients:
        return Work(multiply_adds, products, 0)
    if gradients:
        return Work(gradients * multiply_adds, int(gradients * values), 3 * held)
    if in_blocks(call):
        held, more = min(held, call.tile_bytes), _repeated(call)
        return Work(int(multiply_adds * more), int(values * more), 3 * held)
    return Work(multiply_adds, int(values), 3 * held)


def _laid_out(geometry: Geometry) -> float:
    """What laying out a product costs, in products that few others are added to."""
    terms = math.prod(len({block for block, _ in tap_phases(axis)}) for axis in geometry)
    many = MANY_TERMS * (UNSTRIDED if all(axis.s == 1 for axis in geometry) else 1)
    return max(1.0, terms / many)


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
    batch = inputs.shape[0] if isinstance(inputs.shape[0], int) else 1
    sizes = (inputs.shape[-1], kernel.shape[3] * groups, groups, jnp.dtype(accumulate).itemsize, tile_bytes)
    if all(isinstance(axis.out, int) for axis in geometry) and in_blocks(Call(geometry, batch, *sizes)):
        return _by_block(inputs, kernel, geometry, groups, precision, accumulate, tile_bytes, result, bias)
    *space, channels = inputs.shape
    *window, filters, _ = kernel.shape
    if inputs.dtype != kernel.dtype:
        inputs, kernel = (a.astype(_tiles.widest(accumulate, inputs, kernel)) for a in (inputs, kernel))
    pieces = inputs.reshape(*space, 1, groups, channels // groups)
    weights = kernel.reshape(-1, filters, groups, channels // groups).transpose(2, 3, 0, 1)[None]
    taps = contract(pieces, weights, precision=precision, accumulate=accumulate)
    outputs = _lay_out(taps.reshape(*space, *window, groups * filters), geometry)
    return _tiles.plus(outputs, bias)


def _by_block(
    inputs: jax.Array,
    kernel: jax.Array,
    geometry: Geometry,
    groups: int,
    precision: lax.PrecisionLike,
    accumulate: DTypeLike,
    tile_bytes: int,
    result: DTypeLike | None,
    bias: jax.Array | None,
) -> jax.Array:
    """The same for one block of cells after the other; where blocks meet, a few products are made twice."""
    dtype, sums = _tiles.operand_dtype(accumulate, inputs, kernel), _tiles.widest(accumulate, inputs, kernel)
    result = sums if result is None else result
    *window, filters, channels = kernel.shape
    filters *= groups
    blocks = _blocks.count(groups, channels, filters)
    matrices = _blocks.split_kernel(kernel.astype(dtype), groups).reshape(blocks, -1, channels // blocks)
    spans = _spans(geometry, inputs.shape[0], blocks, filters // blocks, sums.itemsize, tile_bytes)
    axes = (spans[2].block, spans[3].block, None)
    depth, height, width = map(_local, geometry, axes)
    local = (depth, height, width)
    done = bias is None and not any(axis.overlaps for axis in geometry)  # nothing to add: round what the product gives

    def compute(slab: jax.Array, group: Any, starts: Sequence[Any]) -> list[Part]:
        matrix = lax.dynamic_index_in_dim(matrices, group, keepdims=False)
        contract = (((4,), (1,)), ((), ()))
        slab = _tiles.values(slab, dtype)
        taps = lax.dot_general(slab, matrix, contract, precision=precision, preferred_element_type=sums)
        if done:
            taps = _rounded(taps, result, starts)
        outputs = _lay_out(taps.reshape(*taps.shape[:4], *window, filters // blocks), local)
        if not done:
            outputs = _tiles.bits(_tiles.plus(outputs, bias, group * (filters // blocks)).astype(result))
        shape = (spans[0].block, spans[2].block, geometry[0].s, spans[3].block, geometry[1].s)
        return [(outputs.reshape(*shape, *outputs.shape[3:]), (0, 0))]

    return walk(inputs, geometry, 0, filters, blocks, spans, dtype, result, compute, bias)


def _rounded(taps: jax.Array, result: DTypeLike, starts: Sequence[Any]) -> jax.Array:
    """Rounds by two threads, in a pass of its own: what is fused into a write in place runs in one."""
    if taps.dtype == result:
        return taps
    return _tiles.materialized(lambda: _tiles.bits(taps.astype(result)), starts)


def _local(axis: Axis, block: int | None) -> Axis:
    """The axis as a block of cells sees it, whose inputs begin ``max(a)`` before it; all cells, where None."""
    length = cells(axis) if block is None else block
    out = axis.out if block is None else block * axis.s
    return Axis(length + span(axis), axis.k, axis.s, axis.d, axis.lo + shifts(axis)[-1] * axis.s, out)


def _lay_out(taps: jax.Array, geometry: Geometry) -> jax.Array:
    """``(N, D, H, W, kd, kh, kw, F)`` to ``(N, *out, F)``: every product to its place."""
    taps = taps.transpose(0, 1, 4, 2, 5, 3, 6, 7)  # each axis beside its taps
    for dim, axis in enumerate(geometry, start=1):
        taps = _overlap_add(taps, dim, axis)
    return taps


def gradients(
    inputs: jax.Array | None,
    kernel: jax.Array | None,
    cotangent: jax.Array,
    geometry: Geometry,
    channels: int,
    **static: Any,
) -> tuple[jax.Array | None, jax.Array | None]:
    """The transposes of `outputs`, as JAX finds them, which transposes no integers; see `_adjoint.gradients`."""
    if not jnp.issubdtype(static["accumulate"], jnp.inexact):
        return _adjoint.gradients(inputs, kernel, cotangent, geometry, channels, **static)
    if cotangent.dtype.itemsize == 2:  # the transposes of blocks are summed in the dtype of what they are blocks of
        sums = static["accumulate"]
        cotangent = cotangent.astype(sums)
        inputs, kernel = (a if a is None else a.astype(sums) for a in (inputs, kernel))
    return transposes(outputs, inputs, kernel, cotangent, geometry, channels, **static)


def _overlap_add(taps: jax.Array, dim: int, axis: Axis) -> jax.Array:
    """Turns the axes ``(n, k)`` at ``dim`` into one of length ``out``.

    The taps of a block are consecutive. They are split off all at once: the transpose of a split is one concatenation,
    where that of a slice is a pad to the full size, as many times as there are blocks.
    """
    blocks = [list(group) for _, group in itertools.groupby(tap_phases(axis), key=lambda phase: phase[0])]
    pieces = []
    for phases, chunk in zip(blocks, lax.split(taps, [len(b) for b in blocks], dim + 1), strict=True):
        cells = depth_to_space(chunk, dim, [residue for _, residue in phases], axis.s)
        pieces.append(_shift(cells, dim, axis, phases[0][0] * axis.s))
    return functools.reduce(jnp.add, pieces)


def _shift(piece: jax.Array, dim: int, axis: Axis, offset: int) -> jax.Array:
    """Moves ``piece`` to ``offset`` in the full result and cuts the window ``[lo, lo + out)`` out of it."""
    if axis.wraps:
        return jnp.roll(piece, offset - axis.lo, dim)
    low = offset - axis.lo
    padding = [(0, 0, 0)] * piece.ndim
    padding[dim] = (low, axis.out - low - axis.n * axis.s, 0)
    return lax.pad(piece, jnp.zeros((), piece.dtype), padding)
