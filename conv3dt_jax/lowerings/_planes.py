"""Results with the filters second: the kernel times the inputs, so that a row of products is a plane of the result.

Nothing is transposed but the inputs of several samples, whole planes at a time. Of short lines with long strides the
products of an input lie together instead, tap beside tap, as in the result, and these runs are moved to their filters.
Blocks are of samples or of filters, which share no rims; each is one piece of the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from conv3dt_jax._geometry import Geometry
from conv3dt_jax.lowerings import _products, _tiles
from conv3dt_jax.lowerings._cells import is_still
from conv3dt_jax.lowerings._laid_out import lay_out_planes, overlap_add
from conv3dt_jax.lowerings._origin import Origin


def outputs(
    inputs: jax.Array,
    kernel: jax.Array,
    geometry: Geometry,
    spans: Sequence[_tiles.Span],
    *,
    precision: lax.PrecisionLike,
    accumulate: DTypeLike,
    result: DTypeLike,
    bias: jax.Array | None,
    origin: Origin,
    in_runs: bool,
) -> jax.Array:
    """``(N, D, H, W, C)`` and ``(kd, kh, kw, F, C)`` to ``(N, F, *out)``; ``spans`` are of the samples and filters.

    A kernel that was turned around is read as it was before, and its products are named in that order: to turn a copy
    around takes twice as long.
    """
    dtype, sums = _tiles.operand_dtype(accumulate, inputs, kernel), _tiles.widest(accumulate, inputs, kernel)
    *_, filters, channels = kernel.shape
    turned = origin.mirrored and not in_runs
    matrices = (jnp.flip(kernel, (0, 1, 2)) if turned else kernel).astype(dtype).reshape(-1, filters, channels)
    held = _tiles.Held.of(jnp.moveaxis(inputs, -1, 1))
    samples, each = (span.block for span in spans)
    static: dict[str, Any] = {"precision": precision, "accumulate": sums}

    def body(starts: Sequence[Any], found: jax.Array) -> jax.Array:
        sample, first = starts
        slab = _tiles.values(held.cut([sample, 0, 0, 0, 0], [samples, *held.shape[1:]]), held.dtype)
        matrix = matrices if each == filters else _tiles.cut(matrices, [0, first, 0], [len(matrices), each, channels])

        def finished() -> jax.Array:
            planes = slab.astype(dtype).reshape(samples, channels, -1)
            if in_runs:
                laid = _in_runs(planes, matrix, geometry, **static)
            else:
                laid = _in_planes(planes, matrix, geometry, origin, **static)
            return _tiles.bits(_tiles.plus(laid, bias, first, dim=1).astype(result))

        return _tiles.put(found, _tiles.materialized(finished, starts), [sample, first, 0, 0, 0])

    empty = jnp.zeros((inputs.shape[0], filters, *(axis.out for axis in geometry)), result)
    return _tiles.values(_tiles.for_each_tile(spans, body, _tiles.bits(empty)), result)


def _in_planes(planes: jax.Array, matrix: jax.Array, geometry: Geometry, origin: Origin, **static: Any) -> jax.Array:
    """``(N, C, D H W)`` and ``(kd kh kw, F, C)`` to ``(N, F, *out)``."""
    samples, channels, values = planes.shape
    filters, rows = matrix.shape[1], matrix.reshape(-1, channels)
    window, space = [axis.k for axis in geometry], [axis.n for axis in geometry]
    batched = _products.is_batched(samples, len(rows), channels, values)
    if batched:
        taps = _products.of_each(rows, planes, **static)
        taps = jnp.moveaxis(taps.reshape(samples, -1, filters, values), 0, 1)
    else:
        taps = _products.of_planes(rows, planes.swapaxes(0, 1).reshape(channels, -1), **static)
    laid = lay_out_planes(taps.reshape(*window, filters * samples, *space), geometry, mirrored=origin.mirrored)
    if batched:
        return laid.reshape(samples, filters, *laid.shape[1:])
    return laid.reshape(filters, samples, *laid.shape[1:]).swapaxes(0, 1)


def _in_runs(lines: jax.Array, matrix: jax.Array, geometry: Geometry, **static: Any) -> jax.Array:
    """``(N, C, n)`` and ``(k, F, C)`` to ``(N, F, *out)``."""
    moving = next(axis for axis in geometry if not is_still(axis))
    taps = _products.on_cpu(lines.swapaxes(1, 2), matrix.swapaxes(0, 1), 2, **static)
    laid = overlap_add(taps.swapaxes(1, 2), 2, moving)
    return laid.reshape(*laid.shape[:2], *(axis.out for axis in geometry))
