"""Times every contestant on every case, side by side: `make bench`, or `python -m benchmarks --help`.

All contestants of a case run in one process, interleaved round after round, warm; the figures are medians. Absolute
times mean little on a shared machine: read the ratios. "forward" is the result alone, "training" the result and both
gradients. Each contestant's result is first compared with the reference lowering's.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jax.numpy as jnp
from tqdm import tqdm

from benchmarks.cases import CASES, Case
from benchmarks.contestants import CONTESTANTS, NOT_COMPARED, Operation

SLOW, QUICK = 2.0, 0.2
"""Seconds: slower calls are timed once; quicker ones three times a round, after one that is not timed."""


def training(operation: Operation) -> Callable[..., Any]:
    """The result and both gradients, as a training step needs them."""

    def run(x: jax.Array, w: jax.Array, ct: jax.Array) -> Any:
        y, pullback = jax.vjp(operation, x, w)
        return y, pullback(ct)

    return run


def prepare(case: Case, names: list[str]) -> dict[str, dict[str, Any]]:
    """Compiled calls of each contestant, checked against the reference."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], case.inputs)
    w = jax.random.normal(keys[1], (*case.kernel, case.filters, case.inputs[-1]))
    want = jax.jit(CONTESTANTS["dilated"](case))(x, w)
    ct = jax.random.normal(keys[2], want.shape)
    prepared = {}
    for name in names:
        operation = CONTESTANTS[name](case)
        started = time.perf_counter()
        forward = jax.jit(operation).lower(x, w).compile()
        compile_seconds = time.perf_counter() - started
        got = forward(x, w)
        if name not in NOT_COMPARED:
            error = float(jnp.abs(got - want).max() / jnp.abs(want).max())
            if error > 1e-4:
                raise RuntimeError(f"{name} differs from the reference on {case.name} by {error:.1e}")
        step_ct = ct if got.shape == ct.shape else jnp.ones_like(got)
        step = jax.jit(training(operation)).lower(x, w, step_ct).compile()
        prepared[name] = {
            "forward": functools.partial(forward, x, w),
            "training": functools.partial(step, x, w, step_ct),
            "compile_seconds": compile_seconds,
            "temporary_bytes": getattr(forward.memory_analysis(), "temp_size_in_bytes", 0),
        }
    return prepared


def seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - started


def measure(case: Case, names: list[str], rounds: int, progress: tqdm) -> dict[str, dict[str, float]]:
    prepared = prepare(case, names)
    times: dict[tuple[str, str], list[float]] = {(name, kind): [] for name in names for kind in ("forward", "training")}
    warm_up = {(name, kind): seconds(prepared[name][kind]) for name, kind in times}
    order, rng = list(times), random.Random(0)
    for _ in range(rounds):
        rng.shuffle(order)  # a call finds the heap and the caches as the one before left them
        for name, kind in order:
            call, samples = prepared[name][kind], times[name, kind]
            if warm_up[name, kind] <= QUICK:
                seconds(call)
                samples.extend(seconds(call) for _ in range(3))
            elif warm_up[name, kind] <= SLOW:
                samples.append(seconds(call))
            elif not samples:  # its warm-up is its only round: noise is small beside it
                samples.append(warm_up[name, kind])
        progress.update()
    return {
        name: {
            "forward_ms": 1e3 * statistics.median(times[name, "forward"]),
            "training_ms": 1e3 * statistics.median(times[name, "training"]),
            "compile_seconds": prepared[name]["compile_seconds"],
            "temporary_bytes": prepared[name]["temporary_bytes"],
        }
        for name in names
    }


def table(results: dict[str, dict[str, dict[str, float]]], kind: str) -> str:
    """A Markdown table: our time, and each contestant's as a multiple of it."""
    names = [name for name in next(iter(results.values())) if name != "auto"]
    lines = [f"| {kind} | ours (auto) | {' | '.join(names)} |", "| --- " * (len(names) + 2) + "|"]
    for case, entry in results.items():
        own = entry["auto"][f"{kind}_ms"]
        ratios = " | ".join(f"{entry[name][f'{kind}_ms'] / own:.1f} x" for name in names)
        lines.append(f"| {case} | {own:.1f} ms | {ratios} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Time the lowerings beside their peers.")
    known = [case.name for case in CASES]
    parser.add_argument("--cases", nargs="+", choices=known, default=known)
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=pathlib.Path, default=pathlib.Path("out/benchmark.json"))
    args = parser.parse_args()
    names = list(dict.fromkeys(["auto", *args.contestants]))
    results = {}
    chosen = [case for case in CASES if case.name in args.cases]
    with tqdm(total=len(chosen) * args.rounds, unit="round") as progress:
        for case in chosen:
            progress.set_description(case.name)
            results[case.name] = measure(case, names, args.rounds, progress)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    device = jax.devices()[0]
    record = {
        "device": device.device_kind,
        "platform": device.platform,
        "cores": os.cpu_count(),
        "jax": jax.__version__,
    }
    args.json.write_text(json.dumps({**record, "results": results}, indent=1))
    print(f"\n{record}\n\n{table(results, 'forward')}\n\n{table(results, 'training')}\n\nwrote {args.json}")


if __name__ == "__main__":
    main()
