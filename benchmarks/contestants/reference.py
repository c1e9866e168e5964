"""What the results are compared with, in float64: PyTorch where it is installed, else our dilated convolution."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks import data
from benchmarks.cases import Case
from benchmarks.contestants.base import Prepared


def prepare(case: Case, kind: str, variant: str) -> Prepared:
    try:
        import torch
    except ModuleNotFoundError:
        return _ours(case, kind)
    from benchmarks.contestants import pytorch

    return pytorch.prepare(case, kind, "contiguous", torch.float64, aligned=True)


def _ours(case: Case, kind: str) -> Prepared:
    import jax
    import jax.numpy as jnp

    import conv3dt_jax as c3t

    jax.config.update("jax_enable_x64", True)
    x, w, ct = (jnp.asarray(array, case.dtype).astype(jnp.float64) for array in data.operands(case))

    def operation(x: jax.Array, w: jax.Array) -> jax.Array:
        run = c3t.conv3d_transpose if case.transposed else c3t.conv3d
        return run(
            x,
            w,
            strides=case.strides,
            padding=case.padding,
            dilation_rate=case.dilation,
            groups=case.groups,
            implementation="dilated",
        )

    def call() -> Any:
        y, pullback = jax.vjp(operation, x, w)
        return (y,) if kind == "forward" else (y, *pullback(ct))

    return Prepared(call=call, parts=lambda results: [np.asarray(part) for part in results])
