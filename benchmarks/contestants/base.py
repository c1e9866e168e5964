"""What a contestant hands to its worker."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.cases import Case


class UnsupportedError(Exception):
    """The contestant cannot do this case; the message says why."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A call that waits for its results, and what is known about it before it is timed.

    ``parts`` turns results into NumPy arrays in the layout of `benchmarks.data.operands`: the output and, for
    "training", the gradients of inputs and kernel. ``compile_seconds`` is None where compilation is part of the
    first call. With ``wait``, a call only puts its work in the queue of a device, and ``wait`` awaits a result;
    ``known`` is the time of what is not run.
    """

    call: Callable[[], Any]
    parts: Callable[[Any], Sequence[np.ndarray]]
    compile_seconds: float | None = None
    temporary_bytes: int | None = None
    compared: bool = True
    wait: Callable[[Any], Any] | None = None
    known: float | None = None
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


def require(condition: bool, reason: str) -> None:
    if not condition:
        raise UnsupportedError(reason)


def inverse(axes: Sequence[int]) -> tuple[int, ...]:
    """The permutation that undoes ``axes``."""
    return tuple(sorted(range(len(axes)), key=axes.__getitem__))


def grouped_kernel(case: Case, w: np.ndarray) -> np.ndarray:
    """``(kd, kh, kw, F // g, C)`` to ``(kd, kh, kw, C // g, F)``, where filters of a block meet its input block."""
    g, f, c = case.groups, case.filters // case.groups, case.channels // case.groups
    return w.reshape(*case.kernel, f, g, c).transpose(0, 1, 2, 5, 4, 3).reshape(*case.kernel, c, g * f)


def ungrouped_kernel(case: Case, w: np.ndarray) -> np.ndarray:
    """The inverse of `grouped_kernel`."""
    g, f, c = case.groups, case.filters // case.groups, case.channels // case.groups
    return w.reshape(*case.kernel, c, g, f).transpose(0, 1, 2, 5, 4, 3).reshape(case.kernel_shape)
