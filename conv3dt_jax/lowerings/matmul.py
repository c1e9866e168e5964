"""`matmul`: every input times every tap in one matrix product, then the pieces are laid out and added.

    taps[i, t] = x[i] @ w[t],        y_full[i * s + t * d] += taps[i, t].

With ``t * d = block * s + residue`` the target is ``(i + block) * s + residue``: the taps of one block, ordered by
their residues, are ``s`` neighbours in the output, so a block is one reshape (depth to space) shifted by ``block * s``.
There are about ``k / s`` blocks; where the kernel is not longer than the stride there is one, and nothing overlaps.

Small volumes under large kernels are multiplied row by row or tap by tap of the kernel instead (`_kernel_rows`), and
products that would leave the cache are made block by block: of whole samples (`_samples`), or of the result. With the
filters second planes and lines are made as such (`_planes`). Which of these is for `_matmul_plans` to say.

Best where few outputs overlap, there are few filters, or the kernel is the larger operand: the temporary holds ``k``
values per input, axis and filter.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from conv3dt_jax._geometry import Axis, Geometry
from conv3dt_jax.lowerings import (
    _adjoint,
    _blocks,
    _kernel_rows,
    _matmul_plans,
    _matmul_work,
    _planes,
    _products,
    _samples,
    _tiles,
)
from conv3dt_jax.lowerings._cells import cells, shifts, span, walk
from conv3dt_jax.lowerings._laid_out import lay_out
from conv3dt_jax.lowerings._origin import AS_GIVEN, Origin
from conv3dt_jax.lowerings._result import Part
from conv3dt_jax.lowerings._transposes import transposes
from conv3dt_jax.lowerings._work import Call

work = _matmul_work.work


def refusal(geometry: Geometry, sums: DTypeLike) -> str | None:
    """Says why this lowering cannot take the geometry, or sums of this dtype; None where it can."""
    del geometry, sums
    return None


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
    transposed: bool = False,
    channels_first: bool = False,
) -> jax.Array:
    """``(N, D, H, W, C)`` and ``(kd, kh, kw, F / groups, C)`` to ``(N, *out, F)``, of dtype ``result``.

    The kernel is taken as it lies, by its ``origin``. With ``transposed`` the transpose is what is asked for; with
    ``channels_first`` the result has the filters second.
    """
    on_cpu = tile_bytes <= _tiles.LARGEST
    product = _products.on_cpu if on_cpu and not transposed else _products.plain
    batch = inputs.shape[0] if isinstance(inputs.shape[0], int) else 1
    sizes = (inputs.shape[-1], kernel.shape[3] * groups, groups, jnp.dtype(accumulate).itemsize, tile_bytes)
    call = Call(geometry, batch, *sizes, channels_first=channels_first)
    if isinstance(inputs.shape[0], int) and _matmul_plans.by_planes(call):
        result = _tiles.widest(accumulate, inputs, kernel) if result is None else result
        static: dict[str, Any] = {"precision": precision, "accumulate": accumulate, "result": result}
        spans, runs = _matmul_plans.plane_spans(call), _matmul_plans.in_runs(call)
        return _planes.outputs(inputs, kernel, geometry, spans, bias=bias, origin=origin, in_runs=runs, **static)
    found = _filters_last(inputs, kernel, call, product, precision, accumulate, result, bias, origin)
    return jnp.moveaxis(found, -1, 1) if channels_first else found


def _filters_last(
    inputs: jax.Array,
    kernel: jax.Array,
    call: Call,
    product: _products.Product,
    precision: lax.PrecisionLike,
    accumulate: DTypeLike,
    result: DTypeLike | None,
    bias: jax.Array | None,
    origin: Origin,
) -> jax.Array:
    geometry, groups, tile_bytes = call.geometry, call.groups, call.tile_bytes
    on_cpu = tile_bytes <= _tiles.LARGEST
    if all(isinstance(axis.out, int) for axis in geometry) and _matmul_plans.in_blocks(call):
        if _matmul_plans.by_samples(call):
            result = _tiles.widest(accumulate, inputs, kernel) if result is None else result
            span = _matmul_plans.samples(call)
            rest: dict[str, Any] = {"accumulate": accumulate, "result": result, "bias": bias}
            return _samples.outputs(inputs, kernel, geometry, span, product, precision=precision, **rest)
        return _by_block(inputs, kernel, geometry, groups, product, precision, accumulate, tile_bytes, result, bias)
    if inputs.dtype != kernel.dtype:
        inputs, kernel = (a.astype(_tiles.widest(accumulate, inputs, kernel)) for a in (inputs, kernel))
    static: dict[str, Any] = {"precision": precision, "accumulate": accumulate}
    if groups > 1:
        taps = _of_groups(inputs, kernel, groups, **static)
        return _tiles.plus(lay_out(taps, geometry, phase_by_phase=on_cpu), bias)
    kernel = origin.restored(kernel)
    static["origin"] = origin
    if _matmul_plans.one_by_one(call, origin):
        return _tiles.plus(_kernel_rows.one_by_one(inputs, kernel, geometry, product, **static), bias)
    if _matmul_plans.by_taps(call, origin):
        taps = _kernel_rows.tap_by_tap(inputs, kernel, parts=_matmul_plans.parts_of_taps(call), **static)
        return _tiles.plus(lay_out(taps, geometry, phase_by_phase=on_cpu, taps_first=True), bias)
    if _matmul_plans.by_rows(call):
        return _tiles.plus(_kernel_rows.outputs(inputs, kernel, geometry, product, **static), bias)
    taps = _kernel_rows.every_tap(inputs, kernel, product, **static)
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
    product: _products.Product,
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
    call = Call(geometry, 1, channels, filters, groups, sums.itemsize, tile_bytes)
    room = _matmul_plans.block_bytes(call)
    spans = _matmul_plans.spans(geometry, inputs.shape[0], blocks, each, sums.itemsize, room)
    depth, height, width = map(_local, geometry, (spans[2].block, spans[3].block, None))
    steps, places = [axis.s for axis in geometry[:2]], [(0, 0)]
    if _matmul_plans.rows_apart(call):
        places = [(d * geometry[0].d, h * geometry[1].d) for d in range(window[0]) for h in range(window[1])]
        depth, height = (Axis(span.block, 1, 1, 1, 0, span.block) for span in spans[2:])
        steps, window = [1, 1], [1, 1, window[2]]
    matrices = _blocks.split_kernel(kernel.astype(dtype), groups)
    rows = spans[0].block * math.prod(axis.n for axis in (depth, height, width))
    matrices, dim = _products.as_read(matrices.reshape(blocks, len(places), -1, channels // blocks), rows, sums)
    done = bias is None and not any(axis.overlaps for axis in geometry)  # nothing to add: round what the product gives

    def compute(slab: jax.Array, group: Any, starts: Sequence[Any]) -> list[Part]:
        matrix = lax.dynamic_index_in_dim(matrices, group, keepdims=False)
        slab = _tiles.values(slab, dtype)
        parts = []
        for part, place in enumerate(places):
            taps = product(slab, matrix[part], dim, precision=precision, accumulate=sums)
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
    linear = functools.partial(outputs, transposed=True)
    return transposes(linear, inputs, kernel, cotangent, geometry, channels, **static)
