"""Calls of `jax.lax`'s convolutions with inputs that are dilated, read as transposed 3-D convolutions.

    y[o] = sum_t stuffed[o + t * d - before] @ w[t],    stuffed[i * s] = x[i]

is the transposed convolution with the kernel turned around, of which ``ke - 1 - before`` elements are cropped in front
and ``ke - 1 - behind`` at the end. Where more is padded than that, the rest is zeros.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from conv3dt_jax._operation import run
from conv3dt_jax._spec import Conv3DTransposeSpec
from conv3dt_jax.lowerings._origin import Origin

CONV_TRANSPOSE, CONV_GENERAL_DILATED = lax.conv_transpose, lax.conv_general_dilated
"""JAX's own, whatever stands in their places later."""

ORDINARY = "it is an ordinary convolution"

LARGEST = 3
"""Spatial dimensions."""

DEFAULTS = {1: ("NHC", "HIO", "NHC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NHWDC", "HWDIO", "NHWDC")}


@dataclasses.dataclass(frozen=True)
class Call:
    """A call, in channels-last terms; ``reason`` says why it is left to JAX, and then the rest means nothing.

    ``pads`` are added to the stuffed inputs. ``flipped``: the kernel is given as that of a correlation.
    """

    original: Callable[[], jax.Array]
    reason: str = ""
    lhs: Any = None
    rhs: Any = None
    strides: tuple[int, ...] = ()
    pads: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    numbers: Any = None
    groups: int = 1
    flipped: bool = True
    precision: Any = None
    preferred: Any = None

    def outcome(self) -> tuple[jax.Array, str]:
        """Ours, or JAX's and the reason: what this package does not take, JAX may, or say what is wrong."""
        if self.reason:
            return self.original(), self.reason
        try:
            return self.run(), ""
        except (TypeError, ValueError, NotImplementedError) as error:
            return self.original(), str(error).split("\n")[0]

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(jnp.shape(operand) for operand in (self.lhs, self.rhs) if operand is not None)

    def run(self) -> jax.Array:
        """Computes it as a transposed 3-D convolution."""
        dims = len(self.strides)
        lhs_spec, _, out_spec = self.numbers
        first = lhs_spec == out_spec == tuple(range(dims + 2))  # channels first, and nothing to move
        kernel = self._kernel()
        taps = lowered(kernel.shape[:3], dims)
        effective = [(k - 1) * d + 1 for k, d in zip(taps, self.dilation, strict=True)]
        crops = [(ke - 1 - a, ke - 1 - b) for ke, (a, b) in zip(effective, self.pads, strict=True)]
        x = self.lhs if first else self.lhs.transpose(lhs_spec[0], *lhs_spec[2:], lhs_spec[1])
        spec = Conv3DTransposeSpec(
            filters=kernel.shape[-2] * self.groups,
            kernel_size=kernel.shape[:3],
            strides=lifted(self.strides, 1),
            padding=lifted([(max(a, 0), max(b, 0)) for a, b in crops], (0, 0)),
            dilation_rate=lifted(self.dilation, 1),
            groups=self.groups,
            data_format="channels_first" if first else "channels_last",
            use_bias=False,
            precision=self.precision,
            preferred_element_type=self.preferred,
        )
        y = run(
            _with_space(x, lifted(_space(x, first), 1), first),
            kernel,
            None,
            spec,
            origin=Origin(self.flipped, filters_last=self.numbers[1][0] == dims + 1),
        )
        y = _with_space(y, lowered(_space(y, first), dims), first).astype(self.preferred or self.lhs.dtype)
        if any(crop < 0 for pair in crops for crop in pair):
            beyond = [(max(-a, 0), max(-b, 0), 0) for a, b in crops]
            still = [(0, 0, 0)]
            y = lax.pad(y, jnp.zeros((), y.dtype), [*still * 2, *beyond] if first else [*still, *beyond, *still])
        if first:
            return y
        order = [0] * (dims + 2)
        for own, at in zip((0, dims + 1, *range(1, dims + 1)), out_spec, strict=True):
            order[at] = own
        return y.transpose(order)

    def _kernel(self) -> jax.Array:
        """``(kd, kh, kw, F / groups, C)``, of the transposed convolution."""
        outputs, inputs, *taps = self.numbers[1]
        at = {1: taps[-1] + 1, 2: taps[0], 3: 0}[len(taps)]
        units = range(at, at + 3 - len(taps))
        outputs, inputs, *taps = (axis + len(units) * (axis >= at) for axis in (outputs, inputs, *taps))
        axes = (*taps, *units) if len(taps) == 1 else (*units, *taps)
        # lifted first: XLA drops a transposition and a reversal that a lowering undoes, with nothing between them
        kernel = lax.expand_dims(self.rhs, units).transpose(*axes, outputs, inputs)
        if self.flipped:
            kernel = jnp.flip(kernel, (0, 1, 2))
        if self.groups == 1:
            return kernel
        *space, filters, channels = kernel.shape
        kernel = kernel.reshape(*space, self.groups, filters // self.groups, channels)
        return kernel.swapaxes(-3, -2).reshape(*space, filters // self.groups, self.groups * channels)


def _space(array: jax.Array, first: bool) -> tuple[int, ...]:
    return array.shape[2:] if first else array.shape[1:-1]


def _with_space(array: jax.Array, space: Sequence[int], first: bool) -> jax.Array:
    return array.reshape(*array.shape[:2], *space) if first else array.reshape(array.shape[0], *space, array.shape[-1])


def lifted(sizes: Sequence[Any], one: Any) -> tuple[Any, ...]:
    """Three of them: of a plane in height and width; of a line in depth, which is walked in blocks."""
    sizes = tuple(sizes)
    return {1: (*sizes, one, one), 2: (one, *sizes), 3: sizes}[len(sizes)]


def lowered(sizes: Sequence[int], dims: int) -> tuple[int, ...]:
    """The inverse of `lifted`."""
    return {1: tuple(sizes[:1]), 2: tuple(sizes[1:]), 3: tuple(sizes)}[dims]


def read_transposed(
    lhs: Any, rhs: Any, strides: Any, padding: Any, rhs_dilation: Any = None, dimension_numbers: Any = None,
    transpose_kernel: bool = False, precision: Any = None, preferred_element_type: Any = None,
    use_consistent_padding: bool = False,
) -> Call:  # fmt: skip
    """A call of `jax.lax.conv_transpose`."""
    lhs, rhs = jnp.asarray(lhs), jnp.asarray(rhs)
    consistent = {"use_consistent_padding": True} if use_consistent_padding else {}

    def original() -> jax.Array:
        meant = padding.upper() if isinstance(padding, str) else padding
        return CONV_TRANSPOSE(
            lhs, rhs, strides, meant, rhs_dilation, dimension_numbers, transpose_kernel, precision,
            preferred_element_type, **consistent,
        )  # fmt: skip

    dims = lhs.ndim - 2
    if not 1 <= dims <= LARGEST or rhs.ndim != lhs.ndim:
        return Call(original, f"it has {dims} spatial dimensions", lhs=lhs, rhs=rhs)
    numbers = lax.conv_dimension_numbers(
        lhs.shape, rhs.shape, DEFAULTS[dims] if dimension_numbers is None else dimension_numbers
    )
    dilation = (1,) * dims if rhs_dilation is None else tuple(map(operator.index, rhs_dilation))
    steps = tuple(map(operator.index, strides))
    if not len(steps) == len(dilation) == dims:
        return Call(original, "it has not a stride and a dilation for each dimension", lhs, rhs)
    taps = [rhs.shape[at] for at in numbers.rhs_spec[2:]]
    effective = [(k - 1) * d + 1 for k, d in zip(taps, dilation, strict=True)]
    pads = _pads(padding, effective, steps, use_consistent_padding)
    lhs_spec, (outputs, inputs, *rest), out_spec = numbers
    rhs_spec = (inputs, outputs, *rest) if transpose_kernel else (outputs, inputs, *rest)
    return _checked(
        Call(
            original,
            lhs=lhs,
            rhs=rhs,
            strides=steps,
            pads=pads,
            dilation=dilation,
            numbers=(lhs_spec, rhs_spec, out_spec),
            flipped=not transpose_kernel,
            precision=precision,
            preferred=preferred_element_type,
        )
    )


def _pads(
    padding: Any, effective: Sequence[int], strides: Sequence[int], consistent: bool
) -> tuple[tuple[int, int], ...]:
    """What is added to the stuffed inputs, before and behind."""
    if isinstance(padding, str):
        name = padding.upper()
        if name not in ("SAME", "VALID"):
            raise ValueError(f"`padding={padding!r}` must be 'SAME', 'VALID', or an int or a pair for each dimension.")
        return tuple(_named(name, ke, s) for ke, s in zip(effective, strides, strict=True))
    entries = [(entry, entry) if np.ndim(entry) == 0 else tuple(entry) for entry in np.atleast_1d(padding).tolist()]
    if len(entries) != len(effective) or any(len(pair) != 2 or not _are_ints(pair) for pair in entries):
        raise ValueError(f"`padding={padding!r}` must be an int or a pair for each of {len(effective)} dimensions.")
    pairs = entries
    if consistent:
        return tuple((ke - 1 - a, ke - 1 - b) for ke, (a, b) in zip(effective, pairs, strict=True))
    return tuple((a, b) for a, b in pairs)


def _are_ints(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) for value in values)


def _named(name: str, ke: int, s: int) -> tuple[int, int]:
    if name == "VALID":
        return ke - 1, s - 1 + max(ke - s, 0)
    before = ke - 1 if s > ke - 1 else math.ceil((ke + s - 2) / 2)
    return before, ke + s - 2 - before


def read_dilated(
    lhs: Any, rhs: Any, window_strides: Any, padding: Any, lhs_dilation: Any = None, rhs_dilation: Any = None,
    dimension_numbers: Any = None, feature_group_count: int = 1, batch_group_count: int = 1, precision: Any = None,
    preferred_element_type: Any = None, **more: Any,
) -> Call:  # fmt: skip
    """A call of `jax.lax.conv_general_dilated`: ours where the inputs are dilated, and the window has no strides."""

    def original() -> jax.Array:
        return CONV_GENERAL_DILATED(
            lhs, rhs, window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count,
            batch_group_count, precision, preferred_element_type, **more,
        )  # fmt: skip

    dims = getattr(lhs, "ndim", 2) - 2
    if not 1 <= dims <= LARGEST or getattr(rhs, "ndim", 0) != dims + 2:
        return Call(original, f"it has {dims} spatial dimensions")
    strides = (1,) * dims if lhs_dilation is None else tuple(map(operator.index, lhs_dilation))
    if all(s == 1 for s in strides) or any(s != 1 for s in window_strides):
        return Call(original, ORDINARY)
    if batch_group_count != 1 or isinstance(padding, str) or any(value is not None for value in more.values()):
        return Call(original, "it has batch groups, padding by name, or arguments that are not known", lhs=lhs, rhs=rhs)
    lhs, rhs = jnp.asarray(lhs), jnp.asarray(rhs)
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    return _checked(
        Call(
            original,
            lhs=lhs,
            rhs=rhs,
            strides=strides,
            pads=tuple((operator.index(a), operator.index(b)) for a, b in padding),
            dilation=(1,) * dims if rhs_dilation is None else tuple(map(operator.index, rhs_dilation)),
            numbers=tuple(numbers),
            groups=feature_group_count,
            precision=precision,
            preferred=preferred_element_type,
        )
    )


def _checked(call: Call) -> Call:
    """The call, or the same with a reason why it is left to JAX, which has its errors too."""
    lhs_spec, rhs_spec, _ = call.numbers
    lhs, rhs = call.lhs, call.rhs
    reason = ""
    if lhs.dtype != rhs.dtype:
        reason = "its operands differ in dtype"
    elif lhs.shape[lhs_spec[1]] != rhs.shape[rhs_spec[1]] * call.groups or rhs.shape[rhs_spec[0]] % call.groups:
        reason = "its channels do not fit"
    elif 0 in rhs.shape:
        reason = "its kernel is empty"
    elif not all(isinstance(size, int) for size in (*lhs.shape, *rhs.shape)):
        reason = "its sizes are symbolic"
    else:
        sizes = zip(lhs_spec[2:], rhs_spec[2:], call.strides, call.dilation, call.pads, strict=True)
        for at, tap, s, d, (a, b) in sizes:
            n, ke = lhs.shape[at], (rhs.shape[tap] - 1) * d + 1
            if n < 1 or rhs.shape[tap] < 1 or (n - 1) * s + 1 + a + b < ke or min(s, d) < 1:
                reason = "it has an empty axis"
            elif ke - 1 - a >= (n - 1) * s + ke or ke - 1 - b >= (n - 1) * s + ke:
                reason = "its padding crops all inputs"
    return dataclasses.replace(call, reason=reason) if reason else call
