"""PyTorch on a GPU: `conv_transpose3d` with cuDNN's own choice of a kernel, eager or compiled, whichever is quicker."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.contestants import pytorch
from benchmarks.contestants.base import Prepared

TRIED = 3


def prepare(case: Case, kind: str, variant: str) -> Prepared:
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = case.precision == "default"
    x, w, ct = pytorch.operands(case, variant)

    def run(x: Any, w: Any) -> Any:
        return pytorch.operation(case, x, w)

    torch.compiler.reset()
    ways: dict[str, Callable[[], Any]] = {}
    for name, operation in (("eager", run), ("compiled", torch.compile(run, dynamic=False))):
        ways[name] = _call(operation, kind, x, w, ct)
    if kind == "training":
        x.requires_grad_()
        w.requires_grad_()
    started = time.perf_counter()
    seconds = {name: _seconds(call) for name, call in ways.items()}
    elapsed = time.perf_counter() - started
    best = min(seconds, key=seconds.__getitem__)
    return Prepared(
        call=ways[best],
        parts=pytorch.parts,
        wait=_wait,
        compile_seconds=elapsed,
        temporary_bytes=_temporary_bytes(ways[best]),
        facts={"mode": best, "seconds_by_mode": seconds},
    )


def _call(operation: Callable[..., Any], kind: str, x: Any, w: Any, ct: Any) -> Callable[[], Any]:
    def forward() -> Any:
        with torch.no_grad():
            return (operation(x, w),)

    def training() -> Any:
        y = operation(x, w)
        return (y, *torch.autograd.grad(y, (x, w), ct))

    return forward if kind == "forward" else training


def _wait(result: Any) -> None:
    del result
    if pytorch.DEVICE == "cuda":
        torch.cuda.synchronize()


def _seconds(call: Callable[[], Any]) -> float:
    """Of a call that is warm; cuDNN and the compiler choose at the first."""
    _wait(call())
    started = time.perf_counter()
    for _ in range(TRIED):
        result = call()
    _wait(result)
    return (time.perf_counter() - started) / TRIED


def _temporary_bytes(call: Callable[[], Any]) -> int | None:
    """The most that is held in a call beside its operands and results."""
    if pytorch.DEVICE != "cuda":
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    held = sum(part.numel() * part.element_size() for part in result)
    return torch.cuda.max_memory_allocated() - before - held
