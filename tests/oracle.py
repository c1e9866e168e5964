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
