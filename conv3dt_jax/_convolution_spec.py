"""What the specifications of both operations share: their hyper-parameters, checked once, and shapes."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from conv3dt_jax import _arguments as args
from conv3dt_jax._geometry import AXIS_NAMES, Axis, Geometry

IMPLEMENTATIONS = ("auto", "dilated", "matmul", "phases", "winograd", "pallas")


@dataclasses.dataclass(frozen=True)
class ConvolutionSpec(abc.ABC):
    """Every static hyper-parameter that a 3-D convolution has, transposed or not; see `Conv3DTransposeSpec`."""

    filters: int
    kernel_size: Any
    strides: Any = 1
    padding: Any = "valid"
    _: dataclasses.KW_ONLY
    dilation_rate: Any = 1
    groups: int = 1
    data_format: str = "channels_last"
    use_bias: bool = True
    precision: Any = None
    preferred_element_type: Any = None
    implementation: str = "auto"

    # For messages: what explicit padding does, where the kernel's shape has the channels and the filters.
    padded: ClassVar[str]
    kernel_layout: ClassVar[str]
    channels_from: ClassVar[str]
    filters_from: ClassVar[str]

    def __post_init__(self) -> None:
        self._set("filters", args.integer("filters", self.filters, minimum=1))
        self._set("kernel_size", args.triple("kernel_size", self.kernel_size, minimum=1))
        self._set("strides", args.triple("strides", self.strides, minimum=1))
        self._set("padding", args.padding_value(self.padding, self.padded))
        self._set("dilation_rate", args.triple("dilation_rate", self.dilation_rate, minimum=1))
        self._set("groups", args.integer("groups", self.groups, minimum=1))
        self._set("data_format", args.choice("data_format", self.data_format, args.DATA_FORMATS))
        self._set("use_bias", args.boolean("use_bias", self.use_bias))
        self._set("precision", args.precision_value(self.precision))
        self._set("preferred_element_type", args.dtype_value("preferred_element_type", self.preferred_element_type))
        self._set("implementation", args.choice("implementation", self.implementation, IMPLEMENTATIONS))
        if self.filters % self.groups:
            raise ValueError(
                f"`filters={self.filters}` must be divisible by `groups={self.groups}`; "
                f"the nearest are {_nearest_multiples(self.filters, self.groups)}."
            )

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def check_keras_rules(self) -> None:
        """Raises what Keras refuses beyond the function: stride with dilation."""
        if max(self.strides) > 1 and max(self.dilation_rate) > 1:
            raise ValueError(
                f"`strides={self.strides}` and `dilation_rate={self.dilation_rate}` cannot both be above 1 in the "
                "layer; set one of them to 1, or call the function, which takes both."
            )

    def without_output_padding(self) -> ConvolutionSpec:
        """The same operation, its size to be set by an ``output_size`` at the call."""
        return self

    @abc.abstractmethod
    def kernel_shape(self, in_channels: int) -> tuple[int, int, int, int, int]:
        """The kernel's shape for inputs of ``in_channels``."""

    @abc.abstractmethod
    def partial_kernel_shape(self) -> tuple[int | None, ...]:
        """The kernel's shape with None for what the channels of the inputs decide."""

    @abc.abstractmethod
    def channels_of(self, kernel_shape: Sequence[int]) -> int:
        """The input channels that a kernel of this shape is for."""

    @abc.abstractmethod
    def length(self, axis: Axis) -> Any:
        """The output's length along an axis."""

    @abc.abstractmethod
    def _axis(self, index: int, n: Any, size: Any, keras_rules: bool) -> Axis:
        """One axis for an input of ``n``, or a ValueError that says why it leaves no output."""

    def _checked_channels(self, in_channels: Any) -> int:
        in_channels = args.integer("in_channels", in_channels, minimum=1)
        if in_channels % self.groups:
            raise ValueError(
                f"the inputs have {in_channels} channels, which `groups={self.groups}` does not divide; "
                f"the nearest numbers that do are {_nearest_multiples(in_channels, self.groups)}."
            )
        return in_channels

    def split_shape(self, input_shape: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, Any, Any], Any]:
        """``(batch dimensions, (depth, height, width), channels)`` of an input shape."""
        shape = tuple(input_shape)
        layout = "(depth, height, width, channels)"
        if self.data_format == "channels_first":
            layout = "(channels, depth, height, width)"
        if len(shape) < 4:
            raise ValueError(
                f"the inputs have rank {len(shape)} (shape {shape}); they must be {layout} behind any number of batch "
                f"dimensions, usually one: rank 5, with `data_format={self.data_format!r}`."
            )
        if self.data_format == "channels_first":
            return shape[:-4], shape[-3:], shape[-4]
        return shape[:-4], shape[-4:-1], shape[-1]

    def join_shape(self, batch: Sequence[Any], spatial: Sequence[Any], channels: Any) -> tuple[Any, ...]:
        """The inverse of `split_shape`."""
        if self.data_format == "channels_first":
            return (*batch, channels, *spatial)
        return (*batch, *spatial, channels)

    def geometry(self, spatial: Sequence[Any], output_size: Any = None, *, keras_rules: bool = False) -> Geometry:
        """The three axes for an input of ``spatial`` sizes, or a ValueError that says which leaves no output.

        ``keras_rules`` narrows what ``output_size`` may ask for to output paddings below the stride.
        """
        sizes = (None,) * 3 if output_size is None else self._output_sizes(output_size)
        depth, height, width = (self._axis(i, n, sizes[i], keras_rules) for i, n in enumerate(spatial))
        return depth, height, width

    def _output_sizes(self, output_size: Any) -> tuple[Any, ...]:
        raise ValueError(
            f"{args.received('output_size', output_size)} is for transposed convolutions: what a convolution makes of "
            "its inputs has one size; leave it out."
        )

    def _no_output(self, index: int, n: Any, more: str, made: Any, full: str, remedy: str) -> ValueError:
        return ValueError(
            f"`padding={self.padding!r}` leaves no output along {AXIS_NAMES[index]}: an input of {n} with kernel "
            f"{self.kernel_size[index]}, stride {self.strides[index]}, dilation {self.dilation_rate[index]}{more} "
            f"gives {made} elements ({full}); {remedy}."
        )

    def output_shape(self, input_shape: Sequence[Any], output_size: Any = None) -> tuple[Any, ...]:
        """The output's shape for inputs of ``input_shape``, without computing anything."""
        batch, spatial, _ = self.split_shape(args.shape("input_shape", input_shape))
        return self.join_shape(batch, self.space(self.geometry(spatial, output_size)), self.filters)

    def space(self, geometry: Geometry) -> tuple[Any, ...]:
        """The output's spatial sizes."""
        return tuple(map(self.length, geometry))

    def partial_output_shape(self, input_shape: Sequence[Any]) -> tuple[Any, ...]:
        """The output's shape where None stands for sizes that are not known."""
        if not args.is_sequence(input_shape):
            raise TypeError(f"{args.received('input_shape', input_shape)} must be a shape: integers or None.")
        given = (None if n is None else args.dimension("input_shape", n, whole=input_shape) for n in input_shape)
        batch, spatial, channels = self.split_shape(tuple(given))
        if channels is not None:
            self.kernel_shape(channels)
        out = [
            None if n is None else self.length(self._axis(i, n, None, keras_rules=True)) for i, n in enumerate(spatial)
        ]
        return self.join_shape(batch, out, self.filters)


def check_spec(spec: Any) -> None:
    if not isinstance(spec, ConvolutionSpec):
        raise TypeError(f"`spec` must be a Conv3DTransposeSpec or a Conv3DSpec, not {type(spec).__name__}.")


def _nearest_multiples(value: int, divisor: int) -> str:
    below = value // divisor * divisor
    return f"{below} and {below + divisor}" if below else str(divisor)
