"""PyTorch's `conv_transpose3d`, or `conv3d`, contiguous or in the memory format channels_last_3d.

Its `conv3d` pads both ends alike, as its users do; where TensorFlow's alignment differs, the results are not compared.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

from benchmarks import data
from benchmarks.cases import Case
from benchmarks.contestants.base import Prepared

torch.set_num_threads(len(os.sched_getaffinity(0)))

DEVICE = os.environ.get("BENCHMARK_DEVICE", "cpu")

KERNEL_AXES = (4, 3, 0, 1, 2)
"""Keras's ``(kd, kh, kw, F // g, C)`` to PyTorch's ``(C, F // g, kd, kh, kw)``."""


def window(case: Case) -> tuple[list[int], list[int]]:
    """``padding`` and ``output_padding``; where their sum cannot end early enough, the result is sliced after."""
    lo = [a.lo for a in case.axes]
    return lo, [max(a.out - a.full + 2 * a.lo, 0) for a in case.axes]


def operation(case: Case, x: Any, w: Any) -> Any:
    padding, output_padding = window(case)
    y = torch.nn.functional.conv_transpose3d(
        x, w, None, case.strides, padding, output_padding, case.groups, (case.dilation,) * 3
    )
    d, h, w_ = case.spatial_outputs
    return y if y.shape[2:] == (d, h, w_) else y[:, :, :d, :h, :w_]


def ends(case: Case) -> list[tuple[int, int]]:
    """What a convolution of the case pads, before and behind."""
    return [(a.lo, max(a.full - a.lo - a.out, 0)) for a in case.axes]


def convolution(case: Case, x: Any, w: Any, aligned: bool) -> Any:
    pads = [0] * 3
    if aligned:
        x = torch.nn.functional.pad(x, [end for pair in reversed(ends(case)) for end in pair])
    else:
        pads = [(before + behind + 1) // 2 for before, behind in ends(case)]
    return torch.nn.functional.conv3d(x, w, None, case.strides, pads, (case.dilation,) * 3, case.groups)


def parts(results: Any) -> list[np.ndarray]:
    arrays = [part.detach().to(torch.promote_types(part.dtype, torch.float32)).cpu().numpy() for part in results]
    layouts = (data.to_channels_last, data.to_channels_last, lambda w: w.transpose(2, 3, 4, 1, 0))
    return [layout(array) for layout, array in zip(layouts, arrays, strict=False)]


def operands(case: Case, variant: str, dtype: Any = None) -> tuple[Any, Any, Any]:
    """Inputs, kernel and cotangent where they are computed with, rounded to the dtype of the case."""
    inputs, kernel, cotangent = data.operands(case)
    memory_format = {"contiguous": torch.contiguous_format, "channels_last_3d": torch.channels_last_3d}[variant]
    placed = []
    for array, axes in ((inputs, (0, 4, 1, 2, 3)), (kernel, KERNEL_AXES), (cotangent, (0, 4, 1, 2, 3))):
        tensor = torch.tensor(array).to(DEVICE).to(getattr(torch, case.dtype))
        placed.append(tensor.to(dtype or tensor.dtype).permute(axes).contiguous(memory_format=memory_format))
    return placed[0], placed[1], placed[2]


def prepare(case: Case, kind: str, variant: str, dtype: Any = None, aligned: bool = False) -> Prepared:
    x, w, ct = operands(case, variant, dtype)

    def run() -> Any:
        return operation(case, x, w) if case.transposed else convolution(case, x, w, aligned)

    def forward() -> Any:
        with torch.no_grad():
            return (run(),)

    def training() -> Any:
        y = run()
        return (y, *torch.autograd.grad(y, (x, w), ct))

    if kind == "training":
        x.requires_grad_()
        w.requires_grad_()
    compared = case.transposed or aligned or all(before == behind for before, behind in ends(case))
    return Prepared(call=forward if kind == "forward" else training, parts=parts, compared=compared)
