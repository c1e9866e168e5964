"""`pallas`: implicit matrix products for NVIDIA GPUs, as Pallas kernels for Triton.

The rows of the products are gathered from the inputs, or the cotangents, while they are multiplied, and written where
they belong: nothing is laid out, stuffed with zeros or transposed in memory (`_gather`, `_reduce`). Tiles and cells
follow a cost rule (`_pallas_plans`). Float32 is multiplied as `jax.lax.Precision` asks for: "default" as TF32 or as two
bfloat16 each, "high" as two, "highest" as three, which is float32's own rounding.

Where there is no such GPU the kernels run in Pallas's interpreter: slow, for tests.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from conv3dt_jax._geometry import Geometry
from conv3dt_jax.lowerings import _gather, _pallas_plans, _reduce, _triton
from conv3dt_jax.lowerings._work import Call, Work

MOST = 2**31 - 2**24
"""Values of an array that 32-bit addresses reach, with room for those past its ends."""

DTYPES = tuple(map(jnp.dtype, ("float32", "bfloat16", "float16")))

FEW = 4
"""Channels or filters of a group below which a product is mostly padding, unless they are not mixed at all."""


def refusal(geometry: Geometry, sums: DTypeLike) -> str | None:
    """Says why this lowering cannot take the geometry, or sums of this dtype; None where it can."""
    if not _triton.is_present():
        return "this JAX has no Pallas for Triton"
    if not all(isinstance(axis.out, int) for axis in geometry):
        return "its programs need spatial sizes that are known when it is traced"
    if jnp.dtype(sums) != jnp.float32:
        return f"it sums in float32, not in {jnp.dtype(sums).name}"
    if any(axis.wraps and axis.out != axis.n * axis.s for axis in geometry):
        return "it takes circular axes only where the stride divides the outputs"
    return None


def takes(call: Call, dtypes: Any, precision: Any) -> bool:
    """Whether "auto" may choose it: for real floating-point numbers in arrays that are not too large."""
    held = call.batch * max(
        math.prod(axis.n for axis in call.geometry) * call.channels,
        math.prod(axis.out for axis in call.geometry) * call.filters,
    )
    if not all(one in DTYPES for one in dtypes) or held > MOST:
        return False
    dtype = jnp.result_type(*dtypes)
    few = min(call.channels, call.filters) // call.groups < FEW
    if call.groups > 1 and few and not call.groups == call.channels == call.filters:
        return False
    return _pallas_plans.arithmetic_of(dtype, precision) is not None


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
    interpret: bool = True,
) -> jax.Array:
    """``(N, D, H, W, C)`` and ``(kd, kh, kw, F / groups, C)`` to ``(N, *out, F)``, of dtype ``result``."""
    del tile_bytes
    inputs, kernel = _alike(inputs, kernel)
    _check_size(inputs.size, inputs.shape[0] * math.prod(axis.out for axis in geometry) * kernel.shape[3] * groups)
    way = _way(inputs.dtype, precision)
    gather = _pallas_plans.outputs_gather(
        geometry, inputs.shape[0], inputs.shape[-1] // groups, kernel.shape[3], groups, inputs.dtype, way
    )
    weights = _gather.matrices(kernel, gather, adjoint=False)
    return _gather.run(
        inputs, weights, bias, gather, result=result or accumulate, arithmetic=way, interpret=interpret
    )  # fmt: skip


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
    tile_bytes: int = 0,
    result: DTypeLike | None = None,
    interpret: bool = True,
) -> tuple[jax.Array | None, jax.Array | None]:
    """The gradients for the inputs, where the kernel is given, and for the kernel, where the inputs are."""
    del tile_bytes
    batch, each, filters = cotangent.shape[0], channels // groups, cotangent.shape[-1] // groups
    _check_size(cotangent.size, batch * math.prod(axis.n for axis in geometry) * channels)
    dx = dw = None
    if kernel is not None:
        y, w = _alike(cotangent, kernel)
        way = _way(y.dtype, precision)
        gather = _pallas_plans.inputs_gather(geometry, batch, each, filters, groups, y.dtype, way)
        weights = _gather.matrices(w, gather, adjoint=True)
        dx = _gather.run(
            y, weights, None, gather, result=result or accumulate, arithmetic=way, interpret=interpret
        )  # fmt: skip
    if inputs is not None:
        x, y = _alike(inputs, cotangent)
        reduce, way = _pallas_plans.kernel_reduce(
            geometry, batch, each, filters, groups, _way(x.dtype, precision)
        )  # fmt: skip
        dw = _reduce.run(x, y, reduce, arithmetic=way, interpret=interpret)
    return dx, dw


def work(call: Call, *, gradients: int) -> Work:
    """The multiply-adds of the tiles, zeros included; the matrices, the shares of the kernel's gradient and its copies.

    Counted for float32 at the default precision: narrower operands need less.
    """
    sizes = (call.geometry, call.batch, call.channels // call.groups, call.filters // call.groups, call.groups)
    make = _pallas_plans.inputs_gather if gradients else _pallas_plans.outputs_gather
    gather = make(*sizes, jnp.float32, "tf32")
    if gradients < 2:
        return Work(gather.multiply_adds, gather.rows, gather.weights * call.itemsize)
    reduce, _ = _pallas_plans.kernel_reduce(*sizes, "tf32")
    cells = call.batch * math.prod(axis.n for axis in call.geometry)
    made = call.batch * math.prod(axis.out for axis in call.geometry)
    copies = (cells * call.channels + made * call.filters) * reduce.parts * 2 if reduce.parts > 1 else 0
    kernel = math.prod(axis.k for axis in call.geometry) * call.channels * call.filters // call.groups
    return Work(
        gather.multiply_adds + cells * kernel,
        gather.rows,
        gather.weights * call.itemsize + reduce.shares * reduce.size * 4 + copies,
    )


def _alike(*operands: jax.Array) -> list[jax.Array]:
    if not all(operand.dtype in DTYPES for operand in operands):
        names = " and ".join(operand.dtype.name for operand in operands)
        raise NotImplementedError(f"'pallas' takes float32, bfloat16 and float16, not {names}; use 'auto'.")
    dtype = jnp.result_type(*operands)
    return [operand.astype(dtype) for operand in operands]


def _check_size(*sizes: int) -> None:
    if max(sizes) > MOST:
        raise NotImplementedError(f"'pallas' cannot address {max(sizes):,} values in 32 bits; use 'auto'.")


def _way(dtype: Any, precision: Any) -> str:
    found = _pallas_plans.arithmetic_of(dtype, precision)
    if found is None:
        default = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
        asked = f"`precision={precision!r}`" if precision is not None else f"the default precision {default!r}"
        raise NotImplementedError(f"{asked} cannot be had with 'pallas'; use 'auto'.")
    return found
