"""How one platform computes the primitives that an operation is made of, in numbers."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from conv3dt_jax import _choice
from conv3dt_jax._primitives import Form
from conv3dt_jax.lowerings import LOWERINGS
from conv3dt_jax.lowerings._work import GRADIENTS, Call


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one platform computes the result, or both gradients.

    ``lowering`` names two where the gradients are computed apart and differently. ``multiply_adds`` are those made,
    zeros included, but the zeros that XLA puts between the inputs for `dilated`; ``temporary_bytes`` is an estimate of
    the most held at a time beside operands and results (on a CPU; accelerators choose for themselves).
    """

    lowering: str
    reason: str
    multiply_adds: int
    temporary_bytes: int


def plan_of(kinds: Sequence[str], platform: str, whole: Form, batch: int) -> Plan:
    """The plan for primitives that are computed one after the other."""
    if batch == 0 or any(axis.is_empty for axis in whole.geometry):
        return Plan("none", "the result is empty, or zeros and bias", 0, 0)
    plans = []
    for kind, form in itertools.chain.from_iterable(_choice.steps(kind, platform, whole) for kind in kinds):
        call = Call.of(form, batch, _choice.room_for(platform, form, batch))
        if form.implementation == "auto":
            name, reason = _choice.decide(kind, platform, form, batch)
        else:
            name, reason = form.implementation, "named by `implementation`"
        work: Any = LOWERINGS[name].work(call, gradients=GRADIENTS[kind])
        plans.append(Plan(name, reason, work.multiply_adds, work.temporary_bytes))
    return Plan(
        lowering=" and ".join(dict.fromkeys(plan.lowering for plan in plans)),
        reason="; ".join(dict.fromkeys(plan.reason for plan in plans)),
        multiply_adds=sum(plan.multiply_adds for plan in plans),
        temporary_bytes=max(plan.temporary_bytes for plan in plans),
    )


def size_text(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.1f} {unit}" if unit != "B" else f"{size} B"
        size /= 1024
    return f"{size:.1f} GiB"
