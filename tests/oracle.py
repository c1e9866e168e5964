"""The definition of the operation, written out in NumPy: a scatter-add in float64, independent of the library.

Nothing is imported from the library. Sizes and crops are computed here from the table of the definition.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np


def triple(value: Any) -> tuple[Any, Any, Any]:
    return tuple(value) if isinstance(value, tuple | list) else (value,) * 3


def window(n: int, k: int, s: int, d: int, padding: Any, a: int | None) -> tuple[int, int]:
    """(lo, out) of one axis, straight from the table."""
    ke = (k - 1) * d + 1
    full = (n - 1) * s + ke
    if padding == "valid":
        out = n * s + max(ke - s, 0) if a is None else full + a
        lo = 0
    elif padding == "same":
        out = n * s if a is None else full - 2 * (ke // 2) + a
        lo = max(ke - s, 0) // 2 if a is None else max(2 * (ke // 2) - a, 0) // 2
    elif padding == "circular":
        out = n * s
        lo = max(ke - s, 0) // 2
    else:
        p0, p1 = padding
        out = full - p0 - p1 + (a or 0)
        lo = p0
    return lo, (max(out, 0) if n == 0 else out)


def _pads(padding: Any) -> tuple[Any, Any, Any]:
    if isinstance(padding, str):
        return (padding.lower(),) * 3
    return tuple((p, p) if isinstance(p, int) else tuple(p) for p in triple(padding))


class Problem:
    """Indices of a transposed convolution: which input and tap meet in which output."""

    def __init__(self, space, window_size, strides, padding, output_padding, dilation_rate):
        self.n, self.k = tuple(space), tuple(window_size)
        self.s, self.d, self.p = triple(strides), triple(dilation_rate), _pads(padding)
        self.a = triple(output_padding)
        sizes = [window(*axis) for axis in zip(self.n, self.k, self.s, self.d, self.p, self.a, strict=True)]
        self.lo, self.out = zip(*sizes, strict=True)

    def pairs(self):
        """Yields (tap, input index, output index), the indices ready for `np.add.at`."""
        for tap in itertools.product(*map(range, self.k)):
            sources, targets = [], []
            for axis in range(3):
                i = np.arange(self.n[axis])
                position = i * self.s[axis] + tap[axis] * self.d[axis] - self.lo[axis]
                if self.p[axis] == "circular":
                    position = position % max(self.out[axis], 1)
                keep = (position >= 0) & (position < self.out[axis])
                sources.append(i[keep])
                targets.append(position[keep])
            yield tap, (slice(None), *np.ix_(*sources)), (slice(None), *np.ix_(*targets))


def _wide(array: np.ndarray) -> np.ndarray:
    array = np.asarray(array)
    if np.issubdtype(array.dtype, np.complexfloating):
        return array.astype(np.complex128)
    return array.astype(np.int64 if np.issubdtype(array.dtype, np.integer) else np.float64)


def conv3d_transpose(
    x, w, bias=None, *, strides=1, padding="valid", output_padding=None, dilation_rate=1, groups=1
) -> np.ndarray:
    """``x`` (N, D, H, W, C), ``w`` (kd, kh, kw, F // groups, C)."""
    x, w = _wide(x), _wide(w)
    problem = Problem(x.shape[1:4], w.shape[:3], strides, padding, output_padding, dilation_rate)
    channels, filters = x.shape[-1] // groups, w.shape[3]
    y = np.zeros((x.shape[0], *problem.out, filters * groups), np.result_type(x, w))
    for tap, source, target in problem.pairs():
        for g in range(groups):
            block = x[source][..., g * channels : (g + 1) * channels]
            product = block @ w[tap][:, g * channels : (g + 1) * channels].T
            np.add.at(y[..., g * filters : (g + 1) * filters], target, product)
    return y if bias is None else y + _wide(bias)


def vjp(x, w, ct, *, strides=1, padding="valid", output_padding=None, dilation_rate=1, groups=1):
    """The gradients of ``sum(ct * conv3d_transpose(x, w))`` for ``x`` and ``w``, by the same indices read backwards."""
    x, w, ct = _wide(x), _wide(w), _wide(ct)
    problem = Problem(x.shape[1:4], w.shape[:3], strides, padding, output_padding, dilation_rate)
    channels, filters = x.shape[-1] // groups, w.shape[3]
    gx, gw = np.zeros_like(x), np.zeros_like(w)
    for tap, source, target in problem.pairs():
        for g in range(groups):
            inner, outer = slice(g * channels, (g + 1) * channels), slice(g * filters, (g + 1) * filters)
            back = ct[target][..., outer]
            gx[(*source, inner)] += back @ w[tap][:, inner]
            gw[tap][:, inner] += np.einsum("nxyzf,nxyzc->fc", back, x[source][..., inner])
    return gx, gw


def convolution_window(m: int, k: int, s: int, d: int, padding: Any) -> tuple[int, int]:
    """(lo, n) of one axis of a convolution: elements of padding before it, and outputs."""
    ke = (k - 1) * d + 1
    if padding in ("same", "circular"):
        n = -(-m // s)
        return max((n - 1) * s + ke - m, 0) // 2, n
    before, after = (0, 0) if padding == "valid" else padding
    return before, (max((m + before + after - ke) // s + 1, 0) if m == 0 else (m + before + after - ke) // s + 1)


def conv3d(x, w, bias=None, *, strides=1, padding="valid", dilation_rate=1, groups=1) -> np.ndarray:
    """The ordinary convolution, ``w`` (kd, kh, kw, C // groups, F): every output gathers what its window covers."""
    y, _, _ = _convolution(x, w, None, strides, padding, dilation_rate, groups)
    return y if bias is None else y + _wide(bias)


def conv3d_vjp(x, w, ct, *, strides=1, padding="valid", dilation_rate=1, groups=1):
    """The gradients of ``sum(ct * conv3d(x, w))``."""
    return _convolution(x, w, ct, strides, padding, dilation_rate, groups)[1:]


def _convolution(x, w, ct, strides, padding, dilation_rate, groups):
    x, w = _wide(x), _wide(w)
    s, d, p = triple(strides), triple(dilation_rate), _pads(padding)
    sizes = zip(x.shape[1:4], w.shape[:3], s, d, p, strict=True)
    lo, n = zip(*(convolution_window(*axis) for axis in sizes), strict=True)
    y = np.zeros((x.shape[0], *n, w.shape[4]), np.result_type(x, w))
    ct = np.zeros_like(y) if ct is None else _wide(ct)
    gx, gw = np.zeros_like(x), np.zeros_like(w)
    inner, outer = w.shape[3], w.shape[4] // groups
    for where in np.ndindex(*n):
        out = (slice(None), *where)
        for tap in np.ndindex(*w.shape[:3]):
            place = [i * a + t * b - c for i, t, a, b, c in zip(where, tap, s, d, lo, strict=True)]
            place = [q % m if r == "circular" else q for q, m, r in zip(place, x.shape[1:4], p, strict=True)]
            if any(not 0 <= q < m for q, m in zip(place, x.shape[1:4], strict=True)):
                continue
            source = (slice(None), *place)
            for g in range(groups):
                c, f = slice(g * inner, (g + 1) * inner), slice(g * outer, (g + 1) * outer)
                y[(*out, f)] += x[(*source, c)] @ w[(*tap, slice(None), f)]
                gx[(*source, c)] += ct[(*out, f)] @ w[(*tap, slice(None), f)].T
                gw[(*tap, slice(None), f)] += x[(*source, c)].T @ ct[(*out, f)]
    return y, gx, gw
