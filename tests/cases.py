"""The table of argument cases that every lowering is held to. Sizes, kernels and strides differ from axis to axis."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: (N, D, H, W) and channels of the inputs, filters, kernel, and keyword arguments."""

    name: str
    space: tuple[int, int, int] = (3, 4, 2)
    kernel: tuple[int, int, int] = (2, 3, 4)
    channels: int = 3
    filters: int = 2
    batch: int = 2
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def groups(self) -> int:
        return self.kwargs.get("groups", 1)

    def operands(self, dtype: Any = np.float32, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Random inputs, kernel and bias."""
        rng = np.random.default_rng(seed)
        shapes = (
            (self.batch, *self.space, self.channels),
            (*self.kernel, self.filters // self.groups, self.channels),
            (self.filters,),
        )
        return tuple(_random(rng, shape, np.dtype(dtype)) for shape in shapes)


def _random(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    if np.issubdtype(dtype, np.integer):
        info = np.iinfo(dtype)
        return rng.integers(max(info.min, -100), min(info.max, 100), shape).astype(dtype)
    values = rng.normal(size=shape)
    if np.issubdtype(dtype, np.complexfloating):
        values = values + 1j * rng.normal(size=shape)
    return values.astype(dtype)


def _case(name: str, /, **arguments: Any) -> Case:
    own = {field.name for field in dataclasses.fields(Case)}
    kwargs = {key: arguments.pop(key) for key in list(arguments) if key not in own}
    return Case(name, **arguments, kwargs=kwargs)


CASES = [
    _case("defaults"),
    _case("stride_equals_kernel", strides=(2, 3, 4)),
    _case("stride_above_kernel", strides=(3, 5, 6)),
    _case("stride_below_kernel", strides=(1, 2, 3)),
    _case("plane", space=(1, 4, 3), kernel=(1, 3, 4), strides=(1, 2, 3), padding="same"),
    _case("line", space=(5, 1, 1), kernel=(4, 1, 1), strides=(2, 1, 1)),
    _case("same_odd", kernel=(3, 5, 3), strides=2, padding="same"),
    _case("same_even", kernel=(4, 2, 6), strides=(2, 1, 3), padding="SAME"),
    _case("same_stride_above_kernel", kernel=(2, 1, 3), strides=(3, 2, 4), padding="same"),
    _case("valid_output_padding", strides=(2, 3, 2), output_padding=(1, 2, 0)),
    _case("same_output_padding", kernel=(3, 4, 5), strides=(2, 3, 2), padding="same", output_padding=(1, 2, 0)),
    _case("same_output_padding_zero_even", kernel=(2, 2, 2), strides=2, padding="same", output_padding=0),
    _case("explicit", strides=2, padding=1),
    _case("explicit_per_axis", kernel=(3, 3, 4), strides=(2, 1, 3), padding=(0, 1, 2)),
    _case("explicit_pairs", strides=2, padding=((1, 0), (0, 3), (2, 1)), output_padding=(0, 1, 1)),
    _case("explicit_beyond_kernel", kernel=(2, 3, 2), strides=(3, 2, 2), padding=((5, 0), (0, 5), (1, 3)), space=(4, 5, 4)),
    _case("explicit_past_full", kernel=(1, 1, 1), strides=(3, 3, 3), padding=((4, 0), 0, 0), output_padding=(2, 0, 1), space=(2, 2, 2)),
    _case("dilation", dilation_rate=(2, 1, 3)),
    _case("dilation_same", kernel=(3, 2, 3), dilation_rate=(2, 3, 1), padding="same"),
    _case("dilation_with_stride", strides=(2, 3, 2), dilation_rate=(3, 2, 2)),
    _case("dilation_with_stride_same", kernel=(3, 2, 4), strides=(2, 2, 4), dilation_rate=(2, 3, 3), padding="same"),
    _case("dilation_output_padding", kernel=(2, 2, 2), dilation_rate=3, output_padding=2),
    _case("circular", kernel=(3, 4, 5), strides=(1, 2, 3), padding="circular"),
    _case("circular_wraps_often", kernel=(7, 5, 3), space=(2, 1, 1), strides=(1, 2, 1), dilation_rate=(2, 1, 3), padding="Circular"),
    _case("circular_stride_above_kernel", kernel=(1, 2, 2), strides=(2, 3, 2), padding="circular"),
    _case("groups", channels=6, filters=4, groups=2, kernel=(3, 2, 2), strides=(2, 2, 1), padding="same"),
    _case("depthwise", channels=3, filters=3, groups=3, kernel=(3, 3, 2), strides=2),
    _case("depthwise_multiplier", channels=2, filters=6, groups=2, strides=2, padding="same"),
    _case("one_channel_one_filter", channels=1, filters=1, strides=2),
    _case("kernel_of_one", kernel=(1, 1, 1)),
    _case("one_voxel", space=(1, 1, 1), kernel=(3, 3, 3), strides=2, padding="same"),
    _case("crash_of_the_compiler", space=(3, 3, 1), kernel=(2, 4, 1), strides=(2, 2, 1), padding="same", output_padding=0),
    _case("large_stride", kernel=(7, 7, 7), strides=16, space=(1, 2, 1)),
    _case("large_kernel", kernel=(7, 6, 5), strides=(2, 1, 2), filters=4),
    _case("large_kernel_few_filters_same", kernel=(6, 7, 6), strides=(1, 2, 1), padding="same"),
    _case("large_kernel_dilation", kernel=(4, 5, 4), strides=(2, 1, 1), dilation_rate=(3, 1, 2), filters=5),
    _case("large_kernel_circular", kernel=(5, 7, 4), strides=(2, 3, 1), padding="circular", filters=3),
    _case("large_kernel_groups", kernel=(5, 5, 5), channels=4, filters=8, groups=2, padding="same"),
    _case("large_kernel_in_height_and_width", kernel=(2, 12, 11), filters=3, space=(2, 3, 2)),
    _case("large_kernel_in_width", kernel=(1, 2, 130), filters=3, space=(2, 3, 4)),
    _case("large_kernel_in_width_with_stride", kernel=(2, 1, 260), filters=3, space=(2, 3, 4), strides=(2, 1, 2)),
]  # fmt: skip
