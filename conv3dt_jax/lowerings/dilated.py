"""`dilated`: one `jax.lax.conv_general_dilated` with ``lhs_dilation``; the reference lowering.

A transposed convolution is the ordinary convolution of the input, with ``s - 1`` zeros between its elements and
``ke - 1`` zeros around them, with the flipped kernel:

    y_full[p] = sum_t x_stuffed[p - t * d] * w[t],    x_stuffed[i * s] = x[i].

Less padding crops: ``ke - 1 - lo`` zeros in front keep ``y_full`` from ``lo`` on. XLA never stores the stuffed input.

Read backward it is the ordinary convolution with window strides, ``lo`` zeros in front.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from conv3dt_jax._geometry import Axis, Geometry
from conv3dt_jax.lowerings import _tiles
from conv3dt_jax.lowerings._adjoint import unwrap
from conv3dt_jax.lowerings._cells import is_still
from conv3dt_jax.lowerings._origin import AS_GIVEN, Origin
from conv3dt_jax.lowerings._products import CONV_GENERAL_DILATED
from conv3dt_jax.lowerings._transposes import transposes
from conv3dt_jax.lowerings._work import Call, Work

WRITTEN, TURNED, BEGUN = 2.5, 5, 250_000
"""What an output, a value of the kernel and a call cost on a CPU, in values of a patch; see `is_ordinary`."""


def refusal(geometry: Geometry, sums: DTypeLike) -> str | None:
    """Says why this lowering cannot take the geometry, or sums of this dtype; None where it can."""
    del geometry, sums
    return None


def outputs(
    inputs: jax.Array,
    kernel: jax.Array,
    geometry: Geometry,
    *,
    groups: int,
    precision: lax.PrecisionLike,
    accumulate: DTypeLike,
    tile_bytes: int = 0,
    result: DTypeLike | None = None,
    bias: jax.Array | None = None,
    origin: Origin = AS_GIVEN,
) -> jax.Array:
    """``(N, D, H, W, C)`` and ``(kd, kh, kw, F / groups, C)`` to ``(N, *out, F)`` of dtype ``accumulate``.

    Without groups the kernel is taken as it lies, by its ``origin``.
    """
    del tile_bytes, result  # XLA has blocks of its own; it rounds at the end
    still, moving, letters = _moving(geometry)
    paddings, windows = zip(*map(_split_crop, moving), strict=True)
    inputs, kernel = _alike(accumulate, inputs, kernel)
    origin = origin if groups == 1 else AS_GIVEN
    kernel = origin.restored(kernel)
    kernel = kernel if origin.mirrored else jnp.flip(kernel, (0, 1, 2))
    kernel = lax.squeeze(_grouped_kernel(kernel, groups), still)
    outputs = CONV_GENERAL_DILATED(
        lax.squeeze(inputs, [dim + 1 for dim in still]),
        kernel,
        window_strides=(1,) * len(moving),
        padding=paddings,
        lhs_dilation=[axis.s for axis in moving],
        rhs_dilation=[axis.d for axis in moving],
        dimension_numbers=(f"N{letters}C", letters + ("IO" if origin.filters_last else "OI"), f"N{letters}C"),
        feature_group_count=groups,
        precision=precision,
        preferred_element_type=accumulate,
    )
    for dim, (axis, (low, high)) in enumerate(zip(moving, windows, strict=True), start=1):
        outputs = _fold(outputs, dim, axis) if axis.wraps else _crop(outputs, dim, low, high)
    return _tiles.plus(lax.expand_dims(outputs, [dim + 1 for dim in still]), bias)


def _moving(geometry: Geometry) -> tuple[list[int], list[Axis], str]:
    """The axes that stay one, which a convolution goes without; the others, and their letters."""
    still = [dim for dim, axis in enumerate(geometry) if _is_still(axis)][:2]
    moving = [axis for dim, axis in enumerate(geometry) if dim not in still]
    return still, moving, "".join(letter for dim, letter in enumerate("DHW") if dim not in still)


def _is_still(axis: Axis) -> bool:
    """Whether an axis of one element stays one: XLA has better convolutions of planes and lines than of volumes."""
    return is_still(axis) and axis.s == 1 and axis.lo == 0 and not axis.wraps


def is_ordinary(geometry: Geometry, *, both_ways: bool) -> bool:
    """Whether it is a convolution without strides of a plane or a line that the kernel fits into.

    For these XLA:CPU has a product of patches that runs in all threads; volumes and stuffed zeros it walks one by one,
    and a kernel that is longer than its input takes the input's place. In the gradient of the kernel the cotangent is
    one: with ``both_ways`` that fits too.
    """
    if not all(isinstance(axis.out, int) and axis.s == 1 and not axis.wraps for axis in geometry):
        return False
    if not any(map(_is_still, geometry)) or any(axis.ke > axis.n for axis in geometry):
        return False
    return not both_ways or all(sum(_split_crop(axis)[0]) < axis.ke for axis in geometry)


def is_transposed(geometry: Geometry) -> bool:
    """Whether it is a plane or a line with strides and no more taps than inputs.

    For these XLA:CPU has one product of inputs and taps, which all threads make and one adds up. Where there are more
    taps it exchanges the operands and walks.
    """
    if not all(isinstance(axis.out, int) and axis.d == 1 and not axis.wraps for axis in geometry):
        return False
    inputs, taps = (math.prod(sizes) for sizes in zip(*((axis.n, axis.k) for axis in geometry), strict=True))
    return any(map(_is_still, geometry)) and any(axis.s > 1 for axis in geometry) and taps <= inputs


def is_line(geometry: Geometry) -> bool:
    """Whether one axis moves at most."""
    return len(_moving(geometry)[1]) == 1


def work(call: Call, *, gradients: int) -> Work:
    """The multiply-adds of the definition; XLA keeps no temporary of its own where it can help it."""
    inputs = call.batch * math.prod(axis.n for axis in call.geometry)
    taps = math.prod(axis.k for axis in call.geometry)
    multiply_adds = inputs * taps * call.channels * call.filters // call.groups
    kernel = taps * call.channels * call.filters // call.groups
    outputs = call.batch * math.prod(axis.out for axis in call.geometry)
    values = outputs * (taps * call.channels + WRITTEN * call.filters) + TURNED * kernel + BEGUN
    return Work(multiply_adds * max(gradients, 1), int(values * max(gradients, 1)), kernel * call.itemsize)


def gradients(
    inputs: jax.Array | None,
    kernel: jax.Array | None,
    cotangent: jax.Array,
    geometry: Geometry,
    channels: int,
    **static: Any,
) -> tuple[jax.Array | None, jax.Array | None]:
    """See `_adjoint.gradients`: a convolution, and the transpose of `outputs` in the kernel as JAX finds it."""
    dx = None if kernel is None else _backward(cotangent, kernel, geometry, **static)
    _, dw = transposes(outputs, inputs, None, cotangent, geometry, channels, **static)
    return dx, dw


def _backward(
    cotangent: jax.Array,
    kernel: jax.Array,
    geometry: Geometry,
    *,
    groups: int,
    precision: lax.PrecisionLike,
    accumulate: DTypeLike,
    tile_bytes: int = 0,
    result: DTypeLike | None = None,
) -> jax.Array:
    """``(N, *out, F)`` and ``(kd, kh, kw, F / groups, C)`` to ``(N, D, H, W, C)`` of dtype ``accumulate``."""
    del tile_bytes, result
    cotangent, kernel = _alike(accumulate, cotangent, kernel)
    still, moving, letters = _moving(geometry)
    cotangent = lax.squeeze(cotangent, [dim + 1 for dim in still])
    paddings = []
    for dim, axis in enumerate(moving, start=1):
        if axis.wraps:
            cotangent = unwrap(cotangent, dim, axis)
        lo = 0 if axis.wraps else axis.lo
        around = (lo, axis.full - lo - cotangent.shape[dim])
        if not all(isinstance(size, int) for size in around):  # as in _split_crop
            cotangent, around = _padded(cotangent, dim, *around), (0, 0)
        paddings.append(around)
    inputs = lax.conv_general_dilated(
        cotangent,
        lax.squeeze(kernel, still),
        window_strides=[axis.s for axis in moving],
        padding=paddings,
        rhs_dilation=[axis.d for axis in moving],
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        feature_group_count=groups,
        precision=precision,
        preferred_element_type=accumulate,
    )
    return lax.expand_dims(inputs, [dim + 1 for dim in still])


def _alike(accumulate: DTypeLike, *operands: jax.Array) -> list[jax.Array]:
    """A convolution of XLA's takes operands of one dtype."""
    dtype = operands[0].dtype if operands[0].dtype == operands[1].dtype else _tiles.widest(accumulate, *operands)
    return [operand.astype(dtype) for operand in operands]


def _grouped_kernel(kernel: jax.Array, groups: int) -> jax.Array:
    """Moves the groups from the input channels to the filters, where `conv_general_dilated` wants them."""
    if groups == 1:
        return kernel
    *window, filters, channels = kernel.shape
    kernel = kernel.reshape(*window, filters, groups, channels // groups)
    return jnp.moveaxis(kernel, 4, 3).reshape(*window, groups * filters, channels // groups)


def _split_crop(axis: Axis) -> tuple[tuple[int, int], tuple[int, int]]:
    """Splits the crop of an axis between the padding of the convolution and a slice after it.

    The convolution keeps at least one zero of padding at each end. XLA:CPU (jaxlib 0.10.2) swaps the operands of a
    convolution whose kernel is longer than its input; it takes an unpadded axis with a kernel of 2 and a dilation of 2
    for a batch dimension on the way and ends the process.
    """
    if axis.wraps:
        return (axis.ke - 1, axis.ke - 1), (0, 0)
    crop_low, crop_high = axis.lo, axis.full - axis.out - axis.lo
    if not all(isinstance(crop, int) for crop in (crop_low, crop_high)):  # the convolution takes no symbolic padding
        return (axis.ke - 1, axis.ke - 1), (crop_low, crop_high)
    most = max(axis.ke - 2, 0)
    inside_low, inside_high = min(crop_low, most), min(crop_high, most)
    padding = (axis.ke - 1 - inside_low, axis.ke - 1 - inside_high)
    return padding, (crop_low - inside_low, crop_high - inside_high)


def _crop(outputs: jax.Array, dim: int, low: Any, high: Any) -> jax.Array:
    if all(isinstance(crop, int) for crop in (low, high)):
        return outputs if low == high == 0 else lax.slice_in_dim(outputs, low, outputs.shape[dim] - high, axis=dim)
    return _padded(outputs, dim, -low, -high)


def _padded(array: jax.Array, dim: int, low: Any, high: Any) -> jax.Array:
    """Zeros around an axis, or less of it; sizes may be symbolic."""
    config = [(low, high, 0) if i == dim else (0, 0, 0) for i in range(array.ndim)]
    return lax.pad(array, jnp.zeros((), array.dtype), config)


def _fold(outputs: jax.Array, dim: int, axis: Axis) -> jax.Array:
    """Adds up the full result modulo ``out`` and starts it at ``lo``: circular padding."""
    length, out = outputs.shape[dim], axis.out
    turns = -(-length // out)
    padding = [(0, 0)] * outputs.ndim
    padding[dim] = (0, turns * out - length)
    outputs = jnp.pad(outputs, padding)
    outputs = outputs.reshape(*outputs.shape[:dim], turns, out, *outputs.shape[dim + 1 :]).sum(dim)
    return jnp.roll(outputs, -axis.lo, dim)
