"""Depth to space along one axis: the values of one input cell become neighbours in the output."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax


def depth_to_space(values: jax.Array, dim: int, residues: Sequence[int], size: int) -> jax.Array:
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
