"""conv3dt_jax: "auto", or a lowering by name."""

from __future__ import annotations

from typing import Any

import jax

import conv3dt_jax as c3t
from benchmarks.cases import Case
from benchmarks.contestants import _jax
from benchmarks.contestants.base import Prepared, UnsupportedError


def prepare(case: Case, kind: str, variant: str) -> Prepared:
    implementation: Any = variant

    def operation(x: jax.Array, w: jax.Array) -> jax.Array:
        run = c3t.conv3d_transpose if case.transposed else c3t.conv3d
        return run(
            x,
            w,
            strides=case.strides,
            padding=case.padding,
            dilation_rate=case.dilation,
            groups=case.groups,
            data_format=case.data_format,
            implementation=implementation,
            precision=case.precision,
        )

    try:
        return _jax.prepared(case, kind, operation)
    except NotImplementedError as error:
        raise UnsupportedError(str(error)) from error
