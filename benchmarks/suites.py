"""What can be measured: the cases, the demo's network, time against volume. Each run is stored as one JSON file."""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from benchmarks import machine
from benchmarks.cases import CASES, CONVOLUTIONS, EVERY_LOWERING, GPU_CASES, K2, K3, Case
from benchmarks.contestants import (
    FLOOR,
    GPU_LOWERINGS,
    LAX,
    NETWORKS,
    OTHER_FRAMEWORKS,
    OURS,
    REFERENCE,
    TORCH,
    contestants,
    gpu_contestants,
)  # fmt: skip
from benchmarks.orchestrate import Record, Skip, Stages, session

VOLUMES = (16, 32, 64, 96, 128, 160)
NETWORK_SIZES = (64,)
CLASSES = 4
LONGEST = 20.0
"""Seconds of a call: `jax.lax` sits out the volumes where it would take longer."""
PATIENCE = 20.0
"""Times the quickest: a slower contestant is timed in one round only."""

Names = Mapping[str, tuple[str, str]]


def run(args: argparse.Namespace) -> list[pathlib.Path]:
    """The suites that the command line asks for; the files they were stored in."""
    if args.platform == "gpu":
        return [gpu(args)]
    if args.network:
        return [network(args)]
    if args.volume:
        return [volume(args)]
    if args.convolutions:
        return [convolutions(args)]
    if not args.all:
        return [cases(args, args.allocator, args.contestants)]
    kept = args.contestants or [
        name for name in contestants() if name not in ("flax", "keras", "equinox", "haiku")
    ]  # wrappers of the convolution that jax.lax stands for
    return [
        cases(args, "default", args.contestants),
        cases(args, "keep", kept),
        convolutions(args),
        network(args),
        volume(args),
    ]


def cases(args: argparse.Namespace, allocator: str, wanted: Sequence[str] | None) -> pathlib.Path:
    chosen = [case for case in CASES if not args.cases or case.name in args.cases]
    return _store(args, f"cases-{allocator}", chosen, args.kinds, pick(contestants(), wanted), allocator)


def gpu(args: argparse.Namespace) -> pathlib.Path:
    """The cases scaled up, in the queue of a GPU. What it does not reach in its time it leaves out."""
    chosen = [case for case in GPU_CASES if not args.cases or case.name in args.cases]
    names = pick(gpu_contestants(), args.contestants)
    return _store(args, "gpu", chosen, args.kinds, names, "default", stages=GPU_STAGES)


GPU_STAGES: Stages = [[(FLOOR,)], [TORCH, (OURS,)], [(REFERENCE,), (LAX,), *((name,) for name in GPU_LOWERINGS)]]
"""The floor and PyTorch measure while they are prepared, and have the GPU for themselves but for what ours compiles."""


def convolutions(args: argparse.Namespace) -> pathlib.Path:
    """Ordinary convolutions; of JAX's peers `jax.lax`, which all others call."""
    chosen = [case for case in CONVOLUTIONS if not args.cases or case.name in args.cases]
    wanted = args.contestants or [name for name in contestants() if name not in ("flax", "keras", "equinox", "haiku")]
    return _store(args, "convolutions", chosen, args.kinds, pick(contestants(), wanted), args.allocator)


def network(args: argparse.Namespace) -> pathlib.Path:
    """One training step of the demo's U-Net; the case only carries its sizes."""
    chosen = [Case(f"unet_{n}", (1, n, n, n, 1), CLASSES, K3, K2, "same") for n in args.sizes or NETWORK_SIZES]
    names = NETWORKS if args.all else pick(NETWORKS, args.contestants)
    return _store(args, "network", chosen, ["step"], names, args.allocator)


def volume(args: argparse.Namespace) -> pathlib.Path:
    """Outputs of growing size, 16 to 16 channels."""
    chosen = [Case(f"volume_{n}", (1, n // 2, n // 2, n // 2, 16), 16, K3, K2, "same") for n in args.sizes or VOLUMES]
    wanted = (not args.all and args.contestants) or [OURS, LAX, *OTHER_FRAMEWORKS]
    return _store(args, "volume", chosen, args.kinds, pick(contestants(), wanted), args.allocator)


def pick(known: Names, wanted: Sequence[str] | None) -> dict[str, tuple[str, str]]:
    """Those wanted, in the order in which they are known, ours (the first) always."""
    first = next(iter(known))
    return {name: where for name, where in known.items() if not wanted or name in wanted or name == first}


def _store(
    args: argparse.Namespace,
    suite: str,
    chosen: Sequence[Case],
    kinds: Sequence[str],
    names: Names,
    allocator: str,
    stages: Stages | None = None,
) -> pathlib.Path:
    """Measures and writes after every case, so that an interrupted run keeps what it has."""
    args.out.mkdir(parents=True, exist_ok=True)
    file = pathlib.Path(args.out, f"{suite}.json")
    stored: dict[str, Any] = {
        "suite": suite,
        "machine": machine.facts(allocator, args.platform),
        "rounds": args.rounds,
        "contestants": list(names),
        "cases": [],
        "results": [],
    }
    total = len(chosen) * len(kinds) * len(names) * (args.rounds + 1)
    with (
        tqdm(total=total, unit="turn", dynamic_ncols=True) as progress,
        session(
            names, args.rounds, allocator, args.out, progress, compare=suite != "network", patience=PATIENCE,
            device=args.platform, stages=stages,
        ) as running,
    ):  # fmt: skip
        begun = time.monotonic()
        for case in chosen:
            if time.monotonic() - begun > args.seconds:
                print(f"\nnot measured, {args.seconds:.0f} s are over: {case.name}", file=sys.stderr)
                continue
            records = running.measure(case, kinds, skips(suite, stored["results"], stored["cases"]))
            stored["results"] += records
            stored["cases"].append({**case.as_dict(), "outputs": case.outputs, "operand_bytes": case.operand_bytes})
            file.write_text(json.dumps(stored, indent=1))
    return file


def skips(suite: str, results: Sequence[Record], done: Sequence[dict[str, Any]]) -> Skip | None:
    return on_few_cases if suite == "gpu" else too_long(results, done)


def on_few_cases(case: Case, kind: str, name: str) -> str | None:
    """On a GPU XLA's lowerings are timed on some cases: for each it tries dozens of kernels."""
    few = name in (LAX, *GPU_LOWERINGS) and case.name not in EVERY_LOWERING
    return f"XLA is timed on {len(EVERY_LOWERING)} cases" if few else None


def too_long(results: Sequence[Record], done: Sequence[dict[str, Any]]) -> Skip | None:
    """Skips `jax.lax` on a volume where it would take longer than `LONGEST`, going by the volume before."""
    if not done or not done[-1]["name"].startswith("volume_"):
        return None
    size = math.prod(done[-1]["outputs"])
    before = [r for r in results if r["case"] == done[-1]["name"] and r["contestant"] == LAX]
    times = {record["kind"]: record.get("median", math.inf) for record in before}

    def skip(case: Case, kind: str, name: str) -> str | None:
        seconds = times.get(kind, 0.0) * math.prod(case.outputs) / size
        return f"would take over {LONGEST:.0f} s" if name == LAX and seconds > LONGEST else None

    return skip
