"""Checks of the arrays of one call, against each other and against the spec; and the dtypes that follow from them."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from conv3dt_jax._convolution_spec import ConvolutionSpec
from conv3dt_jax._geometry import Geometry


def array(name: str, value: Any) -> jax.Array:
    """An array argument as a JAX array of numbers; lists, scalars and other frameworks' tensors are refused."""
    if not isinstance(value, jax.Array | np.ndarray) and not hasattr(value, "__jax_array__"):
        raise TypeError(
            f"`{name}` must be a JAX or NumPy array, not {type(value).__name__}; convert it with jnp.asarray."
        )
    dtype = getattr(value, "dtype", None) or jnp.asarray(value).dtype
    if not jnp.issubdtype(dtype, jnp.number):
        raise TypeError(f"`{name}` must hold numbers, not {dtype}; cast it to a float or integer dtype.")
    return jnp.asarray(value)


def kernel(value: Any, channels: str) -> jax.Array:
    """The kernel as an array of rank 5, whose last two axes are ``channels``."""
    kernel = array("kernel", value)
    if kernel.ndim != 5:
        raise ValueError(
            f"`kernel` has rank {kernel.ndim} (shape {kernel.shape}); it must be "
            f"(kernel depth, kernel height, kernel width, {channels})."
        )
    if 0 in kernel.shape:
        raise ValueError(f"`kernel` has shape {kernel.shape}; every one of its sizes must be at least 1.")
    return kernel


def check_shapes(spec: ConvolutionSpec, channels: int, kernel_shape: tuple[int, ...], bias: jax.Array | None) -> None:
    """Channels of the inputs, kernel and bias must fit each other and the spec."""
    if channels != spec.channels_of(kernel_shape):
        raise ValueError(
            f"the inputs have {channels} channels, but the kernel of shape {tuple(kernel_shape)} takes "
            f"{spec.channels_of(kernel_shape)} ({spec.channels_from}; `data_format={spec.data_format!r}`)."
        )
    expected = spec.kernel_shape(channels)
    if tuple(kernel_shape) != expected:
        raise ValueError(f"the kernel has shape {tuple(kernel_shape)}, but the specification wants {expected}.")
    if bias is not None and bias.shape != (spec.filters,):
        raise ValueError(
            f"`bias` has shape {bias.shape}; it must be ({spec.filters},): one value per filter "
            f"({spec.filters_from} of them)."
        )


def check_bias_given(spec: ConvolutionSpec, bias: Any) -> None:
    """A bias stands beside a spec that has one, and beside no other."""
    if spec.use_bias != (bias is not None):
        raise ValueError(f"`spec.use_bias={spec.use_bias}`, but a bias is {'missing' if bias is None else 'given'}.")


def check_size(geometry: Geometry, shape: tuple[int, ...], channels: int, dtype: np.dtype) -> None:
    """XLA ends the process over arrays whose bytes it cannot count in 63 bits."""
    if not all(isinstance(size, int) for size in (*shape, *(axis.out for axis in geometry))):
        return
    sizes = tuple(max(axis.out, axis.full) for axis in geometry)
    if math.prod(shape[:-4]) * math.prod(sizes) * channels * dtype.itemsize >= 2**63:
        raise ValueError(
            f"{tuple(axis.out for axis in geometry)} voxels with {channels} channels or filters have "
            "more bytes than can be addressed; reduce `strides`, `dilation_rate` or the kernel's size."
        )


def result_dtypes(spec: ConvolutionSpec, inputs: Any, kernel: Any) -> tuple[np.dtype, np.dtype]:
    """``(dtype of the sums, dtype of the result)``.

    16-bit floats are summed in float32 and returned in their own dtype; integers narrower than 32 bits are summed and
    returned in 32 bits, for nothing narrower holds a sum of their products; the others keep their dtype.
    """
    if inputs.dtype != kernel.dtype:
        raise TypeError(
            f"`inputs` have dtype {inputs.dtype} and `kernel` has dtype {kernel.dtype}; they must be the same. "
            f"Cast one of them, for instance kernel.astype(inputs.dtype)."
        )
    dtype = inputs.dtype
    if jnp.issubdtype(dtype, jnp.floating):
        sums, result = (jnp.dtype(jnp.float32) if dtype.itemsize < 4 else dtype), dtype
    elif jnp.issubdtype(dtype, jnp.integer) and dtype.itemsize < 4:
        sums = jnp.dtype(jnp.uint32 if jnp.issubdtype(dtype, jnp.unsignedinteger) else jnp.int32)
        result = sums
    else:
        sums, result = dtype, dtype
    preferred = spec.preferred_element_type
    if preferred is None:
        return sums, result
    _check_preferred(dtype, preferred)
    return (sums if preferred.itemsize < sums.itemsize else preferred), preferred


def _check_preferred(dtype: np.dtype, preferred: np.dtype) -> None:
    """The combinations that `jax.lax.conv_general_dilated` takes."""
    kinds = (jnp.signedinteger, jnp.unsignedinteger, jnp.floating, jnp.complexfloating)
    same_kind = any(jnp.issubdtype(dtype, kind) and jnp.issubdtype(preferred, kind) for kind in kinds)
    widening = jnp.issubdtype(dtype, jnp.integer) and jnp.issubdtype(preferred, jnp.floating)
    if not (same_kind or widening) or preferred.itemsize < dtype.itemsize:
        raise TypeError(
            f"`preferred_element_type={preferred.name}` cannot hold a result of {dtype.name} inputs; it must be of the "
            "same kind (or a float for integers) and not narrower."
        )


def check_bias_dtype(bias: jax.Array, operand: np.dtype, result: np.dtype) -> None:
    if bias.dtype not in (operand, result):
        allowed = str(result) if operand == result else f"{operand} or {result}"
        raise TypeError(f"`bias` has dtype {bias.dtype}; it must be {allowed}, as the inputs or the result are.")
