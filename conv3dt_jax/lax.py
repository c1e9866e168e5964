"""`jax.lax.conv_transpose`, argument for argument, computed by this package: for one, two and three spatial dimensions.

>>> import jax.numpy as jnp
>>> import conv3dt_jax as c3t
>>> c3t.lax.conv_transpose(jnp.ones((1, 8, 8, 16)), jnp.ones((4, 4, 16, 3)), (2, 2), "SAME").shape
(1, 16, 16, 3)
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.lax import ConvGeneralDilatedDimensionNumbers, PrecisionLike
from jax.typing import DTypeLike

from conv3dt_jax import _lifted

__all__ = ["conv_transpose"]


def conv_transpose(
    lhs: jax.Array,
    rhs: jax.Array,
    strides: Sequence[int],
    padding: str | Sequence[int] | Sequence[tuple[int, int]],
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: ConvGeneralDilatedDimensionNumbers = None,
    transpose_kernel: bool = False,
    precision: PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    use_consistent_padding: bool = False,
) -> jax.Array:
    """The function of that name in `jax.lax`, with its signature and its results to rounding, and faster.

    It is a fractionally strided convolution: without ``transpose_kernel`` the kernel is not turned around. One and two
    spatial dimensions are lifted to three by axes of length one, which costs nothing.

    One thing differs: "same" and "valid" mean what "SAME" and "VALID" mean. `jax.lax` refuses them with strides, and
    without computes something else, without a word.

    Args:
      lhs: the inputs, by default ``(N, W, C)``, ``(N, H, W, C)`` or ``(N, D, H, W, C)``.
      rhs: the kernel, by default ``(W, I, O)``, ``(H, W, I, O)`` or ``(D, H, W, I, O)``.
      strides: output steps per input element, one for each spatial dimension.
      padding: "SAME" or "VALID", of the convolution that this transposes; or what is added to the stuffed inputs, an
        int or a pair for each spatial dimension. With ``use_consistent_padding`` these too are of the convolution that
        this transposes.
      rhs_dilation: steps between two taps, one for each spatial dimension.
      dimension_numbers: as in `jax.lax.conv_general_dilated`.
      transpose_kernel: turns the kernel around and exchanges its channels, which gives the transpose of a convolution.
      precision: as in `jax.lax.conv_general_dilated`.
      preferred_element_type: dtype of sums and result; None keeps that of the inputs.
      use_consistent_padding: see ``padding``.

    Returns:
      The convolution, in the layout of the third of the ``dimension_numbers``.

    Raises:
      TypeError, ValueError: as `jax.lax.conv_transpose` does; an unknown ``padding``, or one that has not an entry for
        each spatial dimension.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import conv3dt_jax as c3t
      >>> x, w = jnp.ones((2, 5, 3)), jnp.ones((4, 3, 7))
      >>> y = c3t.lax.conv_transpose(x, w, (2,), "VALID")
      >>> y.shape, bool((y == jax.lax.conv_transpose(x, w, (2,), "VALID")).all())
      ((2, 12, 7), True)

    Source:
      `jax.lax.conv_transpose`; the lowerings are those of `conv3d_transpose`.
    """
    call = _lifted.read_transposed(
        lhs, rhs, strides, padding, rhs_dilation, dimension_numbers, transpose_kernel, precision,
        preferred_element_type, use_consistent_padding,
    )  # fmt: skip
    return call.outcome()[0]
