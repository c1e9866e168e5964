"""Windows of an axis that lies on several devices: what each needs of its neighbours, and nothing else, travels.

An axis of ``length`` elements lies on ``shards`` devices in pieces of ``ceil(length / shards)``, the last of which may
be short or empty. Every device needs a window of it, of one size, from a start of its own. What it does not have comes
from the device that has it: all devices at the same distance send at once, each as much as the one that needs most.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class Round:
    """One exchange: device r sends ``size`` elements from ``starts[r]`` on; ``pairs`` are (sender, receiver)."""

    distance: int
    pairs: tuple[tuple[int, int], ...]
    starts: tuple[int, ...]
    size: int


@dataclasses.dataclass(frozen=True)
class Exchange:
    """The rounds, in the order in which what comes lies side by side, and where each device finds its window there.

    Attributes:
      size: of a window.
      before: rounds whose elements lie before those that a device has.
      after: the others.
      places: for every device and element of its window, its place, or ``total`` where there is none: zeros.
      total: elements side by side.
    """

    size: int
    before: tuple[Round, ...]
    after: tuple[Round, ...]
    places: tuple[tuple[int, ...], ...]
    total: int


def plan(length: int, shards: int, starts: Sequence[int], size: int, wraps: bool = False) -> Exchange:
    """How device r gets the elements ``[starts[r], starts[r] + size)``; zeros, or the other end, beyond the axis."""
    piece = -(-length // shards)
    needs: list[list[tuple[int, int] | None]] = []  # (distance, place in the owner's piece)
    for device, start in enumerate(starts):
        row: list[tuple[int, int] | None] = []
        for place in range(start, start + size):
            index = place % length if wraps else place
            if 0 <= index < length:
                distance = index // piece - device
                if wraps:  # the shorter way round
                    distance = (distance + shards // 2) % shards - shards // 2
                row.append((distance, index % piece))
            else:
                row.append(None)
        needs.append(row)
    distances = sorted({need[0] for row in needs for need in row if need and need[0]})
    rounds = [_round(distance, needs, piece, wraps) for distance in distances]
    before = tuple(each for each in rounds if each.distance < 0)
    after = tuple(each for each in rounds if each.distance > 0)
    bases, base = {}, 0
    for each in before:
        bases[each.distance], base = base, base + each.size
    bases[0], base = base, base + piece
    for each in after:
        bases[each.distance], base = base, base + each.size
    by_distance = {each.distance: each for each in rounds}
    places = []
    for device, row in enumerate(needs):
        found = []
        for need in row:
            if need is None:
                found.append(base)
                continue
            distance, local = need
            first = by_distance[distance].starts[(device + distance) % shards] if distance else 0
            found.append(bases[distance] + local - first)
        places.append(tuple(found))
    return Exchange(size, before, after, tuple(places), base)


def _round(distance: int, needs: Sequence[Sequence[tuple[int, int] | None]], piece: int, wraps: bool) -> Round:
    """What the devices at one distance send each other."""
    shards = len(needs)
    hulls = {}
    for device, row in enumerate(needs):
        local = [need[1] for need in row if need and need[0] == distance]
        if local:
            hulls[device] = (min(local), max(local) + 1)
    size = max(end - start for start, end in hulls.values())
    starts, pairs = [0] * shards, []
    for device, (start, _) in hulls.items():
        sender = (device + distance) % shards if wraps else device + distance
        starts[sender] = min(start, piece - size)
        pairs.append((sender, device))
    return Round(distance, tuple(pairs), tuple(starts), size)


def exchanged(
    array: jax.Array, dim: int, exchange: Exchange, names: tuple[str, ...], numbers: Sequence[int]
) -> jax.Array:
    """The window of this device, inside a manual computation over the mesh axes ``names``; see `Cut.numbers`."""
    device = lax.axis_index(names)

    def received(each: Round) -> jax.Array:
        start = jnp.asarray(each.starts, jnp.int32)[device]
        sent = lax.dynamic_slice_in_dim(array, start, each.size, dim)
        return lax.ppermute(sent, names, [(numbers[sender], numbers[receiver]) for sender, receiver in each.pairs])

    pieces = [*map(received, exchange.before), array, *map(received, exchange.after)]
    together = jnp.concatenate(pieces, dim) if len(pieces) > 1 else array
    run = _run(exchange)
    if run is not None:
        first, lead, trail = run
        if lead or trail:
            padding = [(lead, trail, 0) if i == dim else (0, 0, 0) for i in range(array.ndim)]
            together = lax.pad(together, jnp.zeros((), array.dtype), padding)
        if len(set(first)) == 1:
            return lax.slice_in_dim(together, first[0], first[0] + exchange.size, axis=dim)
        return lax.dynamic_slice_in_dim(together, jnp.asarray(first, jnp.int32)[device], exchange.size, dim)
    places = jnp.asarray(exchange.places, jnp.int32)[device]
    return jnp.take(together, places, axis=dim, mode="fill", fill_value=0)


def _run(exchange: Exchange) -> tuple[list[int], int, int] | None:
    """Where every window is one run of what lies side by side: its firsts, and zeros to add before and behind.

    What a device is sent by nobody is zeros, which do where the window has none.
    """
    bounds, base = [], 0
    for each in exchange.before:
        bounds.append((base, base + each.size, {receiver for _, receiver in each.pairs}))
        base += each.size
    base = exchange.total - sum(each.size for each in exchange.after)
    for each in exchange.after:
        bounds.append((base, base + each.size, {receiver for _, receiver in each.pairs}))
        base += each.size
    firsts = []
    for device, row in enumerate(exchange.places):
        held = [place - i for i, place in enumerate(row) if place < exchange.total]
        first = held[0] if held else exchange.total
        if any(value != first for value in held):
            return None
        for i, place in enumerate(row):
            at = first + i
            zero = not 0 <= at < exchange.total or any(
                low <= at < high and device not in receivers for low, high, receivers in bounds
            )
            if place == exchange.total and not zero:
                return None
        firsts.append(first)
    lead = max(0, -min(firsts))
    trail = max(0, max(firsts) + exchange.size - exchange.total)
    return [first + lead for first in firsts], lead, trail
