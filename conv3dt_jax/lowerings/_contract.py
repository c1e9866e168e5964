"""The one contraction that the matrix lowerings share: channels against kernel, group by group."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike


def contract(
    pieces: jax.Array, weights: jax.Array, *, precision: lax.PrecisionLike, accumulate: DTypeLike
) -> jax.Array:
    """``out[..., t, g, f] = sum_{p, c} pieces[..., p, g, c] * weights[p, g, c, t, f]``, summed in ``accumulate``.

    Args:
      pieces: ``(N, D, H, W, P, G, C)``: P shifted copies of an input with C channels in each of G groups.
      weights: ``(P, G, C, T, F)``: for T outputs of F filters in each group.
      precision: see `jax.lax.dot_general`.
      accumulate: dtype of the sums and of the result.

    Returns:
      ``(N, D, H, W, T, G * F)``.
    """
    shifts, groups, channels, taps, filters = weights.shape
    space = pieces.shape[:4]
    if groups == 1:  # one plain matrix product
        lhs = pieces.reshape(*space, shifts * channels)
        rhs = weights.reshape(shifts * channels, taps * filters)
        out = jnp.matmul(lhs, rhs, precision=precision, preferred_element_type=accumulate)
    elif shifts == channels == 1:  # depthwise: nothing to sum, a product that fuses with what follows
        lhs = pieces.reshape(*space, 1, groups, 1).astype(accumulate)
        out = lhs * weights.transpose(0, 2, 3, 1, 4).reshape(1, 1, 1, 1, taps, groups, filters).astype(accumulate)
    else:
        out = jnp.einsum(
            "nxyzpgc,pgctf->nxyztgf", pieces, weights, precision=precision, preferred_element_type=accumulate
        )
    return out.reshape(*space, taps, groups * filters)
