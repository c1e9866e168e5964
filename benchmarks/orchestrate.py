"""Rounds: every contestant of a case in turn, in shuffled order, only one of them at work. Standard library only."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import pathlib
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from benchmarks.cases import Case
from benchmarks.contestants import REFERENCE, SPECIAL
from benchmarks.pool import Worker, WorkerDiedError

BUDGET, ENDLESS = 3.0, 1.0
"""Seconds of timed calls, and of one call, after which a contestant sits out the remaining rounds of a case: slow calls
vary little."""

PARTS = ("output", "inputs_gradient", "kernel_gradient")

Record = dict[str, Any]
Stages = Sequence[Sequence[Sequence[str]]]
Skip = Callable[[Case, str, str], str | None]
"""``(case, kind, contestant)`` to the reason why it is not measured, or None."""


class Progress(Protocol):
    """What is used of a `tqdm` bar."""

    def update(self, n: float = 1) -> Any: ...

    def set_description(self, text: str) -> Any: ...


@dataclasses.dataclass
class Session:
    """The workers of one run. A contestant ``patience`` times slower than the quickest gets no more rounds.

    Contestants are prepared one after the other; or by ``stages``, of lanes that go side by side, of names in turn: on
    a GPU most of the time goes into compilation, and into trying kernels, beside which nothing else may compute.
    """

    workers: dict[str, Worker]
    reference: Worker | None
    rounds: int
    progress: Progress
    patience: float = float("inf")
    stages: Stages | None = None
    rng: random.Random = dataclasses.field(default_factory=lambda: random.Random(0))

    def measure(self, case: Case, kinds: Sequence[str], skip: Skip | None = None) -> list[Record]:
        """Prepares all, then times all; the records are in the order of kinds and contestants."""
        try:
            records = []
            for kind in kinds:
                self.progress.set_description(f"{case.name} {kind}")
                prepared = self._prepare(case, kind, skip)
                self._rounds(case, kind, prepared)
                records += prepared
            return [summarized(record) for record in records]
        finally:
            for worker in self.workers.values():
                with contextlib.suppress(WorkerDiedError):
                    if worker.pid:
                        worker.ask("drop", name=case.name)

    def _prepare(self, case: Case, kind: str, skip: Skip | None) -> list[Record]:
        found: dict[str, Any] = {}

        def prepare(names: Sequence[str]) -> None:
            for name in names:
                if name == REFERENCE:
                    found[name] = self._expected(case, kind)
                elif name in self.workers:
                    found[name] = self._one(case, kind, name, skip)
                    self.progress.update()

        for lanes in self.stages or [[(REFERENCE, *self.workers)]]:
            with concurrent.futures.ThreadPoolExecutor(len(lanes)) as pool:
                list(pool.map(prepare, lanes))
        expected = found.pop(REFERENCE, None)
        for record in found.values():
            samples = record.pop("samples", None)
            record["errors"] = errors(samples, expected) if samples and expected else None
        return [found[name] for name in self.workers]

    def _one(self, case: Case, kind: str, name: str, skip: Skip | None) -> Record:
        record: Record = {"case": case.name, "kind": kind, "contestant": name, "status": "ok", "seconds": []}
        reason = skip(case, kind, name) if skip else None
        if reason:
            return record | {"status": "skipped", "reason": reason}
        return record | asked(self.workers[name], "prepare", fields=case.as_dict(), kind=kind)

    def _expected(self, case: Case, kind: str) -> list[list[float]] | None:
        if self.reference is None:
            return None
        answer = asked(self.reference, "prepare", fields=case.as_dict(), kind=kind)
        if "reason" in answer:
            print(f"{case.name} {kind} is not compared: the reference failed: {answer['reason']}", file=sys.stderr)
            return None
        asked(self.reference, "drop", name=case.name)
        return answer["samples"]

    def _rounds(self, case: Case, kind: str, records: list[Record]) -> None:
        order = list(records)
        for _ in range(self.rounds):
            self.rng.shuffle(order)  # a call finds the caches and the clock as the one before left them
            quickest = min((min(r["seconds"]) for r in records if r["seconds"]), default=0.0)
            for record in order:
                if wants_more(record, quickest * self.patience):
                    record |= asked(
                        self.workers[record["contestant"]], "run", record["seconds"], name=case.name, kind=kind
                    )
                self.progress.update()


def wants_more(record: Record, limit: float) -> bool:
    seconds = record["seconds"]
    if record["status"] != "ok":
        return False
    return not seconds or (sum(seconds) < BUDGET and max(seconds) <= ENDLESS and (not limit or min(seconds) <= limit))


def asked(worker: Worker, command: str, seconds: Sequence[float] = (), **request: Any) -> Record:
    """A worker's answer as fields of a record; ``seconds`` are the samples so far, which the new ones follow."""
    try:
        answer = worker.ask(command, **request)
    except WorkerDiedError as error:
        return {"status": "died", "reason": str(error)}
    if "ok" in answer:
        return {**answer["ok"], "seconds": [*seconds, *answer["ok"].get("seconds", [])]}
    if "missing" in answer:
        return {"status": "not installed", "reason": f"{answer['missing']} is not installed"}
    status = "unsupported" if "unsupported" in answer else "error"
    return {"status": status, "reason": answer[status]}


def errors(samples: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]) -> dict[str, float]:
    """Per part of the result: the largest difference relative to the largest value expected."""
    return {
        part: max(abs(a - b) for a, b in zip(got, want, strict=True)) / max(max(map(abs, want)), 1e-30)
        for part, got, want in zip(PARTS, samples, expected, strict=False)
    }


def summarized(record: Record) -> Record:
    """The record with its median and quartiles."""
    seconds = record["seconds"]
    if not seconds or record["status"] != "ok":
        return record
    q1, _, q3 = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return {**record, "median": statistics.median(seconds), "q1": q1, "q3": q3}


@contextlib.contextmanager
def session(
    names: Mapping[str, tuple[str, str]],
    rounds: int,
    allocator: str,
    out: pathlib.Path,
    progress: Progress,
    *,
    compare: bool = True,
    patience: float = float("inf"),
    device: str = "cpu",
    stages: Stages | None = None,
) -> Iterator[Session]:
    """A session whose workers end with it."""
    log = out / "workers.log"
    wanted = {**names, **({REFERENCE: SPECIAL[REFERENCE]} if compare else {})}
    workers = {name: Worker(name, *where, allocator, log, device) for name, where in wanted.items()}
    reference = workers.pop(REFERENCE, None)
    try:
        yield Session(workers, reference, rounds, progress, patience, stages)
    finally:
        for worker in (*workers.values(), *([reference] if reference else [])):
            worker.stop()
