"""Worker processes, one a contestant, and the talk with them. Standard library only."""

from __future__ import annotations

import json
import os
import pathlib
import select
import subprocess
import sys
import time
from typing import Any

ALLOCATORS = {
    "default": "",
    "keep": ":".join(
        f"glibc.malloc.{name}={value}"
        for name, value in {
            "mmap_threshold": 2**32,
            "trim_threshold": 2**32,
            "top_pad": 2**26,
            "arena_max": 1,  # the heaps of other threads cannot hold large blocks, the main one can
        }.items()
    ),
}
"""glibc's tunables. "keep": freed pages stay in the heap, where the next call finds them already mapped."""

DEVICES = {
    "cpu": {"JAX_PLATFORMS": "cpu", "BENCHMARK_DEVICE": "cpu", "BENCHMARK_QUEUE": ""},
    "gpu": {
        "JAX_PLATFORMS": "cuda",
        "BENCHMARK_DEVICE": "cuda",
        "BENCHMARK_QUEUE": "1",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    },
}
"""What tells a process where to compute. On a GPU several share the memory."""

REST = 0.02
"""Seconds before a call is timed: the threads of the one before it stop spinning."""

TIMEOUT = 900.0


class WorkerDiedError(Exception):
    """The process ended, or had to be ended, before it answered."""


class Worker:
    """One process; started when first asked, and again after it died."""

    def __init__(
        self, name: str, module: str, variant: str, allocator: str, log: pathlib.Path, device: str = "cpu"
    ) -> None:
        self.name, self.missing = name, ""
        self._command = [sys.executable, "-m", "benchmarks.worker", module, variant]
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._environment = {
            **DEVICES[device],
            "KERAS_BACKEND": "jax",
            "TF_CPP_MIN_LOG_LEVEL": "2",
            **os.environ,
            "GLIBC_TUNABLES": ALLOCATORS[allocator],
        }

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def ask(self, command: str, **request: Any) -> dict[str, Any]:
        """The reply: {"ok": ...}, {"unsupported": reason}, {"error": message} or {"missing": package}."""
        if self._process is None and not self.missing:
            self._start()
        if self.missing:
            return {"missing": self.missing}
        if command == "run":
            time.sleep(REST)
        return self._exchange({"command": command, **request})

    def stop(self) -> None:
        if self._process is not None:
            process, self._process = self._process, None
            if process.stdin:
                process.stdin.close()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout:
                process.stdout.close()

    def _start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=self._environment
            )
        hello = self._exchange(None)
        self.missing = hello.get("missing", "")
        if self.missing:
            self.stop()

    def _exchange(self, message: dict[str, Any] | None) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            if message is not None:
                self._process.stdin.write(json.dumps(message).encode() + b"\n")
                self._process.stdin.flush()
            return json.loads(self._read_line())
        except (OSError, EOFError, TimeoutError) as error:
            self._process.kill()
            code = self._process.wait()
            self._process = None
            cause = str(error) if isinstance(error, TimeoutError) else f"its process ended with status {code}"
            raise WorkerDiedError(f"{cause}; see {self._log.name}") from error

    def _read_line(self) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        descriptor, line, end = self._process.stdout.fileno(), b"", time.monotonic() + TIMEOUT
        while not line.endswith(b"\n"):
            if not select.select([descriptor], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError(f"no answer in {TIMEOUT:.0f} s")
            chunk = os.read(descriptor, 1 << 20)
            if not chunk:
                raise EOFError
            line += chunk
        return line
