"""A few cells of the width as one, for gradients of one or two filters: longer runs of values to copy.

The patch of a cell has runs of ``k * F`` values along the width, few where F is; those of r neighbours overlap. Taken
together, r cells are one with a stride of ``r * s``, a kernel of ``k + (r - 1) * s`` taps and ``r * C`` channels, whose
kernel holds the other one r times, s taps apart, and zeros:

    dx[i * r + j, c] = sum_{u, f} y[(i * r) * s + u - lo, f] w[u - j * s, f, c].

The same sums of the same products; two to three times as many of them are made, and half as many values are gathered.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from conv3dt_jax._geometry import Geometry

FEW_FILTERS, MOST_CHANNELS = 2, 128
"""Filters up to which runs are short; channels of all cells together beyond which zeros cost more than runs save."""

LEAST_FOR_KERNEL = 4
"""Cells at least where the kernel's gradient alone is computed, whose product runs at its pace without."""


def count(geometry: Geometry, channels: int, filters: int, groups: int, least: int = 2) -> int:
    """How many cells are taken together: a divisor of the width's, at ``least`` so many, or 1."""
    width = geometry[2]
    if filters > FEW_FILTERS or groups > 1 or channels == 1 or not width.overlaps or width.d > 1:
        return 1
    numbers = (r for r in (16, 8, 4, 2) if width.n % r == 0 and r * channels <= MOST_CHANNELS)
    r = next(numbers, 1)
    return r if r >= least else 1


def together(geometry: Geometry, r: int) -> Geometry:
    """The axes, with r cells of the width as one."""
    depth, height, width = geometry
    return depth, height, dataclasses.replace(width, n=width.n // r, k=width.k + (r - 1) * width.s, s=r * width.s)


def cells(array: jax.Array, r: int) -> jax.Array:
    """``(N, D, H, W, C)`` to ``(N, D, H, W / r, r * C)``."""
    return array.reshape(*array.shape[:3], array.shape[3] // r, -1)


def widened(kernel: jax.Array, r: int, stride: int) -> jax.Array:
    """``(kd, kh, kw, F, C)`` to ``(kd, kh, kw + (r - 1) * stride, F, r * C)``."""
    widths = [[(0, 0)] * 2 + [(j * stride, (r - 1 - j) * stride)] + [(0, 0)] * 2 for j in range(r)]
    return jnp.concatenate([jnp.pad(kernel, width) for width in widths], -1)


def narrowed(kernel: jax.Array, r: int, stride: int) -> jax.Array:
    """The transpose of `widened`."""
    taps, channels = kernel.shape[2] - (r - 1) * stride, kernel.shape[4] // r
    parts = [kernel[:, :, j * stride : j * stride + taps, :, j * channels : (j + 1) * channels] for j in range(r)]
    return jnp.stack(parts).sum(0)
