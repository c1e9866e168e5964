"""`jax.lax.conv_transpose` with ``transpose_kernel``, Keras's alignment as explicit padding; or its convolution."""

from __future__ import annotations

import jax
from jax import lax

from benchmarks.cases import Case
from benchmarks.contestants import _jax
from benchmarks.contestants.base import Prepared, require


def prepare(case: Case, kind: str, variant: str) -> Prepared:
    if not case.transposed:
        return _jax.prepared(case, kind, _convolution(case))
    require(case.groups == 1, "jax.lax.conv_transpose has no groups")
    padding = _jax.explicit_padding(case)
    numbers = ("NCDHW", "DHWIO", "NCDHW") if case.channels_first else ("NDHWC", "DHWIO", "NDHWC")

    def operation(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.conv_transpose(
            x,
            w,
            case.strides,
            padding,
            rhs_dilation=(case.dilation,) * 3,
            dimension_numbers=numbers,
            transpose_kernel=True,
            precision=case.precision,
        )

    return _jax.prepared(case, kind, operation)


def _convolution(case: Case) -> _jax.Operation:
    numbers = ("NCDHW", "DHWIO", "NCDHW") if case.channels_first else ("NDHWC", "DHWIO", "NDHWC")

    def operation(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            x,
            w,
            case.strides,
            case.padding.upper(),
            rhs_dilation=(case.dilation,) * 3,
            dimension_numbers=numbers,
            feature_group_count=case.groups,
        )

    return operation
