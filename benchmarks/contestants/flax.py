"""`flax.linen.ConvTranspose`, whose kernel is ours turned round, with channels before filters."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cases import Case
from benchmarks.contestants import _jax
from benchmarks.contestants.base import Prepared, require


def turned(w: np.ndarray) -> np.ndarray:
    return _jax.flipped(w).swapaxes(3, 4)


def prepare(case: Case, kind: str, variant: str) -> Prepared:
    require(case.transposed, "it stands for transposed convolutions alone")
    require(case.groups == 1, "flax.linen.ConvTranspose has no groups")
    require(not case.channels_first, "flax.linen.ConvTranspose takes channels last only")
    layer = nn.ConvTranspose(
        case.filters,
        case.kernel,
        case.strides,
        case.padding.upper(),
        kernel_dilation=(case.dilation,) * 3,
        use_bias=False,
        dtype=case.dtype,
        param_dtype=case.dtype,
    )

    def operation(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.asarray(layer.apply({"params": {"kernel": w}}, x))

    compared = _jax.lax_string_window(case)
    return _jax.prepared(case, kind, operation, kernel_to_own=turned, kernel_from_own=turned, compared=compared)
