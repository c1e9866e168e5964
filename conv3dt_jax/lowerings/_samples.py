"""The products of a few whole samples after the others: blocks without rims, for many small volumes.

What is added up lies in the cache, and each block is written once, where a product for the whole batch would leave the
cache twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from conv3dt_jax._geometry import Geometry
from conv3dt_jax.lowerings import _products, _tiles
from conv3dt_jax.lowerings._laid_out import lay_out


def outputs(
    inputs: jax.Array,
    kernel: jax.Array,
    geometry: Geometry,
    span: _tiles.Span,
    product: _products.Product,
    *,
    precision: lax.PrecisionLike,
    accumulate: DTypeLike,
    result: DTypeLike,
    bias: jax.Array | None,
) -> jax.Array:
    """``(N, D, H, W, C)`` and ``(kd, kh, kw, F, C)`` to ``(N, *out, F)``; one group."""
    dtype, sums = _tiles.operand_dtype(accumulate, inputs, kernel), _tiles.widest(accumulate, inputs, kernel)
    *window, filters, channels = kernel.shape
    rows = span.block * math.prod(inputs.shape[1:4])
    matrix, dim = _products.as_read(kernel.astype(dtype).reshape(-1, channels), rows, sums)
    held = _tiles.Held.of(inputs)

    def finished(slab: jax.Array) -> jax.Array:
        taps = product(slab, matrix, dim, precision=precision, accumulate=sums)
        taps = taps.reshape(*slab.shape[:4], *window, filters)
        laid = _tiles.plus(lay_out(taps, geometry, phase_by_phase=True), bias)
        return _tiles.bits(laid.astype(result))

    def body(starts: Sequence[Any], found: jax.Array) -> jax.Array:
        first = [*starts, 0, 0, 0, 0]
        slab = _tiles.values(held.cut(first, [span.block, *inputs.shape[1:]]), inputs.dtype).astype(dtype)
        return _tiles.put(found, _tiles.materialized(lambda: finished(slab), starts), first)

    empty = jnp.zeros((inputs.shape[0], *(axis.out for axis in geometry), filters), result)
    return _tiles.values(_tiles.for_each_tile([span], body, _tiles.bits(empty)), result)
