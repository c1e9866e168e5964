"""One contestant in a process of its own: ``python -m benchmarks.worker MODULE VARIANT``.

Requests come as JSON lines on stdin, replies go as JSON lines to what was stdout; whatever else is printed goes to the
log.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import time
import traceback
from typing import Any, TextIO

from benchmarks import cases, contestants, data
from benchmarks.contestants.base import Prepared, UnsupportedError

SLOW, ENDLESS = 0.5, 1.0
"""Seconds: slower calls are timed once a round; once and for all."""
REPEATS = 3

QUEUED, MOST_QUEUED = 0.008, 40
"""Seconds of work in the queue of a device, and calls."""


class Bench:
    """The prepared calls of one contestant."""

    def __init__(self, module: str, variant: str) -> None:
        self.module, self.variant = contestants.load(module), variant
        self.prepared: dict[tuple[str, str], Prepared] = {}

    def prepare(self, fields: dict[str, Any], kind: str) -> dict[str, Any]:
        """Compiles and calls once; the sampled results are for comparison, not the time of this call."""
        case = cases.from_dict(fields)
        prepared = self.module.prepare(case, kind, self.variant)
        self.prepared[case.name, kind] = prepared
        if prepared.known is not None:
            return {"compile_seconds": 0.0, "seconds": [prepared.known], "samples": None, "facts": prepared.facts}
        started = time.perf_counter()
        results = prepared.call()
        if prepared.wait:
            prepared.wait(results)
        first = time.perf_counter() - started
        samples = data.sample(prepared.parts(results)) if prepared.compared else None
        del results
        data.operands.cache_clear()
        compiled = prepared.compile_seconds
        return {
            "compile_seconds": first if compiled is None else compiled,
            "temporary_bytes": prepared.temporary_bytes,
            "first_seconds": first,
            # Compiled ahead, the first call is a warm one: so slow, it need not be made again.
            "seconds": [first] if compiled is not None and first > ENDLESS else [],
            "samples": samples,
            "facts": prepared.facts,
        }

    def run(self, name: str, kind: str) -> dict[str, Any]:
        """Times some calls after one that is not; each holds its result until its time is taken."""
        prepared = self.prepared[name, kind]
        if prepared.known is not None:
            return {"seconds": []}
        call = prepared.call
        gc.collect()
        if prepared.wait:
            return {"seconds": queued(call, prepared.wait)}
        seconds: list[float] = []
        warm = _seconds(call)
        if warm > ENDLESS:
            return {"seconds": [warm]}
        while len(seconds) < (1 if warm > SLOW else REPEATS):
            seconds.append(_seconds(call))
        return {"seconds": seconds}

    def drop(self, name: str) -> dict[str, Any]:
        self.prepared = {key: value for key, value in self.prepared.items() if key[0] != name}
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim:  # a heap that keeps its pages would starve the other processes
            trim(0)
        return {}


def queued(call: Any, wait: Any) -> list[float]:
    """Seconds of a call whose work waits in the queue of a device; as many as take `QUEUED` are awaited together."""
    wait(call())
    started = time.perf_counter()
    wait(call())
    warm = time.perf_counter() - started
    if warm > SLOW:
        return [warm]
    count = max(1, min(MOST_QUEUED, round(QUEUED / warm)))
    found = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        for _ in range(count):
            result = call()
        wait(result)
        found.append((time.perf_counter() - started) / count)
    return found


def _seconds(call: Any) -> float:
    started = time.perf_counter()
    result = call()
    elapsed = time.perf_counter() - started
    del result
    return elapsed


def reply(bench: Bench, request: dict[str, Any]) -> dict[str, Any]:
    """Carries one request out; what goes wrong is part of the answer."""
    command = request.pop("command")
    try:
        return {"ok": getattr(bench, command)(**request)}
    except UnsupportedError as error:
        return {"unsupported": str(error)}
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def serve(module: str, variant: str, channel: TextIO) -> None:
    def send(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=channel, flush=True)

    try:
        bench = Bench(module, variant)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in {"benchmarks", "conv3dt_jax", "examples"}:
            raise
        send({"missing": error.name})
        return
    send({"ok": "ready"})
    gc.disable()  # no collection falls into a measurement
    for line in sys.stdin:
        send(reply(bench, json.loads(line)))


def main() -> None:
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.argv[1], sys.argv[2], channel)


if __name__ == "__main__":
    main()
