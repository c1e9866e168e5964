"""`haiku.Conv3DTranspose`, whose kernel is ours turned round."""

from __future__ import annotations

import haiku as hk
import jax

from benchmarks.cases import Case
from benchmarks.contestants import _jax
from benchmarks.contestants.base import Prepared, require


def prepare(case: Case, kind: str, variant: str) -> Prepared:
    require(case.transposed, "it stands for transposed convolutions alone")
    require(case.groups == 1, "haiku.Conv3DTranspose has no groups")
    require(case.dilation == 1, "haiku.Conv3DTranspose has no dilation")

    def layer(x: jax.Array) -> jax.Array:
        data_format = "NCDHW" if case.channels_first else "NDHWC"
        module = hk.Conv3DTranspose(
            case.filters,
            case.kernel,
            case.strides,
            padding=case.padding.upper(),
            with_bias=False,
            data_format=data_format,
            name="layer",
        )
        return module(x)

    apply = hk.without_apply_rng(hk.transform(layer)).apply

    def operation(x: jax.Array, w: jax.Array) -> jax.Array:
        return apply({"layer": {"w": w}}, x)

    compared = _jax.lax_string_window(case)
    return _jax.prepared(
        case, kind, operation, kernel_to_own=_jax.flipped, kernel_from_own=_jax.flipped, compared=compared
    )
