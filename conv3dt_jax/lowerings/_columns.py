"""A product whose columns fill the registers: XLA:CPU takes the last few of narrow ones almost one by one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

FULL, MOST = 32, 64
"""Columns that are made together, and columns up to which it shows that some are not."""

MORE = 1.2
"""Times the columns that may be made: more zeros would cost what they save."""


def filled(columns: int) -> int:
    """The columns to make of a product on a CPU, so that none are left over.

    Of 27, three filters and nine taps, the last three cost more than five zeros beside them (`benchmarks.ideas`).
    """
    full = -(-columns // FULL) * FULL
    return full if columns <= MOST and full <= MORE * columns else columns


def product(values: jax.Array, matrix: jax.Array, *, precision: lax.PrecisionLike, accumulate: DTypeLike) -> jax.Array:
    """``(..., C)`` and ``(columns, C)`` to ``(..., columns)`` of dtype ``accumulate``, on a CPU."""
    columns = matrix.shape[0]
    more = filled(columns) - columns
    contract = (((values.ndim - 1,), (1,)), ((), ()))
    if more:
        matrix = jnp.pad(matrix, ((0, more), (0, 0)))
    found = lax.dot_general(values, matrix, contract, precision=precision, preferred_element_type=accumulate)
    return lax.slice_in_dim(found, 0, columns, axis=-1) if more else found
