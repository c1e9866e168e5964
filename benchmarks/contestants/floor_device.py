"""Two lower bounds of a device, measured on it: bytes by the pace of a copy, multiply-adds by that of a large product.

Training reads inputs, kernel and cotangent and writes the result and two gradients: twice the bytes of the result
alone, and three times its multiply-adds.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.cases import Case
from benchmarks.contestants.base import Prepared

SIDE, COPIED, CALLS, REPEATS = 8192, 1 << 28, 5, 5
SMALL = 256
"""Sides and values are smaller by this where there is no device to fill."""


def prepare(case: Case, kind: str, variant: str) -> Prepared:
    bytes_, products = (1, 1) if kind == "forward" else (2, 3)
    by_bytes = bytes_ * case.operand_bytes / copy_rate()
    by_products = products * case.multiply_adds / product_rate(case.dtype, case.precision)
    return Prepared(
        call=lambda: None,
        parts=lambda results: [],
        compile_seconds=0.0,
        compared=False,
        known=max(by_bytes, by_products),
        facts={
            "seconds_by_bytes": by_bytes,
            "seconds_by_multiply_adds": by_products,
            "bytes_per_second": copy_rate(),
            "multiply_adds_per_second": product_rate(case.dtype, case.precision),
        },
    )


@functools.cache
def copy_rate() -> float:
    """Bytes read and written in a second, by a copy of a gibibyte."""
    values = jnp.zeros(COPIED // _less(), jnp.float32)
    copy = jax.jit(lambda values: jnp.copy(values))
    return 2 * values.nbytes / _seconds(copy, values)


@functools.cache
def product_rate(dtype: str, precision: str) -> float:
    """Multiply-adds in a second, of random square matrices."""
    side = SIDE // (1 if _less() == 1 else 16)
    a, b = (jax.random.normal(jax.random.key(i), (side, side), dtype) for i in range(2))
    multiply = jax.jit(functools.partial(jnp.matmul, precision=precision))
    return side**3 / _seconds(multiply, a, b)


def _less() -> int:
    return SMALL if jax.default_backend() == "cpu" else 1


def _seconds(call: Callable[..., Any], *arguments: Any) -> float:
    """The least of some repeats of calls that are awaited together."""
    jax.block_until_ready(call(*arguments))
    found = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        for _ in range(CALLS):
            result = call(*arguments)
        jax.block_until_ready(result)
        found.append((time.perf_counter() - started) / CALLS)
    return min(found)
