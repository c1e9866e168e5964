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

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from conv3dt_jax._geometry import Axis, Geometry
from conv3dt_jax.lowerings import _adjoint, _blocks, _depthwise, _tiles
from conv3dt_jax.lowerings._cells import aligned, cells, extended_values, joined, runs, shifts, walk
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
    if _depthwise.takes(geometry, inputs.shape[-1], groups):
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
    multiply = functools.partial(lax.dot_general, precision=precision, preferred_element_type=sums)
    gathered = _turn([len(shifts(axis)) for axis in geometry]) * each_c
    written = math.prod(axis.s for axis in geometry) * each_f
    count = [cells(axis) for axis in geometry]
    spans = _tiles.plan(
        (inputs.shape[0], blocks, *count), max(gathered * dtype.itemsize, written * sums.itemsize), tile_bytes
    )

    def compute(slab: jax.Array, group: Any, _: Sequence[Any]) -> list[Part]:
        parts = []
        tile = (spans[0].block, spans[2].block, spans[3].block, count[2])
        for ((d0, d1), (h0, h1)), matrix in zip(products, matrices, strict=True):
            weights = lax.dynamic_index_in_dim(matrix, group, keepdims=False)
            offsets = _offsets(geometry, range(d0, d1), range(h0, h1))
            part = _product(slab, tile, offsets, weights, dtype, multiply, channels_first)
            phases = (d1 - d0, h1 - h0, width.s, each_f)
            part = part.reshape(*phases, *tile) if channels_first else part.reshape(*tile, *phases)
            part = _tiles.plus(part, bias, group * each_f, dim=phases_dim + 3)
            part = _tiles.bits(part.astype(result)).transpose(order)
            part = lax.collapse(part, row, row + 2)
            parts.append((lax.slice_in_dim(part, early, width.out, axis=row), (d0, h0)))
        return parts

    phases_dim, row, order = (0, 6, (4, 3, 5, 0, 6, 1, 7, 2)) if channels_first else (4, 5, (0, 1, 4, 2, 5, 3, 6, 7))
    return walk(inputs, geometry, early, filters, blocks, spans, dtype, result, compute, bias, channels_first)


def work(call: Call, *, gradients: int) -> Work:
    """The gathered shifts, the kernel's matrices and the result, and the multiply-adds with the zeros of the width.

    Matrices and the result pass twice: they are made, and laid out.
    """
    if gradients:
        return _adjoint.work(call, gradients)
    if _depthwise.takes(call.geometry, call.channels, call.groups):
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
        largest = max(largest, 2 * _turn(_taken(geometry, product)) * call.channels + 2 * written * call.filters)
    room = min(windows * largest * call.itemsize, 2 * call.tile_bytes)
    extended = call.batch * extended_values(geometry, call.channels, call.filters)
    written = call.batch * math.prod(axis.out for axis in call.geometry) * call.filters
    values = gathered + 2 * (matrices + written)
    return Work(multiply_adds, values, room + (2 * matrices + extended) * call.itemsize)


Product = tuple[tuple[int, int], tuple[int, int]]
"""The residues ``[first, last)`` in depth and height that share a product."""


def _products(geometry: Geometry, channels: int, filters: int) -> list[Product]:
    """The products that give all phases: by runs, or all runs of an axis as one, whatever costs less.

    Of those that make programs of moderate size.
    """
    depth, height = ((runs(axis), joined(runs(axis))) for axis in geometry[:2])
    ways = [list(itertools.product(*way)) for way in itertools.product(depth, height)]
    moderate = [way for way in ways if sum(_turn(_taken(geometry, p)) for p in way) <= _tiles.MOST_SLICES]

    def cost(products: list[Product]) -> float:
        sizes = [_sizes(geometry, product) for product in products]
        multiply_adds = sum(taken * written for taken, written in sizes) * channels * filters
        return nanoseconds("phases", multiply_adds, sum(taken for taken, _ in sizes) * channels)

    return min(moderate or ways[-1:], key=cost)


def _taken(geometry: Geometry, product: Product) -> list[int]:
    """How many shifts a product takes, by axis."""
    residues = (range(*product[0]), range(*product[1]), None)
    return [len(shifts(axis, own)) for axis, own in zip(geometry, residues, strict=True)]


def _turn(taken: Sequence[int]) -> int:
    """How many of them lie side by side: all, or those of a turn of a loop."""
    return math.prod(taken[_tiles.looped(taken) :])


def _sizes(geometry: Geometry, product: Product) -> tuple[int, int]:
    """How many shifts a product takes, and how many phases it gives, of every cell."""
    written = math.prod(last - first for first, last in product) * geometry[2].s
    return math.prod(_taken(geometry, product)), written


def _offsets(geometry: Geometry, rd: Sequence[int], rh: Sequence[int]) -> list[list[int]]:
    """Where the slab's cells begin for the shifts that the residues ``rd`` and ``rh`` need, and all in width."""
    taken = zip(geometry, (rd, rh, None), strict=True)
    return [[shifts(axis)[-1] - a for a in shifts(axis, residues)] for axis, residues in taken]


def _product(
    slab: jax.Array,
    tile: tuple[int, int, int, int],
    offsets: list[list[int]],
    matrices: jax.Array,
    dtype: Any,
    multiply: Callable[..., jax.Array],
    exchanged: bool,
) -> jax.Array:
    """The patches times the matrix of a run, see ``_matrix``; or the other way round, ``exchanged``.

    Where slices for all shifts would make too large a program, those of the first axes are added up in a loop.
    """

    def product(slab: jax.Array, offsets: Sequence[Sequence[int]], matrix: jax.Array) -> jax.Array:
        patches = _tiles.values(_patches(slab, tile, offsets), dtype)
        return multiply(*((matrix, patches) if exchanged else (patches, matrix)), _LAST)

    looped = _tiles.looped([len(places) for places in offsets])
    if looped == 0:
        return product(slab, offsets, matrices[0])
    places = jnp.asarray(list(itertools.product(*offsets[:looped])), jnp.int32)
    sizes = [slab.shape[0], *tile[1 : looped + 1], *slab.shape[looped + 1 :]]
    inner = [*[[0]] * looped, *offsets[looped:]]

    def add(turn: jax.Array, found: jax.Array) -> jax.Array:
        moved = _tiles.cut(slab, [0, *places[turn], *[0] * (4 - looped)], sizes)
        return found + product(moved, inner, lax.dynamic_index_in_dim(matrices, turn, keepdims=False))

    made = jax.eval_shape(add, jnp.int32(0), jnp.zeros(()))
    return lax.fori_loop(0, len(places), add, jnp.zeros(made.shape, made.dtype))


def _patches(slab: jax.Array, tile: tuple[int, int, int, int], offsets: Sequence[Sequence[int]]) -> jax.Array:
    """``(cells, shifts * C)``: the cells of a slab from every offset on, side by side."""
    parts = []
    for places in itertools.product(*offsets):
        limits = [place + size for place, size in zip(places, tile[1:], strict=True)]
        parts.append(lax.slice(slab, (0, *places, 0), (slab.shape[0], *limits, slab.shape[-1])))
    return jnp.concatenate(parts, -1).reshape(math.prod(tile), -1)


def _matrix(kernel: jax.Array, geometry: Geometry, rd: Sequence[int], rh: Sequence[int]) -> jax.Array:
    """``(B, kd, kh, kw, F / B, C / B)`` to ``(B, turns, rd * rh * sw * F, shifts * C)`` for the phases of a run."""
    weights = kernel
    for dim, axis, residues in zip((1, 3, 5), geometry, (rd, rh, range(geometry[2].s)), strict=True):
        weights = _phase_taps(weights, dim, axis, residues)
    blocks, ad, nd, ah, nh, aw, sw, filters, channels = weights.shape
    weights = weights.transpose(0, 2, 4, 6, 7, 1, 3, 5, 8)
    taken = [ad, ah, aw]
    turns = math.prod(taken[: _tiles.looped(taken)])
    weights = weights.reshape(blocks, nd * nh * sw * filters, turns, ad * ah * aw * channels // turns)
    return weights.swapaxes(1, 2)


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
