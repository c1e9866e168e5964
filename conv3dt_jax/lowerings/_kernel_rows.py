"""A product for each row of the kernel's taps: what `matmul` does where the kernel is large and the volume small.

A row holds the taps in width for one place in depth and height. Its product gives one phase in depth and height, cell
by cell; the phase is the sum of those that fall on it. The kernel is read where it lies, and inputs whose products fall
outside the result take no part: an eighth of them per axis where 4 inputs meet a kernel of 4 with strides of 2.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from conv3dt_jax._geometry import Axis, Geometry
from conv3dt_jax.lowerings._cells import cells
from conv3dt_jax.lowerings._laid_out import overlap_add

Reach = tuple[int, int, int, int]
"""A tap's residue in a cell, and its inputs ``[first, last)`` whose products are kept, and the cell of the first."""


def reaches(axis: Axis) -> list[Reach | None]:
    """What each tap reaches; None where that is nothing."""
    found: list[Reach | None] = []
    for tap in range(axis.k):
        shift, residue = divmod(tap * axis.d - axis.lo, axis.s)
        first, last = max(0, -shift), min(axis.n, (axis.out - 1 - residue) // axis.s + 1 - shift)
        found.append((residue, first, last, first + shift) if last > first else None)
    return found


def kept(geometry: Geometry) -> int:
    """Inputs times taps, of one sample."""
    rows = [sum(reach[2] - reach[1] for reach in reaches(axis) if reach) for axis in geometry[:2]]
    return math.prod(rows) * geometry[2].n * geometry[2].k


def outputs(
    inputs: jax.Array,
    kernel: jax.Array,
    geometry: Geometry,
    *,
    precision: lax.PrecisionLike,
    accumulate: DTypeLike,
    filters_last: bool,
) -> jax.Array:
    """``(N, D, H, W, C)`` and ``(kd, kh, kw, F, C)``, or ``(kd, kh, kw, C, F)``, to ``(N, *out, F)``."""
    depth, height, width = geometry
    phases: dict[tuple[int, int], list[jax.Array]] = {}
    for row, (d, h) in _rows(kernel, geometry):
        taken = lax.slice_in_dim(lax.slice_in_dim(inputs, d[1], d[2], axis=1), h[1], h[2], axis=2)
        products = every_tap(taken, row, precision=precision, accumulate=accumulate, filters_last=filters_last)
        products = overlap_add(products.squeeze((4, 5)), 3, width)
        places = [(0, 0, 0), *(_around(*pair) for pair in ((depth, d), (height, h))), (0, 0, 0), (0, 0, 0)]
        products = lax.pad(products, jnp.zeros((), products.dtype), places)
        phases.setdefault((d[0], h[0]), []).append(products)
    return _interleaved({place: functools.reduce(jnp.add, terms) for place, terms in phases.items()}, depth, height)


def every_tap(
    inputs: jax.Array,
    kernel: jax.Array,
    *,
    precision: lax.PrecisionLike,
    accumulate: DTypeLike,
    filters_last: bool,
) -> jax.Array:
    """``(N, D, H, W, C)`` times ``(kd, kh, kw, F, C)``, or ``(kd, kh, kw, C, F)``: ``(N, D, H, W, kd, kh, kw, F)``."""
    contract = (((4,), (3 if filters_last else 4,)), ((), ()))
    return lax.dot_general(inputs, kernel, contract, precision=precision, preferred_element_type=accumulate)


def _rows(kernel: jax.Array, geometry: Geometry) -> Iterator[tuple[jax.Array, tuple[Reach, Reach]]]:
    """Those that reach the result. Split off all at once: the transpose of a split is one concatenation."""
    depth, height = geometry[:2]
    for slab, d in zip(lax.split(kernel, (1,) * depth.k, 0), reaches(depth), strict=True):
        for row, h in zip(lax.split(slab, (1,) * height.k, 1), reaches(height), strict=True):
            if d is not None and h is not None:
                yield row, (d, h)


def _around(axis: Axis, reach: Reach) -> tuple[int, int, int]:
    """Cells before and behind those that a tap reaches."""
    _, first, last, cell = reach
    return cell, cells(axis) - cell - (last - first), 0


def _interleaved(phases: dict[tuple[int, int], jax.Array], depth: Axis, height: Axis) -> jax.Array:
    """The phases ``(N, cells, cells, W, F)`` in depth and height, as the result."""
    zeros = jnp.zeros_like(next(iter(phases.values())))
    planes = [_stacked([phases.get((d, h), zeros) for h in range(height.s)], 2) for d in range(depth.s)]
    return lax.slice_in_dim(
        lax.slice_in_dim(_stacked(planes, 1), 0, depth.out, axis=1), 0, height.out, axis=2
    )  # fmt: skip


def _stacked(parts: Sequence[jax.Array], dim: int) -> jax.Array:
    """Cells of one phase after the other at ``dim``."""
    if len(parts) == 1:
        return parts[0]
    found = jnp.stack(parts, dim + 1)
    return found.reshape(*found.shape[:dim], -1, *found.shape[dim + 2 :])
