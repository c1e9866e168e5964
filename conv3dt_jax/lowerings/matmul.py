"""`matmul`: every input times every tap in one matrix product, then the pieces are laid out and added.

    taps[i, t] = x[i] @ w[t],        y_full[i * s + t * d] += taps[i, t].

With ``t * d = block * s + residue`` the target is ``(i + block) * s + residue``: the taps of one block, ordered by
their residues, are ``s`` neighbours in the output, so a block is one reshape (depth to space) shifted by ``block * s``.
There are about ``k / s`` blocks; where the kernel is not longer than the stride there is one, and nothing overlaps.

Small volumes under large kernels are multiplied row by row of the kernel instead (`_kernel_rows`), and products that
would leave the cache are made block by block of the result.

Best where few outputs overlap, there are few filters, or the kernel is the larger operand: the temporary holds ``k``
values per input, axis and filter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from conv3dt_jax._geometry import Axis, Geometry, tap_phases
from conv3dt_jax.lowerings import _adjoint, _blocks, _kernel_rows, _tiles
from conv3dt_jax.lowerings._cells import cells, shifts, span, walk
from conv3dt_jax.lowerings._laid_out import lay_out
from conv3dt_jax.lowerings._origin import AS_GIVEN, Origin
from conv3dt_jax.lowerings._result import Part
from conv3dt_jax.lowerings._transposes import transposes
from conv3dt_jax.lowerings._work import Call, Work

MANY_TERMS, UNSTRIDED = 12, 4
"""Products in an output from which on each costs more to lay out; without strides a fourth of them count."""

WHOLE, WHOLE_ROWS = 20 << 20, 8 << 20
"""Bytes of products up to which there are no blocks where there is little to lay out, since a block copies its inputs
first; and where blocks write the rows of their products as they are."""

REPEATED, KEPT = 2.0, 32 << 20
"""Products that blocks make for each that is needed, since they share their rims, beyond which there are no blocks
either; and the bytes of products up to which that is so: what the heap keeps, so that no page is new at a call."""

LEAST_COLUMNS, LEAST_CELLS, MOST_ROWS = 32, 64, _tiles.FEW_SLICES
"""Of a product for a row of the kernel: narrower ones are slow, shorter ones are no more than a copy of the kernel's
row, and each is compiled."""

LONG_ROWS, FEW_ROWS = 128, 4
"""Values of a cell's row, and rows of a cell, where blocks write the rows of their products as they are."""

OPERANDS = 4
"""`tile_bytes` in the bytes of operands and result: as much may the products of all rows hold, and a block at least."""

IN_CACHE, WRITTEN, FOLDED = 0.3, 2.0, 0.6
"""What a product costs within a block, a value that a block writes, and a product for each axis beyond the first along
which it is added to others, in values that leave the cache."""

GROUPED, MOVED, WALKED = 2.2, 1.4, 1.15
"""What a product of a group costs, and an input that is moved to its group, likewise; how much more blocks cost that
walk groups too."""


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
    held = _held(call)
    if products < call.channels or sum(axis.overlaps for axis in call.geometry) <= 1:  # little to lay out
        return held > max(call.tile_bytes, WHOLE_ROWS if _rows_apart(call) else WHOLE)
    if by_rows(call) and held <= max(OPERANDS * call.tile_bytes, _tiles.LARGEST):
        return False
    return held > call.tile_bytes and (held > KEPT or _repeated(call) <= REPEATED)


def by_rows(call: Call) -> bool:
    """Whether there is a product for each row of the kernel, where there are no blocks; on a CPU."""
    depth, height, width = call.geometry
    if call.tile_bytes > _tiles.LARGEST or call.groups > 1 or depth.wraps or height.wraps:
        return False
    if not all(isinstance(axis.out, int) for axis in call.geometry):
        return False
    cells = call.batch * math.prod(axis.n for axis in call.geometry)
    wide = width.k > 1 and width.k * call.filters >= LEAST_COLUMNS
    adds = depth.overlaps or height.overlaps
    few = max(depth.k * height.k, depth.s * height.s) <= MOST_ROWS
    return adds and wide and few and cells >= LEAST_CELLS


def _rows_apart(call: Call) -> bool:
    """Whether a block has a product for each row of the kernel, which is a row of the result as it is."""
    depth, height, width = call.geometry
    as_it_is = all(shifts(axis) == [0] and not axis.overlaps for axis in call.geometry) and width.k == width.s
    filters = call.filters // _blocks.count(call.groups, call.channels, call.filters)
    return as_it_is and width.k * filters >= LONG_ROWS and depth.k * height.k <= FEW_ROWS


def _held(call: Call) -> int:
    """Bytes of all products."""
    inputs = call.batch * math.prod(axis.n for axis in call.geometry)
    return inputs * math.prod(axis.k for axis in call.geometry) * call.filters * call.itemsize


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
    """A product for every input, tap and filter, each laid out and added; the kernel, as it is read.

    Temporaries: a transposed copy, and the sums so far.
    """
    cells = call.batch * math.prod(axis.n for axis in call.geometry) * math.prod(axis.k for axis in call.geometry)
    products, held = cells * call.filters, _held(call)
    kernel = math.prod(axis.k for axis in call.geometry) * call.filters * call.channels // call.groups
    multiply_adds = products * call.channels // call.groups
    laid_out = products * _laid_out(call.geometry)
    if is_elementwise(call) and not gradients:
        return Work(multiply_adds, products, 0)
    if gradients:
        return Work(gradients * multiply_adds, int(gradients * laid_out), 3 * held)
    written = call.batch * math.prod(axis.out for axis in call.geometry) * call.filters
    if in_blocks(call):
        held, more = min(held, call.tile_bytes), _repeated(call)
        values = (IN_CACHE * laid_out * more + WRITTEN * written) * (WALKED if call.groups > 1 else 1)
        return Work(int(multiply_adds * more), int(values), 3 * held)
    if by_rows(call):
        kept = call.batch * _kernel_rows.kept(call.geometry) * call.filters
        return Work(kept * call.channels, kept + kernel, 2 * held + kernel * call.itemsize)
    if call.groups > 1:
        moved = call.batch * math.prod(axis.n for axis in call.geometry) * call.channels
        return Work(multiply_adds, int(GROUPED * laid_out + MOVED * moved) + kernel, 3 * held)
    added = sum(axis.overlaps for axis in call.geometry)
    values = written + FOLDED * max(added - 1, 0) * laid_out + kernel
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
    origin: Origin = AS_GIVEN,
) -> jax.Array:
    """``(N, D, H, W, C)`` and ``(kd, kh, kw, F / groups, C)`` to ``(N, *out, F)``, of dtype ``result``.

    The kernel is taken as it lies, by its ``origin``.
    """
    batch = inputs.shape[0] if isinstance(inputs.shape[0], int) else 1
    sizes = (inputs.shape[-1], kernel.shape[3] * groups, groups, jnp.dtype(accumulate).itemsize, tile_bytes)
    call = Call(geometry, batch, *sizes)
    if all(isinstance(axis.out, int) for axis in geometry) and in_blocks(call):
        return _by_block(inputs, kernel, geometry, groups, precision, accumulate, tile_bytes, result, bias)
    if inputs.dtype != kernel.dtype:
        inputs, kernel = (a.astype(_tiles.widest(accumulate, inputs, kernel)) for a in (inputs, kernel))
    static: dict[str, Any] = {"precision": precision, "accumulate": accumulate}
    on_cpu = tile_bytes <= _tiles.LARGEST
    if groups > 1:
        taps = _of_groups(inputs, kernel, groups, **static)
        return _tiles.plus(lay_out(taps, geometry, phase_by_phase=on_cpu), bias)
    kernel = origin.restored(kernel)
    static["origin"] = origin
    if by_rows(call):
        return _tiles.plus(_kernel_rows.outputs(inputs, kernel, geometry, **static), bias)
    taps = _kernel_rows.every_tap(inputs, kernel, **static)
    return _tiles.plus(lay_out(taps, geometry, phase_by_phase=on_cpu), bias)


def _of_groups(
    inputs: jax.Array, kernel: jax.Array, groups: int, *, precision: lax.PrecisionLike, accumulate: DTypeLike
) -> jax.Array:
    """``(N, D, H, W, kd, kh, kw, F)``: the inputs times all taps, group by group."""
    *space, channels = inputs.shape
    *window, filters, _ = kernel.shape
    each = channels // groups
    if each == 1:  # nothing to sum: a product that fuses with what follows
        pieces = inputs.reshape(*space, 1, groups, 1).astype(accumulate)
        weights = kernel.reshape(-1, filters, groups).swapaxes(1, 2).astype(accumulate)
        taps = pieces * weights.reshape(1, 1, 1, 1, *weights.shape)
    else:
        pieces, weights = inputs.reshape(*space, groups, each), kernel.reshape(-1, filters, groups, each)
        sums: dict[str, Any] = {"precision": precision, "preferred_element_type": accumulate}
        taps = jnp.einsum("nxyzgc,tfgc->nxyztgf", pieces, weights, **sums)
    return taps.reshape(*space, *window, groups * filters)


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
    each = filters // blocks
    matrices = _blocks.split_kernel(kernel.astype(dtype), groups).reshape(blocks, -1, channels // blocks)
    spans = _spans(geometry, inputs.shape[0], blocks, each, sums.itemsize, tile_bytes)
    depth, height, width = map(_local, geometry, (spans[2].block, spans[3].block, None))
    steps, places = [axis.s for axis in geometry[:2]], [(0, 0)]
    if _rows_apart(Call(geometry, 1, channels, filters, groups, sums.itemsize, tile_bytes)):
        places = [(d * geometry[0].d, h * geometry[1].d) for d in range(window[0]) for h in range(window[1])]
        depth, height = (Axis(span.block, 1, 1, 1, 0, span.block) for span in spans[2:])
        steps, window = [1, 1], [1, 1, window[2]]
    done = bias is None and not any(axis.overlaps for axis in geometry)  # nothing to add: round what the product gives

    def compute(slab: jax.Array, group: Any, starts: Sequence[Any]) -> list[Part]:
        matrix = lax.dynamic_index_in_dim(matrices, group, keepdims=False)
        contract = (((4,), (1,)), ((), ()))
        slab = _tiles.values(slab, dtype)
        parts = []
        for place, rows in zip(places, jnp.split(matrix, len(places)), strict=True):
            taps = lax.dot_general(slab, rows, contract, precision=precision, preferred_element_type=sums)
            if done:
                taps = _rounded(taps, result, starts)
            outputs = lay_out(taps.reshape(*taps.shape[:4], *window, each), (depth, height, width), phase_by_phase=True)
            if not done:
                outputs = _tiles.bits(_tiles.plus(outputs, bias, group * each).astype(result))
            shape = (spans[0].block, spans[2].block, steps[0], spans[3].block, steps[1])
            parts.append((outputs.reshape(*shape, *outputs.shape[3:]), place))
        return parts

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
