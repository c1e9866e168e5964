"""Which lowerings "auto" considers for a form beside those that any form may have: what each is quick and exact for."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from conv3dt_jax.lowerings import _adjoint, _laid_out, _matmul_plans, dilated, pallas, winograd
from conv3dt_jax.lowerings._work import Call

FILTERED = (3, 64)
"""Channels and filters of `winograd`: fewer make up short sums and more are summed in pieces, with less rounding."""

SHORTEST = 256
"""Rows of a product below which XLA's convolution is quicker, where it is strided and has many channels."""

VECTOR = 8
"""Channels and filters below which XLA's convolution goes number by number."""

MANY_TAPS, FEW_ROWS, SMALL, WIDE = 25, range(49, 128), 8 << 20, 32
"""Taps, inputs, bytes of the kernel, channels and filters where XLA's own transposed convolution of a plane or a line
is as quick as `matmul` or quicker: it copies no kernel, and one thread soon has the sums of so few products."""

MORE_ROWS, FEW_PRODUCTS, CHANNELS, LINE_TAPS = range(64, 256), 3 << 19, 64, 10
"""The same for more inputs: bytes of their products, and channels; and taps of a line there."""

NINE, NINE_ROWS, NINE_WEIGHTS = 9, range(49, 288), range(1 << 12, 1 << 16)
"""The same for so many taps of a plane, of such channels: inputs, and channels times filters."""

RAGGED_PRODUCTS = 8 << 20
"""The same, of such channels, where the phases would be written apart before they are put in order and cut."""


def may_gather(form: Any, batch: Any) -> bool:
    """Whether `pallas` can do it."""
    if pallas.refusal(form.geometry, form.sums) is not None or not isinstance(batch, int):
        return False
    return pallas.takes(Call.of(form, batch, 0), form.dtypes, form.precision)


def has_short_products(form: Any, call: Call) -> bool:
    """Whether a strided convolution has patches so long that few fit a block, and channels that make products the cost.

    XLA's own convolution, which takes the whole volume at once, measured 1.3 times faster there.
    """
    plain = form.groups == 1 and all(dtype == jnp.float32 for dtype in form.dtypes)
    strided = any(axis.s > 1 for axis in form.geometry) and all(axis.d == 1 for axis in form.geometry)
    many = min(form.channels, form.filters) >= FILTERED[1]
    rows, cells = _adjoint.rows(call), call.batch * math.prod(axis.n for axis in form.geometry)
    return plain and strided and many and rows < min(SHORTEST, cells)


def may_convolve(kind: str, form: Any) -> bool:
    """Whether XLA's own convolution is quick: in planes and lines without strides, of vectors of numbers."""
    both_ways = kind in ("kernel", "gradients")
    plain = form.groups == 1 and all(dtype == jnp.float32 for dtype in (form.sums, *form.dtypes))
    return (
        plain and min(form.channels, form.filters) >= VECTOR and dilated.is_ordinary(form.geometry, both_ways=both_ways)
    )


def is_short(form: Any, call: Call) -> bool:
    """Whether the product of `matmul` is short, or is put in order twice, and XLA's own reads the kernel as it lies."""
    plain = form.groups == 1 and all(dtype == jnp.float32 for dtype in (form.sums, *form.dtypes))
    as_it_lies = form.origin.mirrored and form.origin.filters_last and not form.channels_first
    if not (plain and as_it_lies and dilated.is_transposed(form.geometry)):
        return False
    small = _matmul_plans.kernel_values(call) * call.itemsize <= SMALL
    if min(form.channels, form.filters) < WIDE or not small:
        return False
    taps, rows = math.prod(axis.k for axis in form.geometry), _matmul_plans.inputs_of(call)
    if taps >= MANY_TAPS and rows in FEW_ROWS:
        return True
    if form.channels < CHANNELS:
        return False
    line, held = dilated.is_line(form.geometry), _matmul_plans.held(call)
    more = taps >= (LINE_TAPS if line else MANY_TAPS) and rows in MORE_ROWS and held <= FEW_PRODUCTS
    nine = taps == NINE and not line and rows in NINE_ROWS and form.channels * form.filters in NINE_WEIGHTS
    return more or nine or (held <= RAGGED_PRODUCTS and _laid_out.is_written_apart(form.geometry))


def may_filter(form: Any, call: Call, gradients: int) -> bool:
    """Whether `winograd` can do it, and its rounding stays within four times that of the direct sum.

    Not where it would write cells of several outputs with the filters second, piece by piece; and not where its
    temporaries would be larger than operands and result.
    """
    if winograd.refusal(form.geometry, form.sums) is not None:
        return False
    if not gradients and form.channels_first and any(axis.s > 1 for axis in form.geometry):
        return False
    held = sum(math.prod(shape) for shape in shapes(form, call.batch)) * form.sums.itemsize
    if winograd.work(call, gradients=gradients).temporary_bytes > held:
        return False
    plain = form.sums == jnp.float32 and all(jnp.issubdtype(dtype, jnp.floating) for dtype in form.dtypes)
    configured = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    asked = configured if form.precision is None else form.precision
    default = asked in (None, "default", jax.lax.Precision.DEFAULT, (jax.lax.Precision.DEFAULT,) * 2)
    few, many = sorted((form.channels // form.groups, form.filters // form.groups))
    return plain and default and FILTERED[0] <= few and many <= FILTERED[1]


def shapes(form: Any, batch: Any) -> tuple[Any, ...]:
    """Of the inputs, the kernel and the outputs."""
    return form.inputs_shape(batch), form.kernel_shape(), form.outputs_shape(batch)
