"""What the choices of the CPU lowerings are worth: every case with one of them undone, beside what is built.

``python -m benchmarks.ideas --cases k3s2_same --kinds forward`` prints, for each idea, its time, the time to compile it
and its temporaries as multiples of ours: medians over interleaved rounds in one process. `benchmarks/NOTES.md` keeps
what came of it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax

from benchmarks.cases import CASES, KINDS, Case
from benchmarks.contestants import ours
from benchmarks.contestants.base import Prepared, UnsupportedError
from conv3dt_jax import _primitives
from conv3dt_jax.lowerings import (
    LOWERINGS,
    _adjoint,
    _blocks,
    _cells,
    _depthwise,
    _laid_out,
    _matmul_plans,
    _products,
    _tiles,
    phases,
)

ENDLESS = 1 << 40
BASE = "as built"


@dataclasses.dataclass(frozen=True)
class Idea:
    """What is patched (module, name, value), or which lowering is named; for which kinds, or cases, it can matter."""

    name: str
    patches: Sequence[tuple[Any, str, Any]] = ()
    lowering: str = "auto"
    kinds: Sequence[str] = KINDS

    def concerns(self, case: Case, kind: str) -> bool:
        if "groups" in self.name:
            return case.groups > 1
        if "bfloat16" in self.name:
            return case.dtype == "bfloat16"
        return kind in self.kinds

    def prepare(self, case: Case, kind: str) -> Prepared:
        jax.clear_caches()
        with contextlib.ExitStack() as stack:
            for module, name, value in self.patches:
                stack.enter_context(mock.patch.object(module, name, value))
            return ours.prepare(case, kind, self.lowering)


def _apart(x: Any, w: Any, y: Any, form: Any) -> list[Any]:
    return [_primitives.inputs(w, y, form), _primitives.kernel(x, y, form)]


def _blocks_of(size: int) -> list[tuple[Any, str, Any]]:
    return [(_tiles, "LARGEST", size), (_tiles, "SMALLEST", size), (_adjoint, "SHORT_RUN_BYTES", size)]


FORWARD, TRAINING = KINDS[:1], KINDS[1:]
IDEAS = [
    Idea(BASE),
    Idea("blocks of 1 MiB", [(_tiles, "LARGEST", 1 << 20)]),
    Idea("blocks of 2 MiB", [(_tiles, "LARGEST", 2 << 20)]),
    Idea("blocks of 8 MiB", _blocks_of(8 << 20)),
    Idea("no blocks", _blocks_of(ENDLESS)),
    Idea("all phases in one product", [(_cells, "MOST_RUNS", 0)], "phases", FORWARD),
    Idea("width not aligned", [(phases, "aligned", lambda axis: (axis, 0))], "phases", FORWARD),
    Idea("products whole, never by block", [(_matmul_plans, "in_blocks", lambda call: False)], "matmul", FORWARD),
    Idea("a large kernel at once, not row by row", [(_matmul_plans, "by_rows", lambda call: False)], "matmul", FORWARD),
    Idea(
        "products laid out axis by axis", [(_laid_out, "FEW_TAPS", 0), (_laid_out, "PLANE_TAPS", 0)], "matmul", FORWARD
    ),
    Idea("taps of a row one by one", [(_laid_out, "_is_in_order", lambda axis: False)], "matmul", FORWARD),
    Idea("columns of narrow products as they are", [(_products, "MORE", 0)], "matmul", FORWARD),
    Idea(
        "no products by Eigen", [(_products, "LEAST", ENDLESS), (_products, "EVEN_LEAST", ENDLESS)], "matmul", FORWARD
    ),
    *(Idea(f"lowering {name}", lowering=name) for name in LOWERINGS if name != "dilated"),
    Idea("patches tap by tap", [(_adjoint, "SHORT_RUN", ENDLESS)], "phases", TRAINING),
    Idea("a slice for every tap, no loop", [(_tiles, "looped", lambda taps, few=0: 0)], "phases"),
    Idea("taps in depth always by a loop", [(_tiles, "looped", lambda taps, few=0: int(taps[0] > 1))], "phases"),
    Idea("groups of one channel by products", [(_depthwise, "takes", lambda *_: False)], "phases", FORWARD),
    Idea("bfloat16 inputs not transposed first", [(_tiles, "turned", lambda x, _: x.T)], kinds=TRAINING),
    Idea("gradients one by one", [(_primitives, "gradients", _apart)], kinds=TRAINING),
    Idea("groups one by one", [(_blocks, "NARROW", 1)]),
    Idea("groups as one dense product", [(_blocks, "NARROW", 4096), (_blocks, "MOST", 4096)]),
    Idea("bfloat16 multiplied as float32", [(_tiles, "operand_dtype", _tiles.widest)]),
    Idea("bfloat16 moved as it is", [(_tiles, "bits", lambda x: x), (_tiles, "values", lambda x, dtype: x)]),
]


class Found(NamedTuple):
    """Median seconds of a call, seconds to compile it, and bytes of its temporaries."""

    seconds: float
    compile_seconds: float
    temporary_bytes: int

    def told(self, base: Found) -> str:
        return " / ".join(f"{mine / ours:.2f}" if ours else "-" for mine, ours in zip(self, base, strict=True))


def measure(case: Case, kind: str, rounds: int) -> dict[str, Found]:
    """Every idea that concerns the case."""
    prepared = {}
    for idea in IDEAS:
        if idea.concerns(case, kind):
            with contextlib.suppress(UnsupportedError):
                prepared[idea.name] = idea.prepare(case, kind)
    seconds: dict[str, list[float]] = {name: [] for name in prepared}
    for turn in range(rounds):
        order = list(prepared.items())
        for name, one in order[turn % len(order) :] + order[: turn % len(order)]:  # none is always the first
            result = one.call()  # finds its caches as it left them
            del result
            started = time.perf_counter()
            result = one.call()
            seconds[name].append(time.perf_counter() - started)
            del result
    return {
        name: Found(statistics.median(seconds[name]), one.compile_seconds or 0.0, one.temporary_bytes or 0)
        for name, one in prepared.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ideas", description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES], metavar="CASE")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    print("Time / compile time / temporaries of each idea, as multiples of what is built.\n", flush=True)
    for case in CASES:
        if args.cases and case.name not in args.cases:
            continue
        for kind in args.kinds:
            found = measure(case, kind, args.rounds)
            base = found.pop(BASE)
            built = (
                f"{1e3 * base.seconds:.2f} ms / {base.compile_seconds:.2f} s / {base.temporary_bytes / 2**20:.1f} MiB"
            )
            told = "; ".join(f"{name} {one.told(base)}" for name, one in found.items())
            print(f"- {case.name}, {kind}, {built}: {told}", flush=True)


if __name__ == "__main__":
    main()
