"""`phases`: each output phase is an ordinary convolution of the input, as matrix products of gathered patches.

Cut the kept window into cells of ``s`` outputs. Output ``m * s + r`` is reached by the taps with
``t * d - lo = a * s + r``, from input ``m - a``:

    y[m * s + r] = sum_a x[m - a] @ w[a, r],        w[a, r] = the tap at offset a * s + r, or 0.

For a block of cells the shifts ``x[m - a]`` are gathered side by side and multiplied with the kernels of many phases at
once. All phases in width share a product, which keeps the rows of the result whole. In depth and height, phases that
need the same shifts share one, and others have one of their own, so that no zeros are multiplied there; with few
channels, where gathering shifts again costs more than zeros, all share one. One channel in each group needs no product
at all (`_depthwise`).

The work goes block by block (`_tiles`): the patches stay in the cache and the result is written once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from conv3dt_jax._geometry import Axis, Geometry
from conv3dt_jax.lowerings import _adjoint, _blocks, _depthwise, _tiles
from conv3dt_jax.lowerings._cells import aligned, cells, joined, runs, shifts, walk
from conv3dt_jax.lowerings._result import Part
from conv3dt_jax.lowerings._work import Call, Work, nanoseconds

gradients = _adjoint.gradients
_LAST = (((1,), (1,)), ((), ()))


def refusal(geometry: Geometry, sums: DTypeLike) -> str | None:
    """Says why this lowering cannot take the geometry, or sums of this dtype; None where it can."""
    del sums
    if not all(isinstance(axis.out, int) for axis in geometry):
        return "it cuts the input into blocks and needs spatial sizes that are known when it is traced"
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
    channels_first: bool = False,
) -> jax.Array:
    """``(N, D, H, W, C)`` and ``(kd, kh, kw, F / groups, C)`` to ``(N, *out, F)``, of dtype ``result``.

    To ``(N, F, *out)`` with ``channels_first``, where the product is taken with its operands exchanged.
    """
    dtype, sums = _tiles.operand_dtype(accumulate, inputs, kernel), _tiles.widest(accumulate, inputs, kernel)
    result = sums if result is None else result
    if inputs.shape[-1] == groups:
        return _depthwise.outputs(
            inputs, kernel, geometry, _phase_taps, sums=sums, result=result, bias=bias, channels_first=channels_first
        )
    width, early = aligned(geometry[2])
    geometry = (*geometry[:2], width)
    filters = kernel.shape[3] * groups
    blocks = _blocks.count(groups, inputs.shape[-1], filters)
    each_c, each_f = inputs.shape[-1] // blocks, filters // blocks
    products = _products(geometry, each_c, each_f)
    taps = _blocks.split_kernel(kernel.astype(dtype), groups)
    matrices = lax.optimization_barrier([_matrix(taps, geometry, range(*rd), range(*rh)) for rd, rh in products])
    gathered = math.prod(len(shifts(axis)) for axis in geometry) * each_c
    written = math.prod(axis.s for axis in geometry) * each_f
    count = [cells(axis) for axis in geometry]
    spans = _tiles.plan(
        (inputs.shape[0], blocks, *count), max(gathered * dtype.itemsize, written * sums.itemsize), tile_bytes
    )

    def compute(slab: jax.Array, group: Any, _: Sequence[Any]) -> list[Part]:
        parts = []
        tile = (spans[0].block, spans[2].block, spans[3].block, count[2])
        for ((d0, d1), (h0, h1)), matrix in zip(products, matrices, strict=True):
            patches = _patches(slab, tile, geometry, range(d0, d1), range(h0, h1))
            matrix = lax.dynamic_index_in_dim(matrix, group, keepdims=False)
            patches = _tiles.values(patches, dtype)
            left, right = (matrix, patches) if channels_first else (patches, matrix)
            part = lax.dot_general(left, right, _LAST, precision=precision, preferred_element_type=sums)
            phases = (d1 - d0, h1 - h0, width.s, each_f)
            part = part.reshape(*phases, *tile) if channels_first else part.reshape(*tile, *phases)
            part = _tiles.plus(part, bias, group * each_f, dim=phases_dim + 3)
            part = _tiles.bits(part.astype(result)).transpose(order)
            part = lax.collapse(part, row, row + 2)
            parts.append((lax.slice_in_dim(part, early, width.out, axis=row), (d0, h0)))
        return parts

    phases_dim, row, order = (0, 6, (4, 3, 5, 0, 6, 1, 7, 2)) if channels_first else (4, 5, (0, 1, 4, 2, 5, 3, 6, 7))
    return walk(inputs, geometry, early, filters, blocks, spans, dtype, result, compute, bias, channels_first)


def work(call: Call, *, gradient: bool) -> Work:
    """The gathered shifts, twice (cut out, then side by side), and the multiply-adds with the zeros of the width."""
    if gradient:
        return _adjoint.work(call)
    if call.channels == call.groups:
        shares = [aligned(axis)[0] for axis in call.geometry]
        taken = math.prod(len(shifts(axis)) for axis in shares)
        values = call.batch * math.prod(cells(axis) * axis.s for axis in shares) * call.filters
        copies = call.filters if call.channels > 1 else 1
        held = call.batch * math.prod(cells(axis) + len(shifts(axis)) - 1 for axis in shares) * copies
        return Work(values * taken, values, held * call.itemsize)
    width, _ = aligned(call.geometry[2])
    depth, height = call.geometry[:2]
    windows = call.batch * math.prod(map(cells, (depth, height, width)))
    blocks = _blocks.count(call.groups, call.channels, call.filters)
    each = call.channels * call.filters // blocks
    gathered = multiply_adds = matrices = largest = 0
    geometry = (depth, height, width)
    for product in _products(geometry, call.channels // blocks, call.filters // blocks):
        here, written = _sizes(geometry, product)
        gathered += windows * here * call.channels
        multiply_adds += windows * here * written * each
        matrices += here * written * each
        largest = max(largest, 2 * here * call.channels + 2 * written * call.filters)
    room = min(windows * largest * call.itemsize, 2 * call.tile_bytes)
    return Work(multiply_adds, gathered, room + 2 * matrices * call.itemsize)


def pieces(geometry: Geometry, *, gradient: bool) -> int:
    """Slices that the program holds."""
    if gradient:
        return _adjoint.pieces(geometry)
    depth, height = (sum(len(shifts(axis, range(*run))) for run in runs(axis)) for axis in geometry[:2])
    return depth * height * len(shifts(aligned(geometry[2])[0]))


Product = tuple[tuple[int, int], tuple[int, int]]
"""The residues ``[first, last)`` in depth and height that share a product."""


def _products(geometry: Geometry, channels: int, filters: int) -> list[Product]:
    """The products that give all phases: by runs, or all runs of an axis as one, whatever costs less."""
    depth, height = ((runs(axis), joined(runs(axis))) for axis in geometry[:2])
    ways = [list(itertools.product(*way)) for way in itertools.product(depth, height)]

    def cost(products: list[Product]) -> float:
        sizes = [_sizes(geometry, product) for product in products]
        multiply_adds = sum(taken * written for taken, written in sizes) * channels * filters
        return nanoseconds("phases", multiply_adds, sum(taken for taken, _ in sizes) * channels)

    return min(ways, key=cost)


def _sizes(geometry: Geometry, product: Product) -> tuple[int, int]:
    """How many shifts a product takes, and how many phases it gives, of every cell."""
    taken, written = len(shifts(geometry[2])), geometry[2].s
    for axis, (first, last) in zip(geometry[:2], product, strict=True):
        taken *= len(shifts(axis, range(first, last)))
        written *= last - first
    return taken, written


def _patches(
    slab: jax.Array, tile: tuple[int, int, int, int], geometry: Geometry, rd: Sequence[int], rh: Sequence[int]
) -> jax.Array:
    """``(cells, shifts * C)``: the shifts that the residues ``rd`` and ``rh`` need, and all in width, side by side."""
    depth, height, width = geometry
    parts = []
    for shift in itertools.product(shifts(depth, rd), shifts(height, rh), shifts(width)):
        offsets = [shifts(axis)[-1] - a for axis, a in zip(geometry, shift, strict=True)]
        limits = [o + size for o, size in zip(offsets, tile[1:], strict=True)]
        parts.append(lax.slice(slab, (0, *offsets, 0), (slab.shape[0], *limits, slab.shape[-1])))
    return jnp.concatenate(parts, -1).reshape(math.prod(tile), -1)


def _matrix(kernel: jax.Array, geometry: Geometry, rd: Sequence[int], rh: Sequence[int]) -> jax.Array:
    """``(B, kd, kh, kw, F / B, C / B)`` to ``(B, rd * rh * sw * F, shifts * C)``: the rows are the phases of a run."""
    weights = kernel
    for dim, axis, residues in zip((1, 3, 5), geometry, (rd, rh, range(geometry[2].s)), strict=True):
        weights = _phase_taps(weights, dim, axis, residues)
    blocks, ad, nd, ah, nh, aw, sw, filters, channels = weights.shape
    weights = weights.transpose(0, 2, 4, 6, 7, 1, 3, 5, 8)
    return weights.reshape(blocks, nd * nh * sw * filters, ad * ah * aw * channels)


def _phase_taps(kernel: jax.Array, dim: int, axis: Axis, residues: Sequence[int]) -> jax.Array:
    """Replaces the taps at ``dim`` by (shifts, residues), zeros where no tap falls."""
    rows = []
    for a in shifts(axis, residues):
        places = [divmod(a * axis.s + r + axis.lo, axis.d) for r in residues]
        rows.append([t if rest == 0 and 0 <= t < axis.k else None for t, rest in places])
    flat = [t for row in rows for t in row]
    parts = [_spread(kernel, dim, flat)] if _regular(flat) else [_spread(kernel, dim, row) for row in rows]
    taps = jnp.concatenate(parts, dim) if len(parts) > 1 else parts[0]
    return taps.reshape(*taps.shape[:dim], len(rows), len(residues), *taps.shape[dim + 1 :])


def _regular(taps: Sequence[int | None]) -> bool:
    """Whether the taps, and their places, are equally spaced: those of one shift always are."""
    places = [i for i, t in enumerate(taps) if t is not None]
    found = [t for t in taps if t is not None]
    return all(len({b - a for a, b in itertools.pairwise(values)}) <= 1 for values in (places, found))


def _spread(kernel: jax.Array, dim: int, taps: Sequence[int | None]) -> jax.Array:
    """The named taps at ``dim``, and zeros between them."""
    places = [i for i, t in enumerate(taps) if t is not None]
    found = [t for t in taps if t is not None]
    step = found[1] - found[0] if len(found) > 1 else 1
    every = places[1] - places[0] if len(found) > 1 else 1
    padding = [(0, 0, 0)] * kernel.ndim
    padding[dim] = (places[0], len(taps) - 1 - places[-1], every - 1)
    kernel = lax.slice_in_dim(kernel, found[0], found[-1] + 1, step, dim)
    return lax.pad(kernel, jnp.zeros((), kernel.dtype), padding)
