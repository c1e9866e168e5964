"""Depth to space along one axis: the values of one input cell become neighbours in the output."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax


def depth_to_space(values: jax.Array, dim: int, columns: Mapping[int, int], size: int) -> jax.Array:
    """Turns the axes ``(n, columns)`` at ``dim`` into one of length ``n * size``.

    Args:
      values: an array with the cells at axis ``dim`` and their values at ``dim + 1``.
      dim: axis of the cells.
      columns: residue -> index of its value along ``dim + 1``, in ascending order; other residues become zeros.
      size: outputs per cell, more than any residue.
    """
    first, count = min(columns), len(columns)
    start = columns[first]
    if all(columns.get(first + i) == start + i for i in range(count)):  # neighbours already: a slice and a pad
        cells = lax.slice_in_dim(values, start, start + count, axis=dim + 1)
        padding = [(0, 0, 0)] * cells.ndim
        padding[dim + 1] = (first, size - first - count, 0)
        cells = lax.pad(cells, jnp.zeros((), cells.dtype), padding)
    else:
        slices = {r: lax.slice_in_dim(values, i, i + 1, axis=dim + 1) for r, i in columns.items()}
        zero = jnp.zeros_like(slices[first])
        cells = jnp.concatenate([slices.get(r, zero) for r in range(size)], dim + 1)
    return cells.reshape(*cells.shape[:dim], cells.shape[dim] * size, *cells.shape[dim + 2 :])
