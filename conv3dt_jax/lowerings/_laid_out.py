"""Products of inputs and taps at their places in the result, one axis after the other."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from conv3dt_jax._geometry import Axis, Geometry, tap_phases


def lay_out(taps: jax.Array, geometry: Geometry) -> jax.Array:
    """``(N, D, H, W, kd, kh, kw, F)`` to ``(N, *out, F)``: every product to its place."""
    taps = taps.transpose(0, 1, 4, 2, 5, 3, 6, 7)  # each axis beside its taps
    for dim, axis in zip((5, 3, 1), geometry[::-1], strict=True):
        taps = overlap_add(taps, dim, axis)
    return taps


def overlap_add(taps: jax.Array, dim: int, axis: Axis) -> jax.Array:
    """Turns the axes ``(n, k)`` at ``dim`` into one of length ``out``.

    The taps of a block are consecutive. They are split off all at once: the transpose of a split is one concatenation,
    where that of a slice is a pad to the full size, as many times as there are blocks.
    """
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
