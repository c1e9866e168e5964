"""`winograd`: minimal filtering in depth and height where at most three inputs reach an output along an axis.

Without strides the result is a correlation of the inputs with the flipped kernel. With strides the ``s`` outputs of a
cell are filters of such a correlation between cells, of two or three taps (`_lines`). A few cells at a time take half
to a third of the products (`_minimal`); the taps in width lie side by side. Both gradients follow the same way: the one
for the inputs is a correlation of the cotangent with the kernel, and the one for the kernel is the transpose of that in
the kernel, so one transformed cotangent serves both.

Rounding: the sums and differences of inputs cost accuracy, in float32 a factor of 0.9 to 3.9 on the root mean square
error of the direct sum (`python -m benchmarks.accuracy`). A non-finite input reaches all outputs of its tiles.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from conv3dt_jax._geometry import Geometry
from conv3dt_jax.lowerings import _blocks, _tiles
from conv3dt_jax.lowerings._correlation import Correlation, correlate
from conv3dt_jax.lowerings._lines import DEPTH, HEIGHT, Line, filters_to_phases, phases_to_filters, tiles_of
from conv3dt_jax.lowerings._work import Call, Work

TRANSFORM = 3
"""What a value of a transformed kernel costs, in values of transformed inputs."""

WRITTEN = 4
"""What a value of the result costs, likewise: it is summed up, laid out and written."""

SHORT_RUN = 16
"""Channels side by side below which values are moved at half the pace."""


def refusal(geometry: Geometry, sums: DTypeLike) -> str | None:
    """Says why this lowering cannot take the geometry, or sums of this dtype; None where it can."""
    if not jnp.issubdtype(sums, jnp.inexact):
        return f"it multiplies with fractions, which {jnp.dtype(sums).name} does not hold"
    if not all(isinstance(axis.out, int) for axis in geometry):
        return "it cuts the input into tiles and needs spatial sizes that are known when it is traced"
    if any(axis.wraps for axis in geometry):
        return "it is for other paddings than circular"
    depth, height, _ = map(Line.forward, geometry)
    if depth.k not in DEPTH or height.k not in HEIGHT or depth.k == height.k == 1:
        return (
            "it is for outputs that at most 3 inputs reach in depth and height, and 2 in one of them; "
            f"here they are {depth.k} and {height.k}"
        )
    return None


def work(call: Call, *, gradients: int) -> Work:
    """The transformed inputs and the products, and the multiply-adds of what the tiles hold."""
    lines = [(Line.adjoint if gradients else Line.forward)(axis) for axis in call.geometry]
    depth, height = tiles_of(lines)
    width = lines[2]
    rows = call.batch * depth.count * depth.line.d * height.count * height.line.d * width.cells
    products = depth.algorithm.products * height.algorithm.products
    blocks = _blocks.count(call.groups, call.channels, call.filters)
    filters = call.filters * math.prod(axis.s for axis in call.geometry)
    inner, outer = (filters, call.channels) if gradients else (call.channels, filters)
    times = max(gradients, 1)
    patches = rows * products * width.k * inner
    matrices = products * width.k * inner * outer // blocks
    largest = 2 * call.tile_bytes
    turns = -(-patches * call.itemsize // largest)
    values = patches + times * (rows * products * outer + matrices * (TRANSFORM + turns))
    if inner < SHORT_RUN * math.prod(line.given for line in lines) * blocks:
        values *= 2
    if not gradients:
        values += WRITTEN * call.batch * math.prod(axis.out for axis in call.geometry) * call.filters
    room = min(patches * call.itemsize, largest)
    multiply_adds = times * rows * products * width.k * inner * outer // blocks
    return Work(multiply_adds, values, room + 2 * matrices * call.itemsize)


def outputs(
    inputs: jax.Array,
    kernel: jax.Array,
    geometry: Geometry,
    *,
    groups: int,
    precision: lax.PrecisionLike,
    accumulate: DTypeLike,
    tile_bytes: int,
    result: DTypeLike | None = None,
    bias: jax.Array | None = None,
    channels_first: bool = False,
) -> jax.Array:
    """``(N, D, H, W, C)`` and ``(kd, kh, kw, F / groups, C)`` to ``(N, *out, F)``, of dtype ``result``.

    To ``(N, F, *out)`` with ``channels_first``.
    """
    dtype = _tiles.widest(accumulate, inputs, kernel)
    taps = phases_to_filters(_blocks.split_kernel(kernel.astype(dtype), groups), geometry)
    taps = jnp.flip(taps, (1, 2, 3)).swapaxes(4, 5)
    taps = lax.optimization_barrier(taps)  # transposed once, not in every sum of `_matrices`
    correlation = Correlation(
        lines=tuple(Line.forward(axis) for axis in geometry),
        channels=kernel.shape[3] * groups,
        blocks=taps.shape[0],
        dtype=dtype,
        result=dtype if result is None else jnp.dtype(result),
        precision=precision,
        tile_bytes=tile_bytes,
        channels_first=(False, channels_first),
    )
    found, _ = correlate(inputs, taps, None, correlation, bias)
    assert found is not None
    return found


def gradients(
    inputs: jax.Array | None,
    kernel: jax.Array | None,
    cotangent: jax.Array,
    geometry: Geometry,
    channels: int,
    *,
    groups: int,
    precision: lax.PrecisionLike,
    accumulate: DTypeLike,
    tile_bytes: int,
    result: DTypeLike | None = None,
    channels_first: bool = False,
) -> tuple[jax.Array | None, jax.Array | None]:
    """See `_adjoint.gradients`."""
    filters = cotangent.shape[1 if channels_first else 4]
    dtype = _tiles.widest(accumulate, cotangent, *(a for a in (inputs, kernel) if a is not None))
    blocks = _blocks.count(groups, channels, filters)
    taps = None
    if kernel is not None:
        taps = phases_to_filters(_blocks.split_kernel(kernel.astype(dtype), groups), geometry)
    correlation = Correlation(
        lines=tuple(Line.adjoint(axis) for axis in geometry),
        channels=channels,
        blocks=blocks,
        dtype=dtype,
        result=dtype if result is None else jnp.dtype(result),
        precision=precision,
        tile_bytes=tile_bytes,
        channels_first=(channels_first, False),
    )
    dx, dw = correlate(cotangent, taps, inputs, correlation)
    if dw is not None:
        dw = _blocks.join_kernel(filters_to_phases(dw, geometry), groups, filters, channels)
    return dx, dw
