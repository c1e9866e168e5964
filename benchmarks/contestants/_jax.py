"""What all contestants on JAX share: ahead-of-time compilation, and moving between layouts."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import data
from benchmarks.cases import Case
from benchmarks.contestants.base import Prepared

QUEUES = bool(os.environ.get("BENCHMARK_QUEUE"))
"""Whether calls return before their work is done, and are timed in a queue."""

Operation = Callable[[jax.Array, jax.Array], jax.Array]
Layout = Callable[[np.ndarray], np.ndarray]


def same(x: np.ndarray) -> np.ndarray:
    return x


def prepared(
    case: Case,
    kind: str,
    operation: Operation,
    *,
    channels_first: bool | None = None,
    kernel_to_own: Layout = same,
    kernel_from_own: Layout = same,
    compared: bool = True,
) -> Prepared:
    """Compiles ``operation(inputs, kernel)`` in the contestant's own layouts, for the result or for training."""
    first = case.channels_first if channels_first is None else channels_first
    to_own, from_own = (data.to_channels_first, data.to_channels_last) if first else (same, same)
    inputs, kernel, cotangent = data.operands(case)
    x, w = jnp.asarray(to_own(inputs), case.dtype), jnp.asarray(kernel_to_own(kernel), case.dtype)

    def forward(x: jax.Array, w: jax.Array) -> Any:
        return (operation(x, w),)

    def training(x: jax.Array, w: jax.Array, ct: jax.Array) -> Any:
        y, pullback = jax.vjp(operation, x, w)
        return y, *pullback(ct)

    arguments = (x, w) if kind == "forward" else (x, w, jnp.asarray(to_own(cotangent), case.dtype))
    started = time.perf_counter()
    compiled = jax.jit(forward if kind == "forward" else training).lower(*arguments).compile()
    compile_seconds = time.perf_counter() - started
    memory = compiled.memory_analysis()

    def parts(results: Any) -> list[np.ndarray]:
        layouts = (from_own, from_own, kernel_from_own)
        return [layout(np.asarray(part.astype(jnp.float32))) for layout, part in zip(layouts, results, strict=False)]

    return Prepared(
        call=(lambda: compiled(*arguments)) if QUEUES else (lambda: jax.block_until_ready(compiled(*arguments))),
        wait=jax.block_until_ready if QUEUES else None,
        parts=parts,
        compile_seconds=compile_seconds,
        temporary_bytes=getattr(memory, "temp_size_in_bytes", None),
        compared=compared,
    )


def explicit_padding(case: Case) -> list[tuple[int, int]]:
    """What a fractionally strided convolution adds on either side, to give the window of the case."""
    return [(a.ke - 1 - a.lo, a.out - a.full + a.ke - 1 + a.lo) for a in case.axes]


def flipped(x: np.ndarray) -> np.ndarray:
    """The kernel turned round along its spatial axes: a transposed convolution as a correlation."""
    return np.flip(x, (0, 1, 2))


def lax_string_window(case: Case) -> bool:
    """Whether `jax.lax.conv_transpose` with "SAME" or "VALID" gives the window of the case."""
    for a in case.axes:
        start = a.ke - 1 if a.s > a.ke - 1 or case.padding == "valid" else -(-(a.ke + a.s - 2) // 2)
        if start != a.ke - 1 - a.lo:
            return False
    return True
