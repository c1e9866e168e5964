"""The pure functions: both operations on arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from conv3dt_jax import _arguments as args
from conv3dt_jax import _operands
from conv3dt_jax._operation import run
from conv3dt_jax._spec import Conv3DSpec, Conv3DTransposeSpec

Implementation = Literal["auto", "dilated", "matmul", "phases", "winograd", "pallas"]


def conv3d_transpose(
    inputs: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    strides: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] | Sequence[Sequence[int]] = "valid",
    output_padding: int | Sequence[int] | None = None,
    dilation_rate: int | Sequence[int] = 1,
    groups: int = 1,
    data_format: str = "channels_last",
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    output_size: Sequence[int] | None = None,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Transposed 3-D convolution: the adjoint of a strided convolution, which turns small volumes into large ones.

    Per spatial axis, with input length n, kernel k, stride s, dilation d and ``ke = (k - 1) * d + 1``::

        y_full[i*s + t*d, f] += sum_c inputs[i, c] * kernel[t, f, c]     for every input i and tap t
        y = `out` elements of y_full from `lo` on, zeros past its end, + bias

    where y_full has ``full = (n - 1)*s + ke`` elements and

    ================  ==============  ==========================  ================================
    padding           output_padding  out                         lo
    ================  ==============  ==========================  ================================
    "valid"           None            n*s + max(ke - s, 0)        0
    "valid"           a               full + a                    0
    "same"            None            n*s                         max(full - out, 0) // 2
    "same"            a               full - 2*(ke//2) + a        max(full - out, 0) // 2
    (p0, p1)          a or None = 0   full - p0 - p1 + a          p0
    "circular"        None            n*s, what "same" crops      max(ke - s, 0) // 2
                                      wraps around
    ================  ==============  ==========================  ================================

    "valid" and "same" are those of Keras and TensorFlow, explicit padding is PyTorch's. An axis of length 0 gives zeros
    plus bias.

    Dimensions: N batch, (D, H, W) depth, height, width, C input channels, F filters, G groups.

    Args:
      inputs: ``(..., D, H, W, C)``, or ``(..., C, D, H, W)`` with "channels_first"; any number of batch dimensions.
      kernel: ``(kd, kh, kw, F // G, C)``, of the inputs' dtype. With G groups, block j of the input channels meets
        ``kernel[..., j-th block of C]`` and writes block j of the filters.
      bias: ``(F,)``, of the inputs' or the result's dtype.
      strides: output steps per input element; an int or three, as all sizes here.
      padding: "valid", "same" or "circular" in any case, or what is cropped from the full result: an int, 3 ints or
        3 pairs (start, end).
      output_padding: elements added at the end of each axis, below ``max(strides, dilation_rate)``. It settles which
        of the input sizes of the adjoint convolution is meant, several of which have the same output size.
      dilation_rate: output steps between two taps.
      groups: the number of groups, G.
      data_format: "channels_last" or "channels_first".
      precision: see `jax.lax.conv_general_dilated`.
      preferred_element_type: dtype of the sums and the result. None keeps the inputs' dtype, at least 32 bits wide for
        integers; float16 and bfloat16 are summed in float32 and rounded once.
      output_size: the wanted ``(D, H, W)`` of the result, in place of ``output_padding``.
      implementation: "auto", or a lowering by name: "dilated" (one `conv_general_dilated`), "matmul", "phases",
        "winograd" (at most 3 inputs to an output), or "pallas" (kernels for NVIDIA GPUs; interpreted elsewhere). All
        give the same result within rounding.

    Returns:
      ``(..., D', H', W', F)``, or ``(..., F, D', H', W')`` with "channels_first".

    Raises:
      TypeError: an argument of the wrong type, or dtypes that differ.
      ValueError: a value out of range, shapes that do not fit, or padding that leaves no output.
      NotImplementedError: a lowering chosen by name cannot take this geometry or dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> import conv3dt_jax as c3t
      >>> inputs = jnp.ones((1, 4, 5, 6, 3))
      >>> kernel = jnp.ones((2, 2, 2, 8, 3))
      >>> c3t.conv3d_transpose(inputs, kernel, strides=2).shape
      (1, 8, 10, 12, 8)
      >>> c3t.conv3d_transpose(inputs, kernel, strides=2, output_size=(9, 11, 12)).shape
      (1, 9, 11, 12, 8)

    References:
      Dumoulin and Visin, A guide to convolution arithmetic for deep learning, arXiv:1603.07285.
      Zeiler et al., Deconvolutional networks, CVPR 2010.
    """
    kernel = _operands.kernel(kernel, Conv3DTransposeSpec.kernel_layout)
    spec = Conv3DTransposeSpec(
        filters=kernel.shape[3] * args.integer("groups", groups, minimum=1),
        kernel_size=kernel.shape[:3],
        strides=strides,
        padding=padding,
        output_padding=output_padding,
        dilation_rate=dilation_rate,
        groups=groups,
        data_format=data_format,
        use_bias=bias is not None,
        precision=precision,
        preferred_element_type=preferred_element_type,
        implementation=implementation,
    )
    return run(inputs, kernel, bias, spec, output_size)


def conv3d(
    inputs: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    strides: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] | Sequence[Sequence[int]] = "valid",
    dilation_rate: int | Sequence[int] = 1,
    groups: int = 1,
    data_format: str = "channels_last",
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    implementation: Implementation = "auto",
) -> jax.Array:
    """3-D convolution, as networks call it (a cross-correlation): what `conv3d_transpose` is the adjoint of.

    Per spatial axis, with input length m, kernel k, stride s, dilation d and ``ke = (k - 1) * d + 1``::

        outputs[i, f] = sum_{t, c} inputs[i*s + t*d - lo, c] * kernel[t, c, f] + bias[f]

    zeros outside of the inputs, where

    ================  =====================================  ==========================================
    padding           outputs n                              lo
    ================  =====================================  ==========================================
    "valid"           (m - ke) // s + 1                      0
    "same"            ceil(m / s)                            max((n - 1)*s + ke - m, 0) // 2
    (p0, p1)          (m + p0 + p1 - ke) // s + 1            p0
    "circular"        ceil(m / s)                            as "same", with the other end for its zeros
    ================  =====================================  ==========================================

    "valid" and "same" are those of Keras and TensorFlow, explicit padding is PyTorch's. An axis of length 0 gives no
    outputs, or bias. The adjoint of a convolution is `conv3d_transpose` of the same kernel, arguments and
    ``output_size``: ``sum(conv3d(x, w) * y) == sum(x * conv3d_transpose(y, w, output_size=...))``; but for "circular"
    with a stride that does not divide m, which a transposed convolution does not have.

    Dimensions: N batch, (D, H, W) depth, height, width, C input channels, F filters, G groups.

    Args:
      inputs: ``(..., D, H, W, C)``, or ``(..., C, D, H, W)`` with "channels_first"; any number of batch dimensions.
      kernel: ``(kd, kh, kw, C // G, F)``, of the inputs' dtype. With G groups, block j of the input channels meets
        ``kernel[..., j-th block of F]`` and makes block j of the filters.
      bias: ``(F,)``, of the inputs' or the result's dtype.
      strides: input steps per output element; an int or three, as all sizes here.
      padding: "valid", "same" or "circular" in any case, or what is added at the ends of each axis: an int, 3 ints or
        3 pairs (start, end).
      dilation_rate: input steps between two taps.
      groups: the number of groups, G.
      data_format: "channels_last" or "channels_first".
      precision: see `jax.lax.conv_general_dilated`.
      preferred_element_type: as in `conv3d_transpose`, and so are dtypes and rounding.
      implementation: "auto", or a lowering by name; see `conv3d_transpose`.

    Returns:
      ``(..., D', H', W', F)``, or ``(..., F, D', H', W')`` with "channels_first".

    Raises:
      TypeError: an argument of the wrong type, or dtypes that differ.
      ValueError: a value out of range, shapes that do not fit, or a kernel larger than the padded inputs.
      NotImplementedError: a lowering chosen by name cannot take this geometry or dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> import conv3dt_jax as c3t
      >>> inputs = jnp.ones((1, 8, 9, 10, 3))
      >>> kernel = jnp.ones((3, 3, 3, 3, 8))
      >>> c3t.conv3d(inputs, kernel, strides=2, padding="same").shape
      (1, 4, 5, 5, 8)

    References:
      Dumoulin and Visin, A guide to convolution arithmetic for deep learning, arXiv:1603.07285.
      Lavin and Gray, Fast algorithms for convolutional neural networks, CVPR 2016 ("winograd").
    """
    kernel = _operands.kernel(kernel, Conv3DSpec.kernel_layout)
    if kernel.shape[4] % args.integer("groups", groups, minimum=1):
        raise ValueError(
            f"`kernel` of shape {kernel.shape} has {kernel.shape[4]} filters (its last axis), which `groups={groups}` "
            "does not divide; change one of them."
        )
    spec = Conv3DSpec(
        filters=kernel.shape[4],
        kernel_size=kernel.shape[:3],
        strides=strides,
        padding=padding,
        dilation_rate=dilation_rate,
        groups=groups,
        data_format=data_format,
        use_bias=bias is not None,
        precision=precision,
        preferred_element_type=preferred_element_type,
        implementation=implementation,
    )
    return run(inputs, kernel, bias, spec)


def output_shape(
    input_shape: Sequence[int],
    kernel_shape: Sequence[int],
    *,
    strides: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] | Sequence[Sequence[int]] = "valid",
    output_padding: int | Sequence[int] | None = None,
    dilation_rate: int | Sequence[int] = 1,
    groups: int = 1,
    data_format: str = "channels_last",
    output_size: Sequence[int] | None = None,
) -> tuple[int, ...]:
    """The shape of ``conv3d_transpose(inputs, kernel, ...)`` from the shapes of its operands, without computing.

    Args:
      input_shape: ``(..., D, H, W, C)``, or ``(..., C, D, H, W)`` with "channels_first".
      kernel_shape: ``(kd, kh, kw, F // G, C)``.
      strides: and all that follow: as in `conv3d_transpose`.

    Returns:
      A tuple of ints.

    Raises:
      TypeError, ValueError: as `conv3d_transpose` does.

    Example:
      >>> import conv3dt_jax as c3t
      >>> c3t.output_shape((1, 4, 5, 6, 3), (3, 3, 3, 8, 3), strides=2, padding="same")
      (1, 8, 10, 12, 8)
    """
    kernel_shape = args.shape("kernel_shape", kernel_shape)
    if len(kernel_shape) != 5:
        raise ValueError(
            f"`kernel_shape={kernel_shape}` must have 5 entries: (kd, kh, kw, filters // groups, channels)."
        )
    spec = Conv3DTransposeSpec(
        filters=kernel_shape[3] * args.integer("groups", groups, minimum=1),
        kernel_size=kernel_shape[:3],
        strides=strides,
        padding=padding,
        output_padding=output_padding,
        dilation_rate=dilation_rate,
        groups=groups,
        data_format=data_format,
    )
    input_shape = args.shape("input_shape", input_shape)
    _operands.check_shapes(spec, spec.split_shape(input_shape)[2], kernel_shape, None)
    return spec.output_shape(input_shape, output_size)
