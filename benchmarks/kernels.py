"""Times the Pallas kernels one by one, each with the plan that the rule takes and with others.

`python -m benchmarks.kernels` needs a GPU of compute capability 9. The constants of the rule, in
`conv3dt_jax/lowerings/_pallas_plans.py`, were fitted to such figures.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import os
import pathlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
from tqdm import tqdm

from benchmarks import machine
from benchmarks.cases import GPU_CASES, Case
from benchmarks.report import table
from benchmarks.worker import queued
from conv3dt_jax._geometry import Geometry, resolve_axis
from conv3dt_jax.lowerings import _gather, _pallas_plans, _reduce, _triton
from conv3dt_jax.lowerings._triton import Tile

OTHERS, WORTH = 2, 1.25
"""Other cells that are timed, and how much dearer they may be by the rule."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """A kernel of a case with a plan; ``chosen``: the rule's."""

    case: Case
    kernel: str
    plan: Any
    way: str
    chosen: bool

    def call(self) -> Callable[..., jax.Array]:
        dtype = jnp.dtype(self.case.dtype)
        gathered: dict[str, Any] = {"result": dtype, "arithmetic": self.way, "interpret": False}
        if self.kernel == "result":
            return lambda x, w, y: _gather.run(
                x, _gather.matrices(w, self.plan, adjoint=False), None, self.plan, **gathered
            )  # fmt: skip
        if self.kernel == "inputs":
            return lambda x, w, y: _gather.run(
                y, _gather.matrices(w, self.plan, adjoint=True), None, self.plan, **gathered
            )  # fmt: skip
        return lambda x, w, y: _reduce.run(x, y, self.plan, arithmetic=self.way, interpret=False)

    @property
    def described(self) -> str:
        plan, tile = self.plan, self.plan.tile
        text = f"{tile.rows}x{tile.columns}x{tile.depth}, {tile.warps} warps, {tile.stages} stages"
        if isinstance(plan, _reduce.Reduce):
            return f"{text}; {plan.shares} shares, lines of {plan.line} axes, {plan.parts} parts, {self.way}"
        cells = " ".join("phases" if axis.pieces > 1 else str(axis.merged) for axis in plan.axes)
        return f"{text}; cells {cells}{', flat' if plan.flat else ''}, {self.way}"


def trials(case: Case) -> Iterator[Trial]:
    """The plans of the rule, each followed by others."""
    way = "half" if case.dtype == "bfloat16" else "three" if case.precision == "highest" else "tf32"
    sizes = (case.inputs[0], case.channels // case.groups, case.filters // case.groups, case.groups)
    geometry = geometry_of(case)
    dtype = jnp.dtype(case.dtype)
    for kernel, plans in (("result", _pallas_plans.outputs_gathers), ("inputs", _pallas_plans.inputs_gathers)):
        ranked = plans(geometry, *sizes, dtype, way)
        for number, plan in enumerate(
            dict.fromkeys([*dear_enough(ranked, dtype.itemsize, way), *other_tiles(ranked[0])])
        ):
            yield Trial(case, kernel, plan, way, number == 0)
    plan, own = _pallas_plans.kernel_reduce(geometry, *sizes, way)
    others = [
        dataclasses.replace(plan, shares=max(1, plan.shares // 2)),
        dataclasses.replace(plan, shares=2 * plan.shares),
    ]
    for number, one in enumerate(dict.fromkeys([plan, *others, *other_tiles(plan)])):
        yield Trial(case, "kernel", one, own, number == 0)


def geometry_of(case: Case) -> Geometry:
    sizes = zip(case.inputs[1:4], case.kernel, case.strides, strict=True)
    depth, height, width = (resolve_axis(n, k, s, case.dilation, case.padding, None) for n, k, s in sizes)
    return depth, height, width


def dear_enough(ranked: Sequence[Any], itemsize: int, way: str) -> list[Any]:
    """The first, and some that are not much dearer; of those that differ in the order of axes alone one."""
    kinds: dict[Any, Any] = {}
    for plan in ranked:
        if plan.each or _pallas_plans.seconds(plan, itemsize, way) < WORTH * _pallas_plans.seconds(
            ranked[0], itemsize, way
        ):
            kind = (tuple(sorted((axis.pieces, axis.merged, axis.terms) for axis in plan.axes)), plan.flat)
            kinds.setdefault(kind, plan)
    return list(kinds.values())[: OTHERS + 1]


def other_tiles(plan: Any) -> list[Any]:
    tile: Tile = plan.tile
    ways: list[dict[str, int]] = [{"stages": tile.stages % 4 + 1}, {"warps": 12 - tile.warps}]
    if tile.rows >= 128 and not plan.each:
        ways.append({"rows": tile.rows // 2})
    return [dataclasses.replace(plan, tile=dataclasses.replace(tile, **way)) for way in ways]


def operands(case: Case) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (case.inputs, case.kernel_shape, case.outputs)
    return tuple(jax.random.normal(key, shape, case.dtype) for key, shape in zip(keys, shapes, strict=True))


def compiled(trial: Trial) -> Any:
    """Ready to be called, or the reason why not."""
    try:
        return jax.jit(trial.call()).lower(*jax.eval_shape(lambda: operands(trial.case))).compile()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]


def measure(chosen: Sequence[Case]) -> list[dict[str, Any]]:
    planned = [trial for case in chosen for trial in trials(case)]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        programs = list(tqdm(pool.map(compiled, planned), total=len(planned), desc="compiled"))
    rows: list[dict[str, Any]] = []
    case: Case | None = None
    arguments: tuple[jax.Array, ...] = ()
    for trial, program in zip(planned, tqdm(programs, desc="timed"), strict=True):
        if trial.case is not case:
            case, arguments = trial.case, ()
            arguments = operands(trial.case)
        row = {"case": trial.case.name, "kernel": trial.kernel, "plan": trial.described, "chosen": trial.chosen}
        if isinstance(program, str):
            rows.append(row | {"reason": program})
        else:
            times = queued(functools.partial(program, *arguments), jax.block_until_ready)
            rows.append(row | {"seconds": statistics.median(times)})
    return rows


def markdown(run: dict[str, Any]) -> str:
    """A line a trial; the rule's plans come first."""
    lines = []
    for row in run["results"]:
        time_ = f"{1e3 * row['seconds']:.3f}" if "seconds" in row else row["reason"]
        lines.append([row["case"], row["kernel"], f"**{row['plan']}**" if row["chosen"] else row["plan"], time_])
    facts = run["machine"]
    where = ", ".join(
        (*(facts["gpu"] or {}).values(), *(f"{k} {v}" for k, v in facts["versions"].items() if "jax" in k))
    )
    return f"{where}\n\n{table(['case', 'kernel', 'plan (the rule takes the bold one)', 'ms'], lines, '---')}\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in GPU_CASES], metavar="CASE")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/bench"))
    args = parser.parse_args()
    if not _triton.is_hopper():
        parser.error("needs a GPU of compute capability 9")
    rows = measure([case for case in GPU_CASES if not args.cases or case.name in args.cases])
    run = {"machine": machine.facts("default", "gpu"), "results": rows}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "kernels.json").write_text(json.dumps(run, indent=1))
    (args.out / "kernels.md").write_text(markdown(run))
    print(markdown(run))


if __name__ == "__main__":
    main()
