"""The specification of a transposed convolution: every static hyper-parameter, checked once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from conv3dt_jax import _arguments as args
from conv3dt_jax._geometry import AXIS_NAMES, Axis, Geometry, reachable_sizes, resolve_axis, resolve_axis_to_size

IMPLEMENTATIONS = ("auto", "dilated", "matmul", "phases", "winograd")


@dataclasses.dataclass(frozen=True)
class Conv3DTransposeSpec:
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
      dilation_rate: output steps between two taps.
      groups: number of blocks that input channels and filters are split into.
      data_format: "channels_last" or "channels_first".
      use_bias: whether `init` makes a bias and `apply` wants one.
      precision: None, "default", "high", "highest", a `jax.lax.Precision`, or a pair of them.
      preferred_element_type: dtype of sums and result; None keeps the dtype of the inputs (at least 32 bits for
        integers) and sums 16-bit floats in float32.
      implementation: "auto" or the name of a lowering: "dilated", "matmul", "phases", "winograd".

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

    filters: int
    kernel_size: Any
    strides: Any = 1
    padding: Any = "valid"
    output_padding: Any = None
    dilation_rate: Any = 1
    groups: int = 1
    data_format: str = "channels_last"
    use_bias: bool = True
    precision: Any = None
    preferred_element_type: Any = None
    implementation: str = "auto"

    def __post_init__(self) -> None:
        given_output_padding = self.output_padding
        if self.output_padding is not None:
            self._set("output_padding", args.triple("output_padding", self.output_padding, minimum=0))
        self._set("filters", args.integer("filters", self.filters, minimum=1))
        self._set("kernel_size", args.triple("kernel_size", self.kernel_size, minimum=1))
        self._set("strides", args.triple("strides", self.strides, minimum=1))
        self._set("padding", args.padding_value(self.padding))
        self._set("dilation_rate", args.triple("dilation_rate", self.dilation_rate, minimum=1))
        self._set("groups", args.integer("groups", self.groups, minimum=1))
        self._set("data_format", args.choice("data_format", self.data_format, args.DATA_FORMATS))
        self._set("use_bias", args.boolean("use_bias", self.use_bias))
        self._set("precision", args.precision_value(self.precision))
        self._set("preferred_element_type", args.dtype_value("preferred_element_type", self.preferred_element_type))
        self._set("implementation", args.choice("implementation", self.implementation, IMPLEMENTATIONS))
        self._check_output_padding(given_output_padding)
        if self.filters % self.groups:
            raise ValueError(
                f"`filters={self.filters}` must be divisible by `groups={self.groups}`; "
                f"the nearest are {_nearest_multiples(self.filters, self.groups)}."
            )

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

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
        if max(self.strides) > 1 and max(self.dilation_rate) > 1:
            raise ValueError(
                f"`strides={self.strides}` and `dilation_rate={self.dilation_rate}` cannot both be above 1 in the "
                "layer; set one of them to 1, or call conv3d_transpose, which takes both."
            )
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
        in_channels = args.integer("in_channels", in_channels, minimum=1)
        if in_channels % self.groups:
            raise ValueError(
                f"the inputs have {in_channels} channels, which `groups={self.groups}` does not divide; "
                f"the nearest numbers that do are {_nearest_multiples(in_channels, self.groups)}."
            )
        return (*self.kernel_size, self.filters // self.groups, in_channels)

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
            raise ValueError(
                f"`padding={self.padding!r}` leaves no output along {AXIS_NAMES[index]}: an input of {n} with kernel "
                f"{k}, stride {s}, dilation {d}, output_padding "
                f"{self.output_padding[index] if self.output_padding else 0} gives {axis.out} elements "
                f"(the full result has {axis.full}); crop less or use a larger input."
            )
        return axis

    def output_shape(self, input_shape: Sequence[Any], output_size: Any = None) -> tuple[Any, ...]:
        """The output's shape for inputs of ``input_shape``, without computing anything."""
        batch, spatial, _ = self.split_shape(args.shape("input_shape", input_shape))
        geometry = self.geometry(spatial, output_size)
        return self.join_shape(batch, [axis.out for axis in geometry], self.filters)

    def partial_output_shape(self, input_shape: Sequence[Any]) -> tuple[Any, ...]:
        """The output's shape where None stands for sizes that are not known."""
        if not args.is_sequence(input_shape):
            raise TypeError(f"{args.received('input_shape', input_shape)} must be a shape: integers or None.")
        given = (None if n is None else args.dimension("input_shape", n, whole=input_shape) for n in input_shape)
        batch, spatial, channels = self.split_shape(tuple(given))
        if channels is not None:
            self.kernel_shape(channels)
        out = [None if n is None else self._axis(i, n, None, keras_rules=True).out for i, n in enumerate(spatial)]
        return self.join_shape(batch, out, self.filters)


def _nearest_multiples(value: int, divisor: int) -> str:
    below = value // divisor * divisor
    return f"{below} and {below + divisor}" if below else str(divisor)
