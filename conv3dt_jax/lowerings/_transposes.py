"""Both gradients of a lowering from its forward pass alone: `jax.linear_transpose`, one operand at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from conv3dt_jax._geometry import Geometry


def transposes(
    outputs: Callable[..., jax.Array],
    inputs: jax.Array | None,
    kernel: jax.Array | None,
    cotangent: jax.Array,
    geometry: Geometry,
    channels: int,
    *,
    groups: int,
    result: Any = None,
    **static: Any,
) -> tuple[jax.Array | None, jax.Array | None]:
    """The gradient for the inputs (where ``kernel`` is given) and for the kernel (where ``inputs`` is given)."""
    del result  # XLA rounds at the end
    batch, *_, filters = cotangent.shape
    static = {"geometry": geometry, "groups": groups, **static}

    def transposed(linear: Callable[[jax.Array], jax.Array], operand: jax.ShapeDtypeStruct) -> jax.Array:
        sums = jax.eval_shape(linear, operand).dtype
        (gradient,) = jax.linear_transpose(linear, operand)(cotangent.astype(sums))
        return gradient

    dx = dw = None
    if kernel is not None:
        x = jax.ShapeDtypeStruct((batch, *(axis.n for axis in geometry), channels), kernel.dtype)
        dx = transposed(lambda x: outputs(x, kernel, **static), x)
    if inputs is not None:
        window = (axis.k for axis in geometry)
        w = jax.ShapeDtypeStruct((*window, filters // groups, channels), inputs.dtype)
        dw = transposed(lambda w: outputs(inputs, w, **static), w)
    return dx, dw
