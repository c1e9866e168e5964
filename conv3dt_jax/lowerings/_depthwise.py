"""One channel in each group: no sum over channels, so no product of matrices, but one pass over the outputs.

    y[m * s + r, f] = sum_a x[m - a, f] w[a, r, f],

with the shifts a and the residues r of `phases`. Written with the residues as axes of their own, all of it is one
elementwise expression: XLA fuses it into one parallel loop that reads the inputs from the cache and holds nothing.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from conv3dt_jax._geometry import Geometry
from conv3dt_jax.lowerings import _tiles
from conv3dt_jax.lowerings._cells import aligned, cells, extend, shifts


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
