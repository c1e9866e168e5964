"""`equinox.nn.ConvTranspose3d`: channels first, unbatched, hence vmapped; padding crops, as in PyTorch."""

from __future__ import annotations

import equinox as eqx
import jax
import numpy as np

from benchmarks.cases import Case
from benchmarks.contestants import _jax
from benchmarks.contestants.base import Prepared, grouped_kernel, require, ungrouped_kernel


def prepare(case: Case, kind: str, variant: str) -> Prepared:
    require(case.transposed, "it stands for transposed convolutions alone")
    layer = eqx.nn.ConvTranspose3d(
        case.channels,
        case.filters,
        case.kernel,
        case.strides,
        padding=[(a.lo, max(a.full - a.lo - a.out, 0)) for a in case.axes],
        output_padding=tuple(max(a.out + a.lo - a.full, 0) for a in case.axes),
        dilation=case.dilation,
        groups=case.groups,
        use_bias=False,
        dtype=np.dtype("float32"),
        key=jax.random.key(0, impl="rbg"),
    )

    def operation(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.vmap(eqx.tree_at(lambda module: module.weight, layer, w))(x)

    def to_own(w: np.ndarray) -> np.ndarray:
        """``(F, C // g, kd, kh, kw)``, turned round."""
        return grouped_kernel(case, _jax.flipped(w)).transpose(4, 3, 0, 1, 2)

    def from_own(w: np.ndarray) -> np.ndarray:
        return _jax.flipped(ungrouped_kernel(case, w.transpose(2, 3, 4, 1, 0)))

    return _jax.prepared(case, kind, operation, channels_first=True, kernel_to_own=to_own, kernel_from_own=from_own)
