"""`phases`: each output phase is an ordinary convolution of the input; all phases in one matrix product.

Output position ``p = m * s + r`` is reached by the taps with ``t * d = a * s + r``, from input ``m - a``:

    y_full[m * s + r] = sum_a x[m - a] @ w[a, r],        w[a, r] = the tap at offset a * s + r, or 0.

The shifts ``x[m - a]`` are gathered side by side, multiplied with the kernels of all residues at once, and the phases
are interleaved. No inserted zero of the input is multiplied; where ``s`` does not divide ``k`` a few taps are zeros.
Along the depth the shifts are added one after the other, which keeps the gathered copy small.

Best where outputs overlap: the temporary holds ``ceil(k / s)`` values per input, channel and axis (height and width).
"""

from __future__ import annotations

import functools
import itertools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from conv3dt_jax._geometry import Axis, Geometry, tap_phases
from conv3dt_jax.lowerings._contract import contract
from conv3dt_jax.lowerings._depth_to_space import depth_to_space


def refusal(geometry: Geometry) -> str | None:
    """Says why this lowering cannot take the geometry; None where it can."""
    if not all(isinstance(axis.out, int) for axis in geometry):
        return "it cuts the input into blocks and needs spatial sizes that are known when it is traced"
    return None


def blocks(axis: Axis) -> list[int]:
    """The distinct shifts ``a`` of the input that an axis needs."""
    return sorted({block for block, _ in tap_phases(axis)})


def residues(axis: Axis) -> list[int]:
    """The residues ``r`` that have a tap."""
    return sorted({residue for _, residue in tap_phases(axis)})


def lower(
    inputs: jax.Array,
    kernel: jax.Array,
    geometry: Geometry,
    *,
    groups: int,
    precision: lax.PrecisionLike,
    accumulate: DTypeLike,
) -> jax.Array:
    """``(N, D, H, W, C)`` and ``(kd, kh, kw, F / groups, C)`` to ``(N, *out, F)`` of dtype ``accumulate``."""

    def multiply(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
        weights = _phase_kernels(kernel, geometry, groups)
        parts = []
        for shift, weight in zip(blocks(geometry[0]), weights, strict=True):
            pieces = _gather(_shift(inputs, 1, geometry[0], shift), geometry, groups)
            parts.append(contract(pieces, weight, precision=precision, accumulate=accumulate))
        return functools.reduce(jnp.add, parts)

    if math.prod(len(blocks(axis)) for axis in geometry) > 1:
        multiply = jax.checkpoint(multiply)  # derivatives gather the shifts anew and keep only inputs and kernel
    phases = multiply(inputs, kernel)
    return _interleave(phases, geometry)


def window_length(axis: Axis) -> int:
    """The number of blocks ``m`` along an axis."""
    first, last = _window(axis)
    return last - first


def _window(axis: Axis) -> tuple[int, int]:
    """The range of ``m`` whose phases cover the kept window."""
    if axis.wraps:
        return 0, axis.n
    return axis.lo // axis.s, -(-(axis.lo + axis.out) // axis.s)


def _shift(inputs: jax.Array, dim: int, axis: Axis, shift: int) -> jax.Array:
    """``x[m - shift]`` for every ``m`` of the window, zeros (or the other end) outside the input."""
    if axis.wraps:
        return jnp.roll(inputs, shift, dim)
    first, last = _window(axis)
    padding = [(0, 0, 0)] * inputs.ndim
    padding[dim] = (shift - first, last - shift - axis.n, 0)
    return lax.pad(inputs, jnp.zeros((), inputs.dtype), padding)


def _gather(inputs: jax.Array, geometry: Geometry, groups: int) -> jax.Array:
    """Stacks the shifts along height and width: ``(N, D, H, W, C)`` to ``(N, D, mh, mw, P, groups, C / groups)``."""
    rows = [_shift(inputs, 2, geometry[1], shift) for shift in blocks(geometry[1])]
    pieces = [_shift(row, 3, geometry[2], shift) for row, shift in itertools.product(rows, blocks(geometry[2]))]
    stacked = jnp.stack(pieces, 4)
    return stacked.reshape(*stacked.shape[:5], groups, -1)


def _phase_kernels(kernel: jax.Array, geometry: Geometry, groups: int) -> jax.Array:
    """``(kd, kh, kw, F / groups, C)`` to ``(ad, ah * aw, groups, C / groups, rd * rh * rw, F / groups)``."""
    for dim, axis in zip((0, 2, 4), geometry, strict=True):
        kernel = _split_taps(kernel, dim, axis)
    ad, rd, ah, rh, aw, rw, filters, channels = kernel.shape
    kernel = kernel.reshape(ad, rd, ah, rh, aw, rw, filters, groups, channels // groups)
    return kernel.transpose(0, 2, 4, 7, 8, 1, 3, 5, 6).reshape(ad, ah * aw, groups, -1, rd * rh * rw, filters)


def _split_taps(kernel: jax.Array, dim: int, axis: Axis) -> jax.Array:
    """Splits the tap axis at ``dim`` into (blocks, residues), zeros where no tap falls."""
    shape = (len(blocks(axis)), len(residues(axis)))
    if axis.d == 1 or axis.s == 1:  # taps are consecutive: fill the last block up
        padding = [(0, 0)] * kernel.ndim
        padding[dim] = (0, math.prod(shape) - axis.k)
        kernel = jnp.pad(kernel, padding)
    else:
        taps = dict(zip(tap_phases(axis), lax.split(kernel, (1,) * axis.k, dim), strict=True))
        zero = jnp.zeros_like(taps[0, 0])
        kernel = jnp.concatenate(
            [taps.get(phase, zero) for phase in itertools.product(blocks(axis), residues(axis))], dim
        )
    return kernel.reshape(*kernel.shape[:dim], *shape, *kernel.shape[dim + 1 :])


def _interleave(phases: jax.Array, geometry: Geometry) -> jax.Array:
    """``(N, md, mh, mw, rd * rh * rw, F)`` to the kept window ``(N, *out, F)``."""
    batch, *space, _, filters = phases.shape
    counts = [len(residues(axis)) for axis in geometry]
    phases = phases.reshape(batch, *space, *counts, filters).transpose(0, 1, 4, 2, 5, 3, 6, 7)
    for dim, axis in enumerate(geometry, start=1):
        phases = _interleave_axis(phases, dim, axis)
    return phases


def _interleave_axis(phases: jax.Array, dim: int, axis: Axis) -> jax.Array:
    """Turns the axes ``(m, r)`` at ``dim`` into one of length ``out``."""
    outputs = depth_to_space(phases, dim, residues(axis), axis.s)
    if axis.wraps:
        return jnp.roll(outputs, -axis.lo, dim)
    start = axis.lo - _window(axis)[0] * axis.s
    return lax.slice_in_dim(outputs, start, start + axis.out, axis=dim)
