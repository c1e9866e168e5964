"""Integer geometry of a transposed convolution, and of the convolution that it is the adjoint of: one axis.

Symbols, per spatial axis (A guide to convolution arithmetic, arXiv:1603.07285):

    n   input length            s   stride              out  output length
    k   kernel size (taps)      d   dilation            lo   first kept element of the full result
    ke = (k - 1) * d + 1        effective kernel        full = (n - 1) * s + ke

Input ``i`` and tap ``t`` meet at position ``i * s + t * d`` of the full result. A convolution reads the same axis
backward: from ``out`` elements to ``n``, with ``lo`` elements of padding before them.

Only the standard library is imported here. Lengths may be symbolic dimensions of ``jax.export``: every formula keeps
the part that does not depend on them a plain integer.
"""

from __future__ import annotations

import dataclasses
from typing import Any

AXIS_NAMES = ("depth", "height", "width")


@dataclasses.dataclass(frozen=True)
class Axis:
    """One spatial axis: its sizes, and the window ``[lo, lo + out)`` of the full result that is kept.

    ``wraps`` marks circular padding: positions outside the window re-enter it modulo ``out``.
    """

    n: Any
    k: int
    s: int
    d: int
    lo: int
    out: Any
    wraps: bool = False

    @property
    def ke(self) -> int:
        return effective_kernel(self.k, self.d)

    @property
    def full(self) -> Any:
        return full_length(self.n, self.k, self.s, self.d)

    @property
    def is_empty(self) -> bool:
        """Whether no product reaches the window: no input, no output, or a window past the end."""
        if not all(isinstance(size, int) for size in (self.n, self.out)):
            return False
        return self.n == 0 or self.out == 0 or (self.lo >= self.full and not self.wraps)

    @property
    def overlaps(self) -> bool:
        """Whether neighbouring inputs write to the same output."""
        return self.ke > self.s


Geometry = tuple[Axis, Axis, Axis]


def effective_kernel(k: int, d: int) -> int:
    return (k - 1) * d + 1


def full_length(n: Any, k: int, s: int, d: int) -> Any:
    return (n - 1) * s + effective_kernel(k, d)


def resolve_axis(n: Any, k: int, s: int, d: int, padding: Any, output_padding: int | None) -> Axis:
    """Places the window for ``padding`` ("valid", "same", "circular" or a crop ``(p0, p1)``) and ``output_padding``."""
    ke, full = effective_kernel(k, d), full_length(n, k, s, d)
    if padding == "circular":
        return Axis(n, k, s, d, max(ke - s, 0) // 2, n * s, wraps=True)
    if padding == "valid":
        lo, out = 0, n * s + max(ke - s, 0) if output_padding is None else full + output_padding
    elif padding == "same":
        excess = ke - s if output_padding is None else 2 * (ke // 2) - output_padding
        lo, out = max(excess, 0) // 2, full - excess
    else:
        lo, out = padding[0], full - padding[0] - padding[1] + (output_padding or 0)
    return Axis(n, k, s, d, lo, _not_negative(out, n))


def resolve_axis_to_size(n: Any, k: int, s: int, d: int, padding: Any, size: Any) -> Axis:
    """Places the window that gives ``size`` outputs; ``size`` must be within `reachable_sizes`."""
    axis = resolve_axis(n, k, s, d, padding, None)
    lo = max(axis.full - size, 0) // 2 if padding == "same" else axis.lo
    return dataclasses.replace(axis, out=size, lo=lo)


def reachable_sizes(n: Any, k: int, s: int, d: int, padding: Any, limit: int) -> tuple[Any, Any]:
    """Smallest and largest output length that output paddings below ``limit`` (or None) give."""
    default = resolve_axis(n, k, s, d, padding, None).out
    if padding == "circular":
        return default, default
    low = resolve_axis(n, k, s, d, padding, 0).out
    high = resolve_axis(n, k, s, d, padding, limit - 1).out
    return (low if _is_zero(n) else max(low, 1)), max(high, default)


def resolve_adjoint_axis(m: Any, k: int, s: int, d: int, padding: Any) -> Axis:
    """The axis that a convolution of ``m`` elements reads backward, with TensorFlow's "same".

    "circular" has the other end where "same" has zeros; explicit padding ``(p0, p1)`` is what is added at the ends.
    """
    ke = effective_kernel(k, d)
    if padding in ("same", "circular"):
        n, added = -(-m // s), max(ke - s + (-m % s if s > 1 else 0), 0) if ke > 1 else 0
        return Axis(n, k, s, d, added // 2, m, wraps=padding == "circular")
    before, after = (0, 0) if padding == "valid" else padding
    return Axis(_not_negative((m + before + after - ke) // s + 1, m), k, s, d, before, m)


def turned(axis: Axis) -> Axis | None:
    """Without strides, the axis on which a transposed convolution with the kernel turned around is the convolution.

    ``x[j] = sum_t y[j + t * d - lo] w[t]`` adds ``y[i]`` times tap ``k - 1 - t`` to ``x[i + t * d - (ke - 1 - lo)]``.
    None where more is padded than a kernel reaches, so that nothing is cropped.
    """
    lo = axis.ke - 1 - axis.lo
    if axis.s > 1 or lo < 0:
        return None
    return Axis(axis.out, axis.k, 1, axis.d, lo, axis.n, axis.wraps)


def part_of_outputs(axis: Axis, length: int) -> tuple[int, Axis]:
    """``length`` outputs from ``c * s`` on, for whatever c, as an axis of their own.

    Returns the first input that it takes, counted from c, and the axis. Inputs before and behind what there is are
    zeros, or the other end of a circular axis.
    """
    first = min(-((axis.ke - 1 - axis.lo) // axis.s), axis.lo // axis.s)
    last = (length - 1 + axis.lo) // axis.s
    return first, Axis(last - first + 1, axis.k, axis.s, axis.d, axis.lo - first * axis.s, length)


def part_of_inputs(axis: Axis, length: int) -> tuple[int, Axis]:
    """``length`` inputs from i on: the first output that they reach, counted from ``i * s``, and their full axis."""
    return -axis.lo, Axis(length, axis.k, axis.s, axis.d, 0, full_length(length, axis.k, axis.s, axis.d))


def tap_phases(axis: Axis) -> tuple[tuple[int, int], ...]:
    """Splits each tap's offset ``t * d`` as ``block * s + residue``: its (block, residue) pairs, tap by tap."""
    return tuple(divmod(t * axis.d, axis.s) for t in range(axis.k))


def _not_negative(out: Any, n: Any) -> Any:
    return max(out, 0) if _is_zero(n) else out


def _is_zero(n: Any) -> bool:
    return isinstance(n, int) and n == 0
