"""A product for each row of the kernel's taps: what `matmul` does where the kernel is large and the volume small.

A row holds the taps in width for one place in depth and height. Its product gives one phase in depth and height, cell
by cell; the phase is the sum of those that fall on it. The kernel is read where it lies, and inputs whose products fall
outside the result take no part: an eighth of them per axis where 4 inputs meet a kernel of 4 with strides of 2.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from conv3dt_jax._geometry import Axis, Geometry
from conv3dt_jax.lowerings._cells import cells, is_still
from conv3dt_jax.lowerings._laid_out import interleaved, overlap_add, summed
from conv3dt_jax.lowerings._origin import Origin
from conv3dt_jax.lowerings._products import Product

Reach = tuple[int, int, int]
"""A tap's inputs ``[first, last)`` whose products are kept, and the cell of the first."""


def reaches(axis: Axis) -> list[Reach | None]:
    """What each tap reaches; None where that is nothing."""
    found: list[Reach | None] = []
    for tap in range(axis.k):
        shift, residue = divmod(tap * axis.d - axis.lo, axis.s)
        first, last = max(0, -shift), min(axis.n, (axis.out - 1 - residue) // axis.s + 1 - shift)
        found.append((first, last, first + shift) if last > first else None)
    return found


def kept(geometry: Geometry) -> int:
    """Inputs times taps, of one sample."""
    rows = [sum(reach[1] - reach[0] for reach in reaches(axis) if reach) for axis in geometry[:2]]
    return math.prod(rows) * geometry[2].n * geometry[2].k


def one_by_one(inputs: jax.Array, kernel: jax.Array, geometry: Geometry, product: Product, **static: Any) -> jax.Array:
    """`outputs` of a plane or a line whose rows are taps: an axis that does nothing becomes the width.

    Each takes all inputs: they are many, and a copy of those that it keeps would cost more than the products saved.
    """
    still = next(dim for dim, axis in enumerate(geometry) if is_still(axis))
    first, second = (axis for dim, axis in enumerate(geometry) if dim != still)
    inputs, kernel = jnp.moveaxis(inputs, still + 1, 3), jnp.moveaxis(kernel, still, 2)
    found = outputs(inputs, kernel, (first, second, geometry[still]), product, cut=False, **static)
    return jnp.moveaxis(found, 3, still + 1)


def outputs(
    inputs: jax.Array,
    kernel: jax.Array,
    geometry: Geometry,
    product: Product,
    *,
    precision: lax.PrecisionLike,
    accumulate: DTypeLike,
    origin: Origin,
    cut: bool = True,
) -> jax.Array:
    """``(N, D, H, W, C)`` and a kernel as it lies, see `Origin.restored`, to ``(N, *out, F)``.

    With ``cut`` a row takes only the inputs whose products are kept.
    """
    depth, height, width = geometry
    terms: dict[tuple[int, ...], jax.Array] = {}
    for place, row, (d, h) in _rows(kernel, geometry, origin):
        if not cut:
            d, h = ((0, axis.n, reach[2] - reach[0]) for axis, reach in ((depth, d), (height, h)))
        taken = lax.slice_in_dim(lax.slice_in_dim(inputs, *d[:2], axis=1), *h[:2], axis=2)
        products = every_tap(taken, row, product, precision=precision, accumulate=accumulate, origin=origin)
        products = overlap_add(products.squeeze((4, 5)), 3, width)
        around = [(0, 0, 0), _around(depth, d), _around(height, h), (0, 0, 0), (0, 0, 0)]
        terms[place] = lax.pad(products, jnp.zeros((), products.dtype), around)
    if not terms:  # the window lies between the taps
        filters = kernel.shape[4 if origin.filters_last else 3]
        return jnp.zeros((inputs.shape[0], *(axis.out for axis in geometry), filters), accumulate)
    return interleaved(summed(terms, geometry[:2]), geometry[:2])


def every_tap(
    inputs: jax.Array,
    kernel: jax.Array,
    product: Product,
    *,
    precision: lax.PrecisionLike,
    accumulate: DTypeLike,
    origin: Origin,
) -> jax.Array:
    """``(N, D, H, W, C)`` times all taps of a kernel as it lies, in order: ``(N, D, H, W, kd, kh, kw, F)``."""
    more = math.prod(inputs.shape[:-1]) > inputs.shape[-1] if isinstance(inputs.shape[0], int) else True
    if origin.mirrored and (origin.filters_last or more):
        # its transposition is a copy, which may turn the taps too; or there are more products than it has values
        kernel, origin = jnp.flip(kernel, (0, 1, 2)), Origin(filters_last=origin.filters_last)
    dim = 3 if origin.filters_last else 4
    taps = product(inputs, kernel, dim, precision=precision, accumulate=accumulate)
    return jnp.flip(taps, (4, 5, 6)) if origin.mirrored else taps


def tap_by_tap(
    inputs: jax.Array,
    kernel: jax.Array,
    *,
    precision: lax.PrecisionLike,
    accumulate: DTypeLike,
    origin: Origin,
    parts: int = 0,
) -> jax.Array:
    """The same of a kernel ``(kd, kh, kw, C, F)``, which is not transposed: ``(kd, kh, kw, N, D, H, W, F)``.

    The inputs are copied instead. With ``parts`` the products are made in turn, each of so many parts of the channels,
    which stay in the cache as they are packed and multiplied; all at once they would be packed in memory.
    """
    *window, channels, filters = kernel.shape
    product = functools.partial(lax.dot_general, precision=precision, preferred_element_type=accumulate)
    if parts:
        taps = _in_turn(inputs, kernel.reshape(-1, parts, channels // parts, filters), product)
    else:
        copies = jnp.broadcast_to(inputs, (math.prod(window), *inputs.shape))
        taps = product(copies, kernel.reshape(-1, channels, filters), (((5,), (1,)), ((0,), (0,))))
    taps = jnp.flip(taps, 0) if origin.mirrored else taps
    return taps.reshape(*window, *taps.shape[1:])


def _in_turn(inputs: jax.Array, matrices: jax.Array, product: Callable[..., jax.Array]) -> jax.Array:
    """``(N, D, H, W, C)`` and ``(taps, parts, C / parts, F)`` to ``(taps, N, D, H, W, F)``, by a loop over both."""
    taps, parts, channels, _ = matrices.shape

    def one(turn: tuple[jax.Array, jax.Array]) -> jax.Array:
        part, matrix = turn
        values = lax.dynamic_slice_in_dim(inputs, part * channels, channels, 4) if parts > 1 else inputs
        return product(values, matrix, (((4,), (0,)), ((), ())))

    turns = jnp.tile(jnp.arange(parts), taps)
    found = lax.map(one, (turns, matrices.reshape(-1, *matrices.shape[2:])))
    return found.reshape(taps, parts, *found.shape[1:]).sum(1, dtype=found.dtype) if parts > 1 else found


def _rows(
    kernel: jax.Array, geometry: Geometry, origin: Origin
) -> Iterator[tuple[tuple[int, int], jax.Array, tuple[Reach, Reach]]]:
    """Those that reach the result, with their taps in depth and height.

    Split off all at once: the transpose of a split is one concatenation.
    """
    depth, height = (list(enumerate(reaches(axis)))[:: -1 if origin.mirrored else 1] for axis in geometry[:2])
    for slab, (i, d) in zip(lax.split(kernel, (1,) * len(depth), 0), depth, strict=True):
        for row, (j, h) in zip(lax.split(slab, (1,) * len(height), 1), height, strict=True):
            if d is not None and h is not None:
                yield (i, j), row, (d, h)


def _around(axis: Axis, reach: Reach) -> tuple[int, int, int]:
    """Cells before and behind those that a tap's inputs reach; less than none where they lie outside."""
    first, last, cell = reach
    return cell, cells(axis) - cell - (last - first), 0
