"""One axis of a gathered product: which places of one array a place of another takes, and through which taps.

Cells of the destination, their pieces, and the neighbours that share a product are explained in `_gather`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

from conv3dt_jax._geometry import Axis

Taps = tuple[tuple[tuple[int | None, ...], ...], ...]


@dataclasses.dataclass(frozen=True)
class Walk:
    """One axis. ``taps[r][j][e]`` is the tap of the kernel, or None where there is none.

    Neighbour e of piece r of cell q lies at ``q * stride + offsets[r] + e`` of ``length``; its term j at ``q * scale +
    first[r] + j * step`` of ``size``, which ``wraps`` or has zeros beyond both ends.
    """

    cells: int
    scale: int
    first: tuple[int, ...]
    counts: tuple[int, ...]
    step: int
    size: int
    stride: int
    offsets: tuple[int, ...]
    length: int
    taps: Taps
    wraps: bool = False

    @property
    def pieces(self) -> int:
        return len(self.first)

    @property
    def merged(self) -> int:
        """How many neighbours share a product."""
        return len(self.taps[0][0])

    @property
    def terms(self) -> int:
        return max(self.counts)

    @property
    def stays_inside(self) -> bool:
        """Whether no term lies beyond the ends."""
        last = max(first + (count - 1) * self.step for first, count in zip(self.first, self.counts, strict=True))
        return min(self.first) >= 0 and (self.cells - 1) * self.scale + last < self.size

    @property
    def fills(self) -> bool:
        """Whether no cell sticks out of the destination."""
        last = (self.cells - 1) * self.stride + max(self.offsets) + self.merged - 1
        return min(self.offsets) >= 0 and last < self.length


def outputs_walk(axis: Axis, inputs: int) -> Walk:
    """Output ``q * s + r`` takes inputs ``q + a`` where ``r - t * d = a * s`` for a tap t.

    Each of the s phases is a piece; or ``inputs`` inputs with all their outputs are a cell, whose neighbours they are.
    """
    whole = axis.lo // axis.s
    begin = whole * axis.s - axis.lo
    if inputs == 0:
        return _phases(axis, whole, begin)
    stride, meeting = inputs * axis.s, _meeting(axis)
    taps, first = _shared(
        {(r // axis.s + a, r): t for r in range(stride) for a, t in meeting[r % axis.s]}, stride
    )  # fmt: skip
    cells = (axis.out - 1 - begin) // stride + 1
    return Walk(
        cells, inputs, (whole + first,), (len(taps),), 1, axis.n, stride, (begin,), axis.out, (taps,), axis.wraps
    )  # fmt: skip


def _meeting(axis: Axis) -> list[list[tuple[int, int]]]:
    """For each phase the (input, tap) that meet there, in order."""
    found: list[list[tuple[int, int]]] = [[] for _ in range(axis.s)]
    for t in reversed(range(axis.k)):
        phase = t * axis.d % axis.s
        found[phase].append(((phase - t * axis.d) // axis.s, t))
    return found


def _phases(axis: Axis, whole: int, begin: int) -> Walk:
    taps, first, steps = [], [], set()
    for found in _meeting(axis):
        steps |= {after[0] - before[0] for before, after in itertools.pairwise(found)}
        first.append(whole + found[0][0] if found else whole)
        taps.append([(t,) for _, t in found])
    terms = max(map(len, taps))
    counts = tuple(map(len, taps))
    padded = tuple((*own, *[(None,)] * (terms - len(own))) for own in taps)
    cells, offsets = (axis.out - 1 - begin) // axis.s + 1, tuple(begin + r for r in range(axis.s))
    return Walk(
        cells, 1, tuple(first), counts, max(steps, default=1), axis.n, axis.s, offsets, axis.out, padded, axis.wraps
    )  # fmt: skip


def inputs_walk(axis: Axis, inputs: int) -> Walk:
    """Input i takes outputs ``i * s + t * d - lo``; ``inputs`` of them are a cell."""
    step = math.gcd(axis.s, axis.d) if inputs > 1 else axis.d
    taps, _ = _shared({((e * axis.s + t * axis.d) // step, e): t for e in range(inputs) for t in range(axis.k)}, inputs)
    return Walk(
        -(-axis.n // inputs), inputs * axis.s, (-axis.lo,), (len(taps),), step, axis.out, inputs, (0,), axis.n, (taps,),
        axis.wraps,
    )  # fmt: skip


def _shared(places: dict[tuple[int, int], int], neighbours: int) -> tuple[tuple[tuple[int | None, ...], ...], int]:
    """The taps at (term, neighbour), for all terms from the first to the last; and the first."""
    terms = [term for term, _ in places]
    rows = range(min(terms), max(terms) + 1)
    return tuple(tuple(places.get((term, e)) for e in range(neighbours)) for term in rows), rows[0]
