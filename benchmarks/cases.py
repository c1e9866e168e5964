"""The benchmark's cases: shapes of real networks, NDHWC."""

from __future__ import annotations

import dataclasses

Triple = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Case:
    """A call: inputs ``(N, D, H, W, C)``, filters, and the sizes of the convolution."""

    name: str
    inputs: tuple[int, int, int, int, int]
    filters: int
    kernel: Triple
    strides: Triple
    padding: str


CASES = [
    Case("unet_k2s2", (1, 32, 32, 32, 64), 32, (2, 2, 2), (2, 2, 2), "valid"),
    Case("vnet_k2s2_deep", (1, 8, 8, 8, 256), 128, (2, 2, 2), (2, 2, 2), "valid"),
    Case("aniso_k122", (1, 16, 32, 32, 64), 32, (1, 2, 2), (1, 2, 2), "valid"),
    Case("k3s2_same", (1, 32, 32, 32, 32), 32, (3, 3, 3), (2, 2, 2), "same"),
    Case("gan_k4s2", (1, 8, 8, 8, 256), 128, (4, 4, 4), (2, 2, 2), "same"),
    Case("k3s2_to_one", (1, 64, 64, 32, 64), 1, (3, 3, 3), (2, 2, 2), "same"),
    Case("k5s3_valid", (1, 16, 16, 16, 32), 32, (5, 5, 5), (3, 3, 3), "valid"),
    Case("k3s1_same", (1, 32, 32, 32, 32), 32, (3, 3, 3), (1, 1, 1), "same"),
]
