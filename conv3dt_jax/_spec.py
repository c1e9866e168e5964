"""The specifications of a transposed convolution and of a convolution: every static hyper-parameter, checked once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from conv3dt_jax import _arguments as args
from conv3dt_jax._convolution_spec import IMPLEMENTATIONS as IMPLEMENTATIONS
from conv3dt_jax._convolution_spec import ConvolutionSpec
from conv3dt_jax._geometry import (
    AXIS_NAMES,
    Axis,
    reachable_sizes,
    resolve_adjoint_axis,
    resolve_axis,
    resolve_axis_to_size,
)


@dataclasses.dataclass(frozen=True)
class Conv3DSpec(ConvolutionSpec):
    """Every static hyper-parameter of a 3-D convolution; frozen, hashable, validated on construction.

    As `Conv3DTransposeSpec`, whose arguments these are, but for ``output_padding``, which has no meaning here, and what
    follows. `init`, `apply` and `explain` take either.

    Args:
      filters: number of output channels F.
      kernel_size: taps per axis (kd, kh, kw).
      strides: input steps per output element.
      padding: "valid", "same" or "circular" (any case), or what is added at the ends of each axis: an int, 3 ints or
        3 pairs.
      dilation_rate: input steps between two taps; this and all that follow by name alone.
      groups: see `Conv3DTransposeSpec`, as for the rest.
      data_format: see there.
      use_bias: see there.
      precision: see there.
      preferred_element_type: see there.
      implementation: see there.

    Raises:
      TypeError, ValueError: as `Conv3DTransposeSpec` does.

    Example:
      >>> import conv3dt_jax as c3t
      >>> spec = c3t.Conv3DSpec(filters=8, kernel_size=3, strides=2, padding="SAME")
      >>> spec.output_shape((1, 4, 5, 6, 3))
      (1, 2, 3, 3, 8)
      >>> spec.kernel_shape(3)
      (3, 3, 3, 3, 8)
    """

    padded: ClassVar[str] = "added"
    kernel_layout: ClassVar[str] = "in_channels // groups, filters"
    channels_from: ClassVar[str] = "kernel.shape[3] * groups"
    filters_from: ClassVar[str] = "kernel.shape[4]"

    def kernel_shape(self, in_channels: int) -> tuple[int, int, int, int, int]:
        """``(kd, kh, kw, in_channels // groups, filters)``."""
        return (*self.kernel_size, self._checked_channels(in_channels) // self.groups, self.filters)

    def partial_kernel_shape(self) -> tuple[int | None, ...]:
        """``(kd, kh, kw, None, filters)``."""
        return (*self.kernel_size, None, self.filters)

    def channels_of(self, kernel_shape: Sequence[int]) -> int:
        """``kernel_shape[3] * groups``."""
        return kernel_shape[3] * self.groups

    def length(self, axis: Axis) -> Any:
        """The output's length along an axis: a convolution reads it backward."""
        return axis.n

    def _axis(self, index: int, n: Any, size: Any, keras_rules: bool) -> Axis:
        padding = self.padding if isinstance(self.padding, str) else self.padding[index]
        axis = resolve_adjoint_axis(n, self.kernel_size[index], self.strides[index], self.dilation_rate[index], padding)
        if isinstance(axis.n, int) and axis.n < 1 and n >= 1:
            full = f"the kernel covers {axis.ke}"
            raise self._no_output(index, n, "", axis.n, full, "pad more, or use a larger input or a smaller kernel")
        return axis


@dataclasses.dataclass(frozen=True)
class Conv3DTransposeSpec(ConvolutionSpec):
    """Every static hyper-parameter of a transposed 3-D convolution; frozen, hashable, validated on construction.

    Sizes are integers, one for all axes or three for (depth, height, width). They are stored in canonical form
    (triples, lower-case names), so equal operations have equal specs and a spec can be a static argument of `jax.jit`.

    Args:
      filters: number of output channels F.
      kernel_size: taps per axis (kd, kh, kw).
      strides: output steps per input element.
      padding: "valid", "same" or "circular" (any case), or the crop of the full result: an int, 3 ints or 3 pairs.
      output_padding: elements added at the end of each axis, below ``max(strides, dilation_rate)``; None infers the
        output shape from ``strides`` alone.
      dilation_rate: output steps between two taps; this and all that follow by name alone.
      groups: number of blocks that input channels and filters are split into.
      data_format: "channels_last" or "channels_first".
      use_bias: whether `init` makes a bias and `apply` wants one.
      precision: None, "default", "high", "highest", a `jax.lax.Precision`, or a pair of them.
      preferred_element_type: dtype of sums and result; None keeps the dtype of the inputs (at least 32 bits for
        integers) and sums 16-bit floats in float32.
      implementation: "auto" or the name of a lowering: "dilated", "matmul", "phases", "winograd", "pallas".

    Raises:
      TypeError: an argument of the wrong type (a float, a boolean or None for a size).
      ValueError: a value out of range, an unknown name, ``output_padding`` not below ``max(strides, dilation_rate)``,
        or ``filters`` not divisible by ``groups``.

    Example:
      >>> import conv3dt_jax as c3t
      >>> spec = c3t.Conv3DTransposeSpec(filters=8, kernel_size=3, strides=2, padding="SAME")
      >>> spec.strides, spec.padding
      ((2, 2, 2), 'same')
      >>> spec.output_shape((1, 4, 5, 6, 3))
      (1, 8, 10, 12, 8)
    """

    output_padding: Any = None

    padded: ClassVar[str] = "cropped"
    kernel_layout: ClassVar[str] = "filters // groups, in_channels"
    channels_from: ClassVar[str] = "its last axis"
    filters_from: ClassVar[str] = "kernel.shape[3] * groups"

    def __post_init__(self) -> None:
        given_output_padding = self.output_padding
        if self.output_padding is not None:
            self._set("output_padding", args.triple("output_padding", self.output_padding, minimum=0))
        super().__post_init__()
        self._check_output_padding(given_output_padding)

    def _check_output_padding(self, given: Any) -> None:
        if self.output_padding is None:
            return
        if self.padding == "circular":
            raise ValueError(
                f"{args.received('output_padding', given)} has no meaning with `padding='circular'`: "
                "the output is input size * stride long and wraps around; leave output_padding=None."
            )
        for name, extra, s, d in zip(AXIS_NAMES, self.output_padding, self.strides, self.dilation_rate, strict=True):
            if extra >= max(s, d):
                raise ValueError(
                    f"{args.received('output_padding', given)} must be below the larger of "
                    f"`strides={self.strides}` and `dilation_rate={self.dilation_rate}` on every axis; "
                    f"reduce {name} from {extra} to at most {max(s, d) - 1}."
                )

    def check_keras_rules(self) -> None:
        """Raises what Keras refuses beyond the function: stride with dilation, output_padding >= stride."""
        super().check_keras_rules()
        for name, extra, s in zip(AXIS_NAMES, self.output_padding or (0, 0, 0), self.strides, strict=True):
            if extra >= s:
                raise ValueError(
                    f"`output_padding={self.output_padding}` must be below `strides={self.strides}` on every axis; "
                    f"reduce {name} from {extra} to at most {s - 1}, or raise its stride."
                )

    def without_output_padding(self) -> Conv3DTransposeSpec:
        """The same operation, its size to be set by an ``output_size`` at the call."""
        return dataclasses.replace(self, output_padding=None)

    def kernel_shape(self, in_channels: int) -> tuple[int, int, int, int, int]:
        """``(kd, kh, kw, filters // groups, in_channels)``."""
        channels = self._checked_channels(in_channels)
        return (*self.kernel_size, self.filters // self.groups, channels)

    def partial_kernel_shape(self) -> tuple[int | None, ...]:
        """``(kd, kh, kw, filters // groups, None)``."""
        return (*self.kernel_size, self.filters // self.groups, None)

    def channels_of(self, kernel_shape: Sequence[int]) -> int:
        """``kernel_shape[4]``."""
        return kernel_shape[4]

    def length(self, axis: Axis) -> Any:
        """The output's length along an axis."""
        return axis.out

    def _output_sizes(self, output_size: Any) -> tuple[Any, ...]:
        if self.output_padding is not None:
            raise ValueError(
                f"{args.received('output_size', output_size)} and `output_padding={self.output_padding}` both set the "
                "output's size; give one of them."
            )
        if not args.is_sequence(output_size) or len(output_size) != 3:
            raise ValueError(
                f"{args.received('output_size', output_size)} must be 3 integers: the wanted (depth, height, width)."
            )
        return tuple(args.dimension("output_size", size, whole=output_size) for size in output_size)

    def _axis(self, index: int, n: Any, size: Any, keras_rules: bool) -> Axis:
        k, s, d = self.kernel_size[index], self.strides[index], self.dilation_rate[index]
        padding = self.padding if isinstance(self.padding, str) else self.padding[index]
        if size is not None:
            low, high = reachable_sizes(n, k, s, d, padding, s if keras_rules else max(s, d))
            if size < low or size > high:
                raise ValueError(
                    f"`output_size` asks for {AXIS_NAMES[index]} {size}, but an input of {n} with kernel {k}, "
                    f"stride {s}, dilation {d} and padding {padding!r} reaches "
                    + (f"only {low}." if low == high else f"{low} to {high}.")
                )
            return resolve_axis_to_size(n, k, s, d, padding, size)
        axis = resolve_axis(n, k, s, d, padding, None if self.output_padding is None else self.output_padding[index])
        if isinstance(axis.out, int) and axis.out < 1 and n >= 1:
            more = f", output_padding {self.output_padding[index] if self.output_padding else 0}"
            full = f"the full result has {axis.full}"
            raise self._no_output(index, n, more, axis.out, full, "crop less or use a larger input")
        return axis
