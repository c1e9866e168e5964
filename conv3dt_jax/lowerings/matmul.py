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

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from conv3dt_jax._geometry import Axis, Geometry, tap_phases
from conv3dt_jax.lowerings._contract import contract
from conv3dt_jax.lowerings._depth_to_space import depth_to_space


def refusal(geometry: Geometry) -> str | None:
    """Says why this lowering cannot take the geometry; None where it can."""
    del geometry
    return None


def lower(
    inputs: jax.Array,
    kernel: jax.Array,
    geometry: Geometry,
    *,
    groups: int,
    precision: lax.PrecisionLike,
    accumulate: DTypeLike,
) -> jax.Array:
    """``(N, D, H, W, C)`` and ``(kd, kh, kw, F / groups, C)`` to ``(N, *out, F)`` of dtype ``accumulate``."""
    *space, channels = inputs.shape
    *window, filters, _ = kernel.shape
    pieces = inputs.reshape(*space, 1, groups, channels // groups)
    weights = kernel.reshape(-1, filters, groups, channels // groups).transpose(2, 3, 0, 1)[None]
    taps = contract(pieces, weights, precision=precision, accumulate=accumulate)
    # (N, D, H, W, kd, kh, kw, F) -> (N, D, kd, H, kh, W, kw, F): each axis beside its taps.
    taps = taps.reshape(*space, *window, groups * filters).transpose(0, 1, 4, 2, 5, 3, 6, 7)
    for dim, axis in enumerate(geometry, start=1):
        taps = _overlap_add(taps, dim, axis)
    return taps


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
