"""A product of values and a kernel; on a CPU by whichever of XLA's two libraries is quicker.

XLA:CPU multiplies float32 matrices by YNNPACK (jaxlib 0.10.1 to 0.12.0), which makes columns by the dozen and takes the
last few almost one by one. A convolution with a window of one becomes a product too, but so late that Eigen makes it,
whose time does not depend on the columns, and varies less. Short products are for YNNPACK: Eigen packs both operands.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

EVEN = 64
"""Columns of which a multiple leaves none over."""

LEAST, ROWS = 12_000_000, 128
"""Multiply-adds and rows from which on products of other columns are for Eigen."""

EVEN_LEAST, EVEN_ROWS, EVEN_CHANNELS = 30_000_000, 256, (64, 256)
"""The same for a multiple of them, and the channels that these are summed over."""

MANY_ROWS = 2048
"""Rows from which on they may be summed over more channels: YNNPACK takes longer for each then."""

ALIKE = 2048
"""Columns of which no multiple is for Eigen: those of all channels share their lines in the cache then, and it takes up
to twice as long."""

PLANE_ROWS, PLANE_CHANNELS, PLANE_COLUMNS = 1024, 256, 128
"""The least of a product of a kernel and planes for Eigen."""

BATCHED, NARROW, FEW_ROWS = 4_000_000, 4, 8
"""Multiply-adds up to which the planes of several samples are not brought together first; where the kernel, of which
each sample has a copy then, has no more rows than so many times the values of a plane. And channels for each row from
which on the inputs are so much that to move them takes longer than any such product."""

TURNED = 1024
"""Rows from which on either is worth a turned copy of a kernel whose channels lie last, as YNNPACK reads it."""

FULL, MOST = 32, 64
"""Columns that YNNPACK makes together, and columns up to which it shows that some are not."""

MORE = 1.2
"""Times the columns that may be made: more zeros would cost what they save."""

CONV_GENERAL_DILATED = lax.conv_general_dilated
"""JAX's own, whatever stands in its place later (`_accelerate`)."""

Product = Callable[..., jax.Array]
"""`plain` or `on_cpu`."""


def plain(values: jax.Array, kernel: jax.Array, dim: int, *, precision: Any, accumulate: DTypeLike) -> jax.Array:
    """``(..., C)`` and a kernel whose axis ``dim`` are the channels: ``(..., *the other axes)``, of ``accumulate``."""
    contract = (((values.ndim - 1,), (dim,)), ((), ()))
    if dim < kernel.ndim - 1:
        return lax.dot_general(values, kernel, contract, precision=precision, preferred_element_type=accumulate)
    window, contract = kernel.shape[:-1], (((values.ndim - 1,), (1,)), ((), ()))
    matrix = kernel.reshape(-1, kernel.shape[-1])  # a matrix first: XLA would move the channels to the front
    found = lax.dot_general(values, matrix, contract, precision=precision, preferred_element_type=accumulate)
    return found.reshape(*values.shape[:-1], *window)


def on_cpu(values: jax.Array, kernel: jax.Array, dim: int, *, precision: Any, accumulate: DTypeLike) -> jax.Array:
    """The same, for what is not transposed: the transpose of a convolution is one whose window is the cotangent."""
    others = kernel.shape[:dim] + kernel.shape[dim + 1 :]
    columns, channels = math.prod(others), kernel.shape[dim]
    rows = math.prod(values.shape[:-1])
    turned = dim == kernel.ndim - 1
    if is_for_eigen(rows, channels, columns, accumulate, values.dtype, kernel.dtype, turned=turned):
        matrix = jnp.moveaxis(kernel, dim, 0).reshape(channels, columns)
        found = _by_eigen(values.reshape(rows, channels), matrix, precision, accumulate)
    elif filled(columns) > columns:
        matrix = jnp.moveaxis(kernel, dim, -1).reshape(columns, channels)
        matrix = jnp.pad(matrix, ((0, filled(columns) - columns), (0, 0)))
        found = plain(values, matrix, 1, precision=precision, accumulate=accumulate)
        found = lax.slice_in_dim(found, 0, columns, axis=-1)
    else:
        return plain(values, kernel, dim, precision=precision, accumulate=accumulate)
    return found.reshape(*values.shape[:-1], *others)


def of_planes(kernel: jax.Array, planes: jax.Array, *, precision: Any, accumulate: DTypeLike) -> jax.Array:
    """``(rows, C)`` times ``(C, values of the planes)``, on a CPU."""
    rows, channels = kernel.shape
    columns = planes.shape[1]
    many = rows >= PLANE_ROWS and channels >= PLANE_CHANNELS and columns >= PLANE_COLUMNS
    plain32 = all(jnp.dtype(dtype) == jnp.float32 for dtype in (accumulate, kernel.dtype, planes.dtype))
    if many and plain32 and columns % ALIKE:
        return _by_eigen(kernel, planes, precision, accumulate)
    return plain(kernel, planes, 0, precision=precision, accumulate=accumulate)


def of_each(kernel: jax.Array, planes: jax.Array, *, precision: Any, accumulate: DTypeLike) -> jax.Array:
    """``(rows, C)`` times ``(N, C, values)``: ``(N, rows, values)``."""
    kernels = jnp.broadcast_to(kernel, (planes.shape[0], *kernel.shape))
    contract = (((2,), (1,)), ((0,), (0,)))
    return lax.dot_general(kernels, planes, contract, precision=precision, preferred_element_type=accumulate)


def is_batched(samples: int, rows: int, channels: int, values: int) -> bool:
    """Whether `of_each` is quicker than `of_planes`, which takes a copy of all planes."""
    short = samples * rows * channels * values <= BATCHED and rows <= NARROW * values
    return samples > 1 and (short or rows * FEW_ROWS <= channels)


def _by_eigen(values: jax.Array, matrix: jax.Array, precision: Any, accumulate: DTypeLike) -> jax.Array:
    """As a convolution with a window of one, of a sample: XLA makes no product of others in loops."""
    found = CONV_GENERAL_DILATED(
        values[None],
        matrix[None],
        window_strides=(1,),
        padding="VALID",
        dimension_numbers=("NWC", "WIO", "NWC"),
        precision=precision,
        preferred_element_type=accumulate,
    )
    return found[0]


def is_for_eigen(rows: Any, channels: int, columns: int, *dtypes: DTypeLike, turned: bool = False) -> bool:
    """Whether Eigen is the quicker one, with a kernel that is turned for it; the number of rows may be symbolic."""
    if not isinstance(rows, int) or any(jnp.dtype(dtype) != jnp.float32 for dtype in dtypes):
        return False
    multiply_adds = rows * channels * columns
    if turned and rows < TURNED:
        return False
    if columns % EVEN:
        return rows >= ROWS and multiply_adds >= LEAST
    if columns % ALIKE == 0 or rows < EVEN_ROWS or multiply_adds < EVEN_LEAST:
        return False
    least, most = EVEN_CHANNELS
    return least <= channels <= most or (channels > most and rows >= MANY_ROWS)


def filled(columns: int) -> int:
    """The columns to make of a product by YNNPACK, so that none are left over.

    Of 27, three filters and nine taps, the last three cost more than five zeros beside them.
    """
    full = -(-columns // FULL) * FULL
    return full if columns <= MOST and full <= MORE * columns else columns


def as_read(matrices: jax.Array, rows: Any, *dtypes: DTypeLike) -> tuple[jax.Array, int]:
    """``(..., columns, C)``, turned where each step of a loop would turn them; and which of the two axes is C."""
    *_, columns, channels = matrices.shape
    if is_for_eigen(rows, channels, columns, matrices.dtype, *dtypes):
        return matrices.swapaxes(-1, -2), 0
    return matrices, 1
