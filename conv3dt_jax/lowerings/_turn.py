"""The same sums from the other side: without strides, outputs and inputs of the trilinear form change places."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def turned_kernel(kernel: jax.Array, groups: int) -> jax.Array:
    """``(kd, kh, kw, A / G, B)``, turned around in space, as ``(kd, kh, kw, B / G, A)``; twice is no change."""
    *window, each, many = kernel.shape
    kernel = jnp.flip(kernel, (0, 1, 2)).reshape(*window, each, groups, many // groups)
    return kernel.transpose(0, 1, 2, 5, 4, 3).reshape(*window, many // groups, each * groups)
