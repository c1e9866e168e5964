"""One channel in each group: no sum over channels, so no product of matrices, but one pass over the outputs.

    y[m * s + r, f] = sum_a x[m - a, f] w[a, r, f],

with the shifts a and the residues r of `phases`. Written with the residues as axes of their own, all of it is one
elementwise expression: XLA fuses it into one parallel loop that reads the inputs from the cache and holds nothing.

So is the gradient for the inputs, where each group has one filter too: a sum over the taps,

    dx[i, c] = sum_t y[i * s + t * d - lo, c] w[t, c].
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from conv3dt_jax._geometry import Geometry
from conv3dt_jax.lowerings import _tiles
from conv3dt_jax.lowerings._cells import aligned, cells, extend, shifts


def takes(geometry: Geometry, channels: int, groups: int) -> bool:
    """Whether `outputs` is defined, and a program of moderate size."""
    terms = math.prod(len(shifts(aligned(axis)[0])) for axis in geometry)
    return channels == groups and terms <= _tiles.MOST_SLICES


def outputs(
    inputs: jax.Array,
    kernel: jax.Array,
    geometry: Geometry,
    phase_taps: Callable[..., jax.Array],
    *,
    sums: DTypeLike,
    result: DTypeLike,
    bias: jax.Array | None,
    channels_first: bool,
) -> jax.Array:
    """``(N, D, H, W, C)`` and ``(kd, kh, kw, F / C, C)`` to ``(N, *out, F)``, or ``(N, F, *out)``.

    ``phase_taps(kernel, dim, axis, residues)`` replaces the taps at ``dim`` by (shifts, residues).
    """
    begun = [aligned(axis) for axis in geometry]
    axes, early = (begun[0][0], begun[1][0], begun[2][0]), [crop for _, crop in begun]
    each = kernel.shape[3]
    inputs = inputs.astype(sums)
    if inputs.shape[-1] > 1 and each > 1:
        inputs = jnp.repeat(inputs, each, -1)
    inputs = extend(inputs, axes)
    taps = jnp.swapaxes(kernel.astype(sums), 3, 4).reshape(*kernel.shape[:3], -1)
    for dim, axis in zip((0, 2, 4), axes, strict=True):
        taps = phase_taps(taps, dim, axis, range(axis.s))
    taps = lax.optimization_barrier(taps.transpose(0, 2, 4, 1, 3, 5, 6))  # (a, a, a, r, r, r, F)
    size = [cells(axis) for axis in axes]
    terms: list[Any] = []
    for place in itertools.product(*(enumerate(shifts(axis)) for axis in axes)):
        offsets = [shifts(axis)[-1] - a for axis, (_, a) in zip(axes, place, strict=True)]
        ends = [offset + n for offset, n in zip(offsets, size, strict=True)]
        x = lax.slice(inputs, (0, *offsets, 0), (inputs.shape[0], *ends, inputs.shape[-1]))
        w = taps[tuple(index for index, _ in place)]
        terms.append(x[:, :, None, :, None, :, None] * w[None, None, :, None, :, None, :])
    found = functools.reduce(jnp.add, terms)
    found = found.reshape(inputs.shape[0], *(n * axis.s for n, axis in zip(size, axes, strict=True)), -1)
    for dim, (axis, first) in enumerate(zip(axes, early, strict=True), start=1):
        found = lax.slice_in_dim(found, first, axis.out, axis=dim)
    found = _tiles.plus(found, bias).astype(result)
    return jnp.moveaxis(found, -1, 1) if channels_first else found


def takes_gradient(geometry: Geometry, channels: int, filters: int, groups: int) -> bool:
    """Whether `input_gradient` is defined, and a program of moderate size."""
    return channels == filters == groups and math.prod(axis.k for axis in geometry) <= _tiles.MOST_SLICES


def input_gradient(
    cotangent: jax.Array,
    kernel: jax.Array,
    geometry: Geometry,
    *,
    sums: DTypeLike,
    result: DTypeLike,
    channels_first: bool,
) -> jax.Array:
    """``(N, *out, C)``, or ``(N, C, *out)``, and ``(kd, kh, kw, 1, C)`` to ``(N, D, H, W, C)``.

    The cotangent of a circular axis is that of its full result.
    """
    if channels_first:
        cotangent = jnp.moveaxis(cotangent, 1, -1)
    cotangent, kernel = cotangent.astype(sums), kernel.astype(sums)
    padding = [(0, 0, 0)] * 5
    for dim, axis in enumerate(geometry, start=1):
        lo = 0 if axis.wraps else axis.lo
        padding[dim] = (lo, axis.full - lo - cotangent.shape[dim], 0)
    reached = lax.optimization_barrier(lax.pad(cotangent, jnp.zeros((), sums), padding))
    terms = []
    for taps in itertools.product(*(range(axis.k) for axis in geometry)):
        starts = [t * axis.d for t, axis in zip(taps, geometry, strict=True)]
        ends = [start + (axis.n - 1) * axis.s + 1 for start, axis in zip(starts, geometry, strict=True)]
        strides = [axis.s for axis in geometry]
        part = lax.slice(
            reached, (0, *starts, 0), (reached.shape[0], *ends, reached.shape[-1]), (1, *strides, 1)
        )  # fmt: skip
        terms.append(part * kernel[taps].reshape(1, 1, 1, 1, -1))
    return functools.reduce(jnp.add, terms).astype(result)
