"""The benchmark's cases: shapes of real networks, and our own. Standard library only: the orchestrator reads this."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

Triple = tuple[int, int, int]
KINDS = ("forward", "training")
"""The result alone; the result and both gradients, for a given cotangent."""


@dataclasses.dataclass(frozen=True)
class Axis:
    """One spatial axis in the symbols of the definition: n inputs, effective kernel ke, stride s, window of full.

    A convolution reads it backward, from ``out`` to ``n``.
    """

    n: int
    ke: int
    s: int
    d: int
    full: int
    out: int
    lo: int


@dataclasses.dataclass(frozen=True)
class Case:
    """A call: inputs ``(N, D, H, W, C)`` whatever the data format, filters, and the sizes of the convolution.

    ``transposed`` tells the two operations apart. ``precision`` of float32 on a GPU: "default" allows TF32, "highest"
    does not.
    """

    name: str
    inputs: tuple[int, int, int, int, int]
    filters: int
    kernel: Triple
    strides: Triple
    padding: str
    dilation: int = 1
    groups: int = 1
    data_format: str = "channels_last"
    dtype: str = "float32"
    transposed: bool = True
    precision: str = "default"

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The spatial axes, with TensorFlow's alignment of "same"."""
        axes = []
        for n, k, s in zip(self.inputs[1:4], self.kernel, self.strides, strict=True):
            ke = (k - 1) * self.dilation + 1
            out = n
            if not self.transposed:
                n = (out - ke) // s + 1 if self.padding == "valid" else -(-out // s)
            full = (n - 1) * s + ke
            if self.transposed:
                out = n * s + (max(ke - s, 0) if self.padding == "valid" else 0)
            lo = 0 if self.padding == "valid" else max(full - out, 0) // 2
            axes.append(Axis(n, ke, s, self.dilation, full, out, lo))
        return tuple(axes)

    @property
    def channels(self) -> int:
        return self.inputs[-1]

    @property
    def channels_first(self) -> bool:
        return self.data_format == "channels_first"

    @property
    def spatial_outputs(self) -> tuple[int, ...]:
        return tuple(axis.out if self.transposed else axis.n for axis in self.axes)

    @property
    def outputs(self) -> tuple[int, ...]:
        """``(N, D', H', W', F)``."""
        return (self.inputs[0], *self.spatial_outputs, self.filters)

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """Keras's layout, ``(kd, kh, kw, F // groups, C)``, or ``(kd, kh, kw, C // groups, F)``."""
        if self.transposed:
            return (*self.kernel, self.filters // self.groups, self.channels)
        return (*self.kernel, self.channels // self.groups, self.filters)

    @property
    def multiply_adds(self) -> int:
        """Of the uncropped transposed convolution, or of the convolution with its padding."""
        cells = self.inputs[0] * math.prod(axis.n for axis in self.axes)
        return cells * math.prod(self.kernel) * self.channels * self.filters // self.groups

    @property
    def operand_bytes(self) -> int:
        """Of inputs, kernel and outputs."""
        values = math.prod(self.inputs) + math.prod(self.kernel_shape) + math.prod(self.outputs)
        return values * (2 if self.dtype == "bfloat16" else 4)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def from_dict(fields: dict[str, Any]) -> Case:
    """The inverse of `Case.as_dict`, also after JSON."""
    triples = {key: tuple(fields[key]) for key in ("inputs", "kernel", "strides")}
    return Case(**{**fields, **triples})


K1, K2, K3, K4, K5 = ((k, k, k) for k in (1, 2, 3, 4, 5))
FIRST, HALF = "channels_first", "bfloat16"

CASES = [
    # Layers of published networks: U-Net, V-Net, 3D-GAN, patch decoders.
    Case("unet_k2s2", (1, 32, 32, 32, 64), 32, K2, K2, "valid"),
    Case("vnet_k2s2_deep", (1, 8, 8, 8, 256), 128, K2, K2, "valid"),
    Case("aniso_k122", (1, 16, 32, 32, 64), 32, (1, 2, 2), (1, 2, 2), "valid"),
    Case("k3s2_same", (1, 32, 32, 32, 32), 32, K3, K2, "same"),
    Case("gan_k4s2", (4, 8, 8, 8, 256), 128, K4, K2, "same"),
    Case("gan_k4s2_last", (4, 32, 32, 32, 64), 1, K4, K2, "same"),
    Case("jax31662", (1, 64, 64, 32, 64), 1, K3, K2, "same"),
    Case("k5s3_valid", (1, 16, 16, 16, 32), 32, K5, K3, "valid"),
    Case("k4s4_patch", (1, 16, 16, 16, 128), 16, K4, K4, "valid"),
    Case("k3s1_same", (1, 32, 32, 32, 32), 32, K3, K1, "same"),
    Case("k3s1_d2", (1, 32, 32, 32, 32), 32, K3, K1, "same", dilation=2),
    # What else the operation can be asked for.
    Case("k3s2_channels_first", (1, 32, 32, 32, 32), 32, K3, K2, "same", data_format=FIRST),
    Case("k2s2_channels_first", (1, 32, 32, 32, 64), 32, K2, K2, "valid", data_format=FIRST),
    Case("k3s2_groups4", (1, 32, 32, 32, 32), 32, K3, K2, "same", groups=4),
    Case("k2s2_depthwise", (1, 32, 32, 32, 32), 32, K2, K2, "valid", groups=32),
    Case("k4s2_depthwise", (1, 32, 32, 32, 32), 32, K4, K2, "same", groups=32),
    Case("k3s2_batch16", (16, 8, 8, 8, 32), 32, K3, K2, "same"),
    Case("tiny", (2, 4, 4, 4, 8), 8, K3, K2, "same"),
    Case("k2s3_gap", (1, 24, 24, 24, 32), 32, K2, K3, "valid"),
    Case("k3s2_odd", (1, 17, 23, 19, 24), 20, K3, K2, "same"),
    Case("k3s2_wide", (1, 48, 48, 48, 8), 8, K3, K2, "same"),
    Case("head_k3s1", (1, 48, 48, 48, 16), 3, K3, K1, "same"),
    Case("unet_k2s2_bf16", (1, 32, 32, 32, 64), 32, K2, K2, "valid", dtype=HALF),
    Case("k3s2_same_bf16", (1, 32, 32, 32, 32), 32, K3, K2, "same", dtype=HALF),
    Case("gan_k4s2_bf16", (4, 8, 8, 8, 256), 128, K4, K2, "same", dtype=HALF),
    Case("k3s1_same_bf16", (1, 32, 32, 32, 32), 32, K3, K1, "same", dtype=HALF),
]

CONVOLUTIONS = [
    # What stands beside the layers above: the way down, the first layer, the blocks, the classes.
    Case("down_k3s2", (1, 32, 32, 32, 32), 64, K3, K2, "same", transposed=False),
    Case("down_k3s2_few", (1, 32, 32, 32, 16), 32, K3, K2, "same", transposed=False),
    Case("down_k3s2_deep", (1, 16, 16, 16, 128), 256, K3, K2, "same", transposed=False),
    Case("down_k2s2", (1, 64, 64, 64, 16), 32, K2, K2, "valid", transposed=False),
    Case("down_k122", (1, 16, 64, 64, 32), 64, (1, 3, 3), (1, 2, 2), "same", transposed=False),
    Case("critic_k4s2", (4, 32, 32, 32, 32), 64, K4, K2, "same", transposed=False),
    Case("stem_k7s2", (1, 64, 64, 64, 1), 16, (7, 7, 7), K2, "same", transposed=False),
    Case("patches_k4s4", (1, 64, 64, 64, 4), 96, K4, K4, "valid", transposed=False),
    Case("shortcut_k1s2", (1, 32, 32, 32, 32), 64, K1, K2, "valid", transposed=False),
    Case("down_k3s2_groups4", (1, 32, 32, 32, 32), 64, K3, K2, "same", groups=4, transposed=False),
    Case("down_k3s2_first", (1, 32, 32, 32, 32), 64, K3, K2, "same", data_format=FIRST, transposed=False),
    Case("down_k3s2_bf16", (1, 32, 32, 32, 32), 64, K3, K2, "same", dtype=HALF, transposed=False),
    Case("block_k3s1", (1, 32, 32, 32, 32), 32, K3, K1, "same", transposed=False),
    Case("block_k3s1_wide", (1, 64, 64, 64, 16), 16, K3, K1, "same", transposed=False),
    Case("block_k3s1_deep", (1, 16, 16, 16, 128), 128, K3, K1, "same", transposed=False),
    Case("block_k3s1_d2", (1, 32, 32, 32, 32), 32, K3, K1, "same", dilation=2, transposed=False),
    Case("block_k3s1_depthwise", (1, 32, 32, 32, 32), 32, K3, K1, "same", groups=32, transposed=False),
    Case("block_k3s1_bf16", (1, 32, 32, 32, 32), 32, K3, K1, "same", dtype=HALF, transposed=False),
    Case("enter_k3s1", (1, 64, 64, 64, 1), 16, K3, K1, "same", transposed=False),
    Case("leave_k1s1", (1, 64, 64, 64, 16), 4, K1, K1, "valid", transposed=False),
]
"""Ordinary convolutions, of U-Nets, V-Nets, critics and patch encoders."""


def _ways(case: Case, *ways: str) -> list[Case]:
    """A case at each of some ways to multiply: bf16, tf32 (float32 where TF32 is allowed) or f32 (where it is not)."""
    kinds: dict[str, dict[str, Any]] = {"bf16": {"dtype": HALF}, "tf32": {}, "f32": {"precision": "highest"}}
    return [dataclasses.replace(case, name=f"{case.name}_{way}", **kinds[way]) for way in ways]


BF16, TF32, F32 = "bf16", "tf32", "f32"

GPU_CASES = [
    # The cases above, scaled until they fill a large GPU; the most asked for first.
    *_ways(Case("jax31662", (8, 64, 64, 64, 64), 1, K3, K2, "same"), BF16, TF32, F32),
    *_ways(Case("unet_k2s2", (2, 64, 64, 64, 64), 32, K2, K2, "valid"), BF16, TF32, F32),
    *_ways(Case("k3s2_same", (2, 64, 64, 64, 32), 32, K3, K2, "same"), BF16, TF32, F32),
    *_ways(Case("gan_k4s2", (4, 32, 32, 32, 256), 128, K4, K2, "same"), BF16, TF32),
    *_ways(Case("vnet_k2s2_deep", (4, 32, 32, 32, 256), 128, K2, K2, "valid"), BF16, TF32),
    *_ways(Case("k3s1_same", (2, 96, 96, 96, 32), 32, K3, K1, "same"), BF16, TF32),
    *_ways(Case("aniso_k122", (4, 32, 64, 64, 64), 32, (1, 2, 2), (1, 2, 2), "valid"), BF16),
    *_ways(Case("gan_k4s2_last", (8, 64, 64, 64, 64), 1, K4, K2, "same"), BF16),
    *_ways(Case("k5s3_valid", (4, 32, 32, 32, 32), 32, K5, K3, "valid"), BF16),
    *_ways(Case("k4s4_patch", (4, 32, 32, 32, 128), 16, K4, K4, "valid"), BF16),
    *_ways(Case("k3s2_channels_first", (2, 64, 64, 64, 32), 32, K3, K2, "same", data_format=FIRST), BF16),
    *_ways(Case("k3s2_groups4", (2, 64, 64, 64, 32), 32, K3, K2, "same", groups=4), BF16),
    *_ways(Case("k3s2_wide", (8, 64, 64, 64, 8), 8, K3, K2, "same"), BF16),
    *_ways(Case("head_k3s1", (4, 128, 128, 128, 16), 3, K3, K1, "same"), BF16),
    *_ways(Case("k3s1_d2", (2, 96, 96, 96, 32), 32, K3, K1, "same", dilation=2), BF16),
    *_ways(Case("k4s2_depthwise", (2, 64, 64, 64, 32), 32, K4, K2, "same", groups=32), BF16),
    *_ways(Case("gan_k4s2", (4, 32, 32, 32, 256), 128, K4, K2, "same"), F32),
]
"""For ``--platform gpu``: batches of 2 to 8, volumes of 64 to 128 outputs a side."""

EVERY_LOWERING = ("jax31662_bf16", "jax31662_f32", "unet_k2s2_bf16")
"""Where XLA's lowerings and `jax.lax.conv_transpose` are timed too: for each XLA tries many kernels, some a
second long."""
