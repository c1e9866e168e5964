"""What the layers of JAX's own libraries have in common: they slide a window over the input with zeros put in between.

This package scatters instead: their kernels are ours turned around in space, and their padding becomes what is cropped
from the full result, with an output padding where it reaches beyond it. Ordinary convolutions are the same everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Pairs = Sequence[tuple[int, int]]


def turned(kernel: Any) -> Any:
    """Reversed in space."""
    return kernel[::-1, ::-1, ::-1]


def three(value: Any) -> tuple[int, int, int]:
    if value is None:
        return (1, 1, 1)
    sizes = (value,) * 3 if isinstance(value, int) else tuple(value)
    if len(sizes) != 3:
        raise ValueError(f"a layer of three spatial dimensions is wanted, not one with sizes {sizes}.")
    return sizes


def lax_padding(padding: Any, spans: Sequence[int], strides: Sequence[int]) -> Pairs:
    """What `jax.lax.conv_transpose` puts around the input with its zeros in between, before and after each axis."""
    if not isinstance(padding, str):
        sizes = (padding,) * 3 if isinstance(padding, int) else padding
        return [(one, one) if isinstance(one, int) else tuple(one) for one in sizes]
    pads = []
    for e, s in zip(spans, strides, strict=True):
        if padding == "SAME":
            before = e - 1 if s > e - 1 else math.ceil((e + s - 2) / 2)
            pads.append((before, e + s - 2 - before))
        elif padding == "VALID":
            pads.append((e - 1, s - 1 + max(e - s, 0)))
        else:
            raise ValueError(f"padding={padding!r} is none that jax.lax.conv_transpose gives a meaning to.")
    return pads


def crops(pads: Pairs, spans: Sequence[int]) -> dict[str, Any]:
    """Padding of the zero-stuffed input as what is cropped from the full result, and what is added behind it."""
    cropped, extra = [], []
    for (before, after), e in zip(pads, spans, strict=True):
        if before > e - 1:
            raise ValueError(
                f"a padding of {before} before an axis, beyond the kernel's {e - 1}, has no counterpart here."
            )
        cropped.append((e - 1 - before, max(e - 1 - after, 0)))
        extra.append(max(after - (e - 1), 0))
    return {"padding": tuple(cropped), "output_padding": tuple(extra)}


def added(padding: Any, spans: Sequence[int], strides: Sequence[int]) -> Any:
    """The padding of an ordinary convolution in a library on `jax.lax`, as that of a `Conv3DSpec`."""
    if isinstance(padding, str):
        if padding.upper() == "SAME_LOWER" and max(strides) == 1:
            return tuple((e // 2, (e - 1) // 2) for e in spans)
        if padding.upper() not in ("SAME", "VALID", "CIRCULAR"):
            raise ValueError(f"padding={padding!r} has no counterpart here; pad the inputs with jax.numpy.pad before.")
        return padding
    return (
        padding if isinstance(padding, int) else tuple(one if isinstance(one, int) else tuple(one) for one in padding)
    )
