"""Whether "auto" chooses well: fails where another lowering is much faster. `make bench-check`.

Every lowering runs on every case beside "auto", interleaved. A case where one is more than 1.3 times faster is measured
again with more rounds, "auto" and that lowering alone, before it counts. Calls under 0.2 ms are exempt: they are mostly
dispatch, and their ratio is noise.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from tqdm import tqdm

from benchmarks.cases import CASES, CONVOLUTIONS, KINDS, Case
from benchmarks.contestants import OURS, lowering_names
from benchmarks.orchestrate import Progress, Record, session
from benchmarks.pool import ALLOCATORS

ALL = [*CASES, *CONVOLUTIONS]
TOLERATED, EXEMPT = 1.3, 2e-4
ROUNDS, ROUNDS_AGAIN = 3, 12
PATIENCE = 2.0
"""Times the quickest: a slower lowering is no suspect, and gets no more rounds."""


class Finding(NamedTuple):
    """A lowering that beat "auto", with both medians in seconds."""

    case: Case
    kind: str
    lowering: str
    auto: float
    other: float

    def __str__(self) -> str:
        return (
            f"{self.case.name} {self.kind}: {self.lowering} takes {1e3 * self.other:.2f} ms, "
            f"auto {1e3 * self.auto:.2f} ms: {self.auto / self.other:.2f} times faster"
        )


def findings(case: Case, records: Sequence[Record]) -> list[Finding]:
    """The quickest lowering of each kind, where it beats "auto" by more than is tolerated."""
    found = []
    for kind in dict.fromkeys(record["kind"] for record in records):
        times = {r["contestant"]: r["median"] for r in records if r["kind"] == kind and "median" in r}
        auto = times.pop(OURS, None)
        if auto is None:
            reason = next(r.get("reason") for r in records if r["kind"] == kind and r["contestant"] == OURS)
            raise SystemExit(f"{case.name} {kind}: auto was not timed: {reason}")
        if times and auto > EXEMPT:
            other = min(times, key=times.__getitem__)
            found += [Finding(case, kind, other, auto, times[other])] if auto > TOLERATED * times[other] else []
    return found


def confirmed(suspect: Finding, args: argparse.Namespace, progress: Progress) -> Finding | None:
    """The suspect measured again, in fresh processes; None where it does not stand."""
    names = {name: ("ours", name) for name in (OURS, suspect.lowering)}
    rounds = args.rounds * ROUNDS_AGAIN // ROUNDS
    with session(names, rounds, args.allocator, args.out, progress, compare=False) as running:
        return next(iter(findings(suspect.case, running.measure(suspect.case, [suspect.kind]))), None)


class Quiet:
    """Progress that nobody watches."""

    def update(self, n: float = 1) -> None: ...

    def set_description(self, text: str) -> None: ...


def check(chosen: Sequence[Case], args: argparse.Namespace) -> list[Finding]:
    names = {name: ("ours", name) for name in (OURS, *lowering_names())}
    total = len(chosen) * len(args.kinds) * len(names) * (args.rounds + 1)
    suspects = []
    with (
        tqdm(total=total, unit="turn", dynamic_ncols=True) as progress,
        session(names, args.rounds, args.allocator, args.out, progress, compare=False, patience=PATIENCE) as running,
    ):
        for case in chosen:
            suspects += findings(case, running.measure(case, args.kinds))
    for suspect in suspects:
        print(f"suspected, measured again: {suspect}")
    again = (confirmed(suspect, args, Quiet()) for suspect in suspects)
    return [finding for finding in again if finding]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.check", description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in ALL], metavar="CASE")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="a suspect gets four times as many")
    parser.add_argument("--allocator", choices=list(ALLOCATORS), default="default")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/bench"), help="for the workers' log")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    chosen = [case for case in ALL if not args.cases or case.name in args.cases]
    found = check(chosen, args)
    for finding in found:
        print(f"FAILED {finding}")
    print(f'{len(chosen)} cases; calls under {1e3 * EXEMPT} ms are exempt; "auto" was beaten {len(found)} times')
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
