"""A lower bound to aim at: the multiply-adds as near-square matrix products, and one pass over what is written."""

from __future__ import annotations

import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cases import Case
from benchmarks.contestants.base import Prepared


def side(multiply_adds: int) -> int:
    """Of the square matrices whose product takes as many multiply-adds."""
    return max(16, 16 * round(math.cbrt(multiply_adds) / 16))


def prepare(case: Case, kind: str, variant: str) -> Prepared:
    """Training has the multiply-adds of three such products, and writes both gradients too."""
    n = side(case.multiply_adds)
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.standard_normal((n, n), np.float32), case.dtype) for _ in range(2))
    scalar = jnp.ones((), case.dtype)
    shapes = [case.outputs] if kind == "forward" else [case.outputs, case.inputs, case.kernel_shape]

    def write(value: jax.Array) -> list[jax.Array]:
        return [jnp.broadcast_to(value, shape) for shape in shapes]

    started = time.perf_counter()
    multiply = jax.jit(jnp.matmul).lower(a, b).compile()
    fill = jax.jit(write).lower(scalar).compile()
    compile_seconds = time.perf_counter() - started

    def call() -> Any:
        for _ in shapes:
            jax.block_until_ready(multiply(a, b))
        return jax.block_until_ready(fill(scalar))

    return Prepared(call=call, parts=lambda results: [], compile_seconds=compile_seconds, compared=False)
