"""Products of inputs and taps at their places in the result: in one pass, or one axis after the other."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from conv3dt_jax._geometry import Axis, Geometry, tap_phases
from conv3dt_jax.lowerings._cells import cells, is_still

FEW_TAPS, PLANE_TAPS = 27, 144
"""Taps, and outputs of a cell, that are laid out in one pass, each by an operation of its own, which is compiled; and
the same in a plane."""


FEW_PHASES = 4
"""Outputs of a cell up to which they are added up in place: each output takes part in all sums then."""

MANY_TAPS = 15
"""Taps from which on the phases are written apart before they are put in order: each value is the sum of several."""

Parts = dict[tuple[int, ...], jax.Array]
"""Products by the places of their taps, or of their rows of taps, in the kernel."""


def lay_out(taps: jax.Array, geometry: Geometry, *, phase_by_phase: bool, taps_first: bool = False) -> jax.Array:
    """``(N, D, H, W, kd, kh, kw, F)`` to ``(N, *out, F)``: every product to its place.

    With ``taps_first`` the axes of the taps lie before the others; with ``phase_by_phase`` in one pass if it can be.
    """
    if phase_by_phase and in_one_pass(geometry):
        rows = _in_rows(geometry) and not taps_first
        return _phase_by_phase(_apart(taps) if taps_first else _columns(taps, rows=rows), geometry, rows=rows)
    if taps_first:
        taps = jnp.moveaxis(taps, (0, 1, 2), (4, 5, 6))
    taps = taps.transpose(0, 1, 4, 2, 5, 3, 6, 7)  # each axis beside its taps
    for dim, axis in zip((5, 3, 1), geometry[::-1], strict=True):
        taps = overlap_add(taps, dim, axis)
    return taps


def lay_out_planes(taps: jax.Array, geometry: Geometry, *, mirrored: bool) -> jax.Array:
    """``(kd, kh, kw, N, D, H, W)`` to ``(N, *out)``: width is last, and of several phases each is written apart.

    With ``mirrored`` the last taps come first.
    """
    taps = taps[..., None]
    if not is_few(geometry):
        taps = jnp.flip(taps, (0, 1, 2)) if mirrored else taps
        return lay_out(taps, geometry, phase_by_phase=False, taps_first=True)[..., 0]
    parts = _apart(taps)
    if mirrored:  # named anew: to turn the products around is a pass over them
        parts = dict(zip(reversed(parts), parts.values(), strict=True))
    phases = summed(_placed(parts, geometry), geometry)
    many = not _is_line(geometry) and max(axis.s for axis in geometry) > 2 and any(axis.overlaps for axis in geometry)
    found = _from_the_front(phases, geometry) if many else _stacked(phases, geometry)
    return _cut(found, geometry)[..., 0]


def in_one_pass(geometry: Geometry) -> bool:
    """Whether products overlap, in more than a line, and are so few for an input that each may be an operation."""
    return is_few(geometry) and not _is_line(geometry) and any(axis.overlaps for axis in geometry)


def is_few(geometry: Geometry) -> bool:
    """Whether the products of an input are so few that each may be an operation; none comes round from the end."""
    if any(axis.wraps or not isinstance(axis.out, int) for axis in geometry):
        return False
    pieces = max(math.prod(axis.k for axis in geometry), math.prod(axis.s for axis in geometry))
    return pieces <= (PLANE_TAPS if any(map(is_still, geometry)) else FEW_TAPS)


def _is_line(geometry: Geometry) -> bool:
    return sum(axis.k * axis.s > 1 for axis in geometry) == 1


def _phase_by_phase(parts: Parts, geometry: Geometry, *, rows: bool) -> jax.Array:
    """One pass over the products: each output of a cell is the sum of the taps, or rows of taps, that fall on it."""
    axes = geometry[: 2 if rows else 3]
    if rows:
        k = geometry[2].k
        parts = {
            place: overlap_add(part.reshape(*part.shape[:-1], k, part.shape[-1] // k), 3, geometry[2])
            for place, part in parts.items()
        }
    return interleaved(summed(_placed(parts, axes), axes), axes)


def _placed(parts: Parts, axes: Sequence[Axis]) -> Parts:
    """Among all cells of the first axes, with zeros around."""
    terms = {}
    for place, part in parts.items():
        padding = [(0, 0, 0)] * part.ndim
        for dim, (tap, axis) in enumerate(zip(place, axes, strict=True), start=1):
            cell = (tap * axis.d - axis.lo) // axis.s
            padding[dim] = (cell, cells(axis) - axis.n - cell, 0)
        terms[place] = lax.pad(part, jnp.zeros((), part.dtype), padding)
    return terms


def _columns(taps: jax.Array, *, rows: bool) -> Parts:
    """Products by their taps, or rows of taps, ``(N, D, H, W, F)`` or ``(N, D, H, W, kw F)`` each.

    All are split off: the transpose of a split is one concatenation, where that of a slice is a pad to the full size.
    """
    *space, kd, kh, kw, filters = taps.shape
    places = list(itertools.product(*map(range, (kd, kh) if rows else (kd, kh, kw))))
    each = kw * filters if rows else filters
    columns = taps.reshape(*space, len(places) * each)  # as they were multiplied: XLA sees through two reshapes
    return dict(zip(places, lax.split(columns, (each,) * len(places), 4), strict=True))


def _apart(taps: jax.Array) -> Parts:
    """The same of ``(kd, kh, kw, N, D, H, W, F)``, by their taps."""
    window, rest = taps.shape[:3], taps.shape[3:]
    places = list(itertools.product(*map(range, window)))
    parts = lax.split(taps.reshape(len(places), *rest), (1,) * len(places), 0)
    return {place: part.squeeze(0) for place, part in zip(places, parts, strict=True)}


def _in_rows(geometry: Geometry) -> bool:
    """Whether rows of taps are added up as they lie. Not where `interleaved` writes the phases apart."""
    return _is_in_order(geometry[2]) and not is_written_apart(geometry)


def _is_in_order(axis: Axis) -> bool:
    """Whether the result begins with a cell: neighbouring taps are neighbours there, and what is added is aligned."""
    return isinstance(axis.lo, int) and axis.s > 1 and axis.lo % axis.s == 0


def summed(terms: dict[tuple[int, ...], jax.Array], axes: Sequence[Axis]) -> dict[tuple[int, ...], jax.Array]:
    """The phases, by the places of the outputs in their cells, of what each tap gives for all cells.

    Added up along the last axis first, tap after tap: the bits do not depend on who lays out.
    """
    phases = terms
    for dim, axis in reversed(list(enumerate(axes))):
        phases, found = {}, sorted(phases.items(), key=lambda item: item[0])
        for place, term in found:
            residue = (place[dim] * axis.d - axis.lo) % axis.s
            place = (*place[:dim], residue, *place[dim + 1 :])
            phases[place] = phases[place] + term if place in phases else term
    return phases


def interleaved(phases: dict[tuple[int, ...], jax.Array], axes: Sequence[Axis]) -> jax.Array:
    """``(N, cells, ..., F)`` for each place in the cells of the first axes: the outputs of these, in order.

    Where the last cells stick out, to cut the result as it is written costs more than to spread and add up a few
    phases, or than a copy of those that are sums of many taps. Not where the phases are rows already.
    """
    some = next(iter(phases.values()))
    if _is_ragged(axes) and some.ndim == len(axes) + 2:
        if is_written_apart(axes):
            return _cut(_from_the_filters(phases, axes), axes)
        if math.prod(axis.s for axis in axes) <= FEW_PHASES:
            return functools.reduce(jnp.add, (_spread(phase, place, axes) for place, phase in phases.items()))
    return _cut(_stacked(phases, axes), axes)


def _stacked(phases: dict[tuple[int, ...], jax.Array], axes: Sequence[Axis]) -> jax.Array:
    """In order, with what sticks out."""
    some = next(iter(phases.values()))

    def stacked(place: tuple[int, ...]) -> jax.Array:
        dim = len(place)
        if dim == len(axes):
            return phases[place] if place in phases else jnp.zeros_like(some)
        parts = [stacked((*place, residue)) for residue in range(axes[dim].s)]
        found = jnp.stack(parts, dim + 2)
        return lax.collapse(found, dim + 1, dim + 3)

    return stacked(())


def _is_ragged(axes: Sequence[Axis]) -> bool:
    """Whether the last cells stick out of the result."""
    return any(axis.out % axis.s for axis in axes)


def is_written_apart(axes: Sequence[Axis]) -> bool:
    """Whether all phases are written before they are put in order: as much as the result beside the products."""
    many = math.prod(axis.k for axis in axes) >= MANY_TAPS and sum(axis.overlaps for axis in axes) == 2
    return many and _is_ragged(axes)


def _from_the_filters(phases: dict[tuple[int, ...], jax.Array], axes: Sequence[Axis]) -> jax.Array:
    """The phases side by side, each with its filters, then put in order: XLA makes two passes of it."""
    some = next(iter(phases.values()))
    places = itertools.product(*(range(axis.s) for axis in axes))
    found = jnp.concatenate([phases.get(place, jnp.zeros_like(some)) for place in places], -1)
    n = len(axes)
    found = found.reshape(*some.shape[:-1], *(axis.s for axis in axes), some.shape[-1])
    pairs = [dim for first in range(1, n + 1) for dim in (first, first + n)]
    sizes = [size * axis.s for size, axis in zip(some.shape[1:], axes, strict=False)]
    return found.transpose(0, *pairs, 2 * n + 1).reshape(some.shape[0], *sizes, some.shape[-1])


def _from_the_front(phases: dict[tuple[int, ...], jax.Array], axes: Sequence[Axis]) -> jax.Array:
    """One phase after the other, then put in order: of planes, whose last axis is as long as one filter."""
    some = next(iter(phases.values()))
    places = itertools.product(*(range(axis.s) for axis in axes))
    found = jnp.concatenate([phases.get(place, jnp.zeros_like(some)) for place in places])
    n = len(axes)
    found = found.reshape(*(axis.s for axis in axes), *some.shape)
    pairs = [dim for axis in range(n) for dim in (n + 1 + axis, axis)]
    sizes = [size * axis.s for size, axis in zip(some.shape[1:], axes, strict=False)]
    return found.transpose(n, *pairs, 2 * n + 1).reshape(some.shape[0], *sizes, some.shape[-1])


def _cut(cells: jax.Array, axes: Sequence[Axis]) -> jax.Array:
    """Without what sticks out of the result."""
    outs = [axis.out for axis in axes]
    return lax.slice(cells, [0] * cells.ndim, [cells.shape[0], *outs, *cells.shape[len(axes) + 1 :]])


def _spread(phase: jax.Array, place: tuple[int, ...], axes: Sequence[Axis]) -> jax.Array:
    """The outputs with those of one phase, and zeros."""
    padding = [(0, 0, 0)] * phase.ndim
    for dim, (residue, axis) in enumerate(zip(place, axes, strict=True), start=1):
        padding[dim] = (residue, axis.out - residue - (phase.shape[dim] - 1) * axis.s - 1, axis.s - 1)
    return lax.pad(phase, jnp.zeros((), phase.dtype), padding)


def overlap_add(taps: jax.Array, dim: int, axis: Axis) -> jax.Array:
    """Turns the axes ``(n, k)`` at ``dim`` into one of length ``out``; the taps of a block are consecutive."""
    blocks = [list(group) for _, group in itertools.groupby(tap_phases(axis), key=lambda phase: phase[0])]
    pieces = []
    for phases, chunk in zip(blocks, lax.split(taps, [len(b) for b in blocks], dim + 1), strict=True):
        cells = _depth_to_space(chunk, dim, [residue for _, residue in phases], axis.s)
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


def _depth_to_space(values: jax.Array, dim: int, residues: Sequence[int], size: int) -> jax.Array:
    """Turns the axes ``(n, values)`` at ``dim`` into one of length ``n * size``.

    Args:
      values: an array with the cells at axis ``dim`` and their values at ``dim + 1``.
      dim: axis of the cells.
      residues: the place of each value in its cell, ascending; other places become zeros.
      size: outputs per cell, more than any residue.
    """
    first, count = residues[0], len(residues)
    if residues[-1] - first + 1 == count:  # neighbours already
        padding = [(0, 0, 0)] * values.ndim
        padding[dim + 1] = (first, size - first - count, 0)
        cells = lax.pad(values, jnp.zeros((), values.dtype), padding)
    else:
        columns = dict(zip(residues, lax.split(values, (1,) * count, dim + 1), strict=True))
        zero = jnp.zeros_like(columns[first])
        cells = jnp.concatenate([columns.get(r, zero) for r in range(size)], dim + 1)
    return cells.reshape(*cells.shape[:dim], cells.shape[dim] * size, *cells.shape[dim + 2 :])
