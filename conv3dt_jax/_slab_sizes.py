"""How many slabs: as asked for, or as few as a limit of memory allows."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from conv3dt_jax import _arguments as args
from conv3dt_jax._geometry import AXIS_NAMES
from conv3dt_jax._operation import Reading
from conv3dt_jax._plans import plan_of, size_text
from conv3dt_jax._primitives import Form
from conv3dt_jax._slabs import WHOLE, lines, part_of

Counts = tuple[int, int, int]
DEFAULT_LIMIT = "2GiB"
MARGIN = 1.25
"""What estimates are multiplied by: compilers hold a little more here and there."""
_UNITS = {"b": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}


def byte_count(name: str, value: Any) -> int:
    """Bytes from an integer, or from a string such as "500MB" (powers of 1000) or "2GiB" (of 1024)."""
    rule = "must be a number of bytes, or a string with a unit: '500MB', '2GiB'"
    if not isinstance(value, str):
        try:
            return args.integer(name, value, minimum=1)
        except TypeError:
            raise TypeError(f"{args.received(name, value)} {rule}; not {type(value).__name__}.") from None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", value.lower())
    if not found or found[2] not in _UNITS:
        raise ValueError(f"{args.received(name, value)} {rule}.")
    count = int(float(found[1]) * _UNITS[found[2]])
    if count < 1:
        raise ValueError(f"{args.received(name, value)} must be at least 1 byte.")
    return count


def choose(slabs: Any, limit: Any, sizes: Sequence[int], reading: Reading, batch: int, **held: int) -> Counts:
    """The slabs that are asked for, or those within the limit; ``batch`` is 0 where nothing is computed.

    The arguments are those of `counts_of` and `counts_within`.
    """
    if slabs is not None and limit is not None:
        raise ValueError(
            f"{args.received('slabs', slabs)} and {args.received('memory_limit', limit)} both say how many slabs there "
            "are; give one of them."
        )
    if slabs is not None:
        return counts_of(slabs, sizes)
    return counts_within(DEFAULT_LIMIT if limit is None else limit, reading, batch, **held)


def counts_of(slabs: Any, sizes: Sequence[int]) -> Counts:
    """The argument ``slabs`` for a result of these sizes: three counts, or one for the depth."""
    if args.is_sequence(slabs):
        counts = args.triple("slabs", slabs, minimum=1)
    else:
        counts = (args.integer("slabs", slabs, minimum=1), 1, 1)
    for name, count, size in zip(AXIS_NAMES, counts, sizes, strict=True):
        if count > max(size, 1):
            raise ValueError(
                f"{args.received('slabs', slabs)} asks for {count} slabs along {name}, where the result has {size} "
                f"elements; give at most {size}."
            )
    return counts


def counts_within(limit: Any, reading: Reading, batch: int, more: int = 0, at_once: int = 1) -> Counts:
    """The fewest slabs with which no more than the limit is held at a time.

    Args:
      limit: bytes, see `byte_count`.
      reading: how the form gives the operation.
      batch: N; 0 where nothing is computed.
      more: bytes held besides.
      at_once: slabs held at a time; with more than one there are no gradients.
    """
    most = byte_count("memory_limit", limit)
    if batch == 0:
        return WHOLE
    tried = []
    for counts in _candidates(reading):
        needed = math.ceil(MARGIN * (more + held(reading, batch, counts, at_once)))
        if needed <= most:
            return counts
        tried.append((needed, counts))
    least, counts = min(tried)  # not always the smallest slabs: a plane has another lowering than a volume
    raise ValueError(
        f"{args.received('memory_limit', limit)} cannot be met: the slabs that hold least, {counts} of them, hold "
        f"{size_text(least)} ({least} bytes) at a time; allow at least as much."
    )


def _candidates(reading: Reading) -> Iterator[Counts]:
    """Ever smaller slabs: of the depth first, whose slabs lie together in memory, then of the height and the width."""
    counts = list(WHOLE)
    yield WHOLE
    for dim, axis in enumerate(reading.form.geometry):
        cells = max(axis.out // axis.s, 1) if reading.outputs else axis.n
        blocks = sorted({-(-cells // count) for count in range(1, cells + 1)}, reverse=True)
        for block in blocks[1:]:
            counts[dim] = -(-cells // block)
            yield counts[0], counts[1], counts[2]


def held(reading: Reading, batch: int, counts: Counts, at_once: int = 1) -> int:
    """Bytes held beside operands and results, by the result or by both gradients, whichever are more: an estimate."""
    form = dataclasses.replace(reading.form, slabs=counts)
    forward, backward = (["outputs"], ["gradients"]) if reading.outputs else (["inputs"], ["outputs", "kernel"])
    kinds = forward if at_once > 1 else forward + backward
    return max(_held_by(kind, form, batch, at_once) for kind in kinds)


def _held_by(kind: str, form: Form, batch: int, at_once: int) -> int:
    axes = lines(kind, form)
    part = part_of(form, axes)
    temporary = plan_of([kind], jax.default_backend(), part, batch).temporary_bytes
    if max(form.slabs) == 1 and at_once == 1:
        return temporary
    x, w, y = (dtype.itemsize for dtype in form.dtypes)
    inputs = batch * math.prod(line.axis.n for line in axes) * form.channels * x
    outputs = batch * math.prod(line.axis.out for line in axes) * form.filters * y
    kernel = math.prod(form.kernel_shape()) * w
    copies = 2 if at_once > 1 else 1  # what is read, on the host and on the device
    return at_once * (copies * inputs + outputs) + temporary + kernel
