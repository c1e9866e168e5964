"""Initializers made for transposed convolutions: `Trilinear` and `ICNR`; and those of Keras, by name.

A layer takes them as objects, as the names "trilinear" and "icnr", or as config dicts, and tells them its strides and
groups. Called on their own, as ``(key, shape, dtype)``, they need the strides given.

>>> import jax
>>> from conv3dt_jax import initializers
>>> kernel = initializers.Trilinear(strides=2)(jax.random.key(0), (4, 4, 4, 1, 1), "float32")
>>> kernel[:, 1, 1, 0, 0] / kernel[1, 1, 1, 0, 0]
Array([0.33333334, 1.        , 1.        , 0.33333334], dtype=float32)

`KERNEL_AXES` and `BIAS_AXES` are default names for the axes of the parameters, for sharding annotations: "filters" and
"channels", logical names that rules map to the axes of a mesh; `CONV3D_KERNEL_AXES` is for the kernel of `Conv3D`. They
go around an initializer (`nn.with_partitioning`, `nn.with_logical_partitioning`, `nnx.with_partitioning`), in NNX also
into ``kernel_metadata={"out_sharding": ...}``:

>>> import flax.linen as nn
>>> from conv3dt_jax import Conv3DTranspose
>>> he_normal = nn.with_logical_partitioning(initializers.get("kernel_initializer", "he_normal"),
...     initializers.KERNEL_AXES)
>>> inputs = jax.numpy.ones((4, 4, 4, 3))
>>> variables = Conv3DTranspose(8, 2, kernel_initializer=he_normal).init(jax.random.key(0), inputs)
>>> tuple(nn.get_partition_spec(variables)["params"]["kernel"])
(None, None, None, 'filters', 'channels')
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from conv3dt_jax import _arguments as args
from conv3dt_jax import _identifiers, _initializers

__all__ = ["BIAS_AXES", "CONV3D_KERNEL_AXES", "ICNR", "KERNEL_AXES", "Trilinear", "get"]

# The kernel (kd, kh, kw, F // G, C) and the bias (F,); the kernel (kd, kh, kw, C // G, F) of an ordinary convolution.
# With groups, "filters", or "channels" there, are those of one group.
KERNEL_AXES = (None, None, None, "filters", "channels")
CONV3D_KERNEL_AXES = (None, None, None, "channels", "filters")
BIAS_AXES = ("filters",)


@dataclasses.dataclass(frozen=True)
class Trilinear:
    """A kernel that upsamples by linear interpolation along each axis, every channel on its own.

    Along an axis, with kernel k and stride s, ``w[t] = max(0, 1 - |t - (k - 1) / 2| / s)``: a triangle whose copies,
    s apart, add up to one. Filter f of a group reads channel f of that group and no other. Where ``k - s`` is even and
    the padding is "same", the result is that of ``jax.image.resize(..., "linear")`` away from the borders (outside of
    the volume there are zeros); where it is odd, it lies half an output step further on.

    Attributes:
      strides: those of the layer; None takes them from the layer that the initializer is given to.
      groups: likewise; None alone means 1.

    Raises:
      ValueError: in use, where filters and channels differ in number, or the kernel is too small for the triangle: it
        takes ``2 * s - 1`` taps, ``2 * s`` where their number is even.

    References:
      Long, Shelhamer and Darrell, Fully convolutional networks for semantic segmentation, CVPR 2015, section 3.3.

    Example:
      >>> import conv3dt_jax as c3t, jax.numpy as jnp
      >>> layer = c3t.Conv3DTranspose(2, 4, strides=2, padding="same", kernel_initializer="trilinear")
      >>> ramp = jnp.broadcast_to(jnp.arange(4.0)[:, None], (1, 4, 4, 4, 2))
      >>> layer.init_with_output(jax.random.key(0), ramp)[0][0, 3, 3, 2:6, 0]
      Array([0.75, 1.25, 1.75, 2.25], dtype=float32)
    """

    strides: int | Sequence[int] | None = None
    groups: int | None = None

    def __post_init__(self) -> None:
        _canonical(self)

    def __call__(self, key: jax.Array, shape: Sequence[int], dtype: DTypeLike) -> jax.Array:
        del key
        strides, groups = _strides(self, shape), self.groups or 1
        window, filters, channels = shape[:3], shape[3], shape[4]
        if channels != filters * groups:
            raise ValueError(
                f"the trilinear initializer keeps channels apart, so there must be as many filters as channels: "
                f"{filters * groups} filters, {channels} channels."
            )
        lines = [_triangle(k, s) for k, s in zip(window, strides, strict=True)]
        kernel = np.einsum("i,j,k->ijk", *lines)
        pairs = np.arange(filters)[:, None] == np.arange(channels)[None] % filters
        return jnp.asarray(kernel[..., None, None] * pairs, dtype)


def _triangle(k: int, s: int) -> np.ndarray:
    smallest = 2 * s - 1 if k % 2 else 2 * s
    if s > 1 and k < smallest:
        raise ValueError(
            f"a kernel of {k} is too small to interpolate at stride {s}; it takes {2 * s - 1} or {2 * s} taps."
        )
    return np.maximum(0, 1 - np.abs(np.arange(k) - (k - 1) / 2) / s)


@dataclasses.dataclass(frozen=True)
class ICNR:
    """A kernel that starts without checkerboard artefacts, drawn by any other initializer.

    A transposed convolution is as many ordinary ones as a stride has phases, side by side; drawn apart, their outputs
    differ even where the input is constant: the checkerboard. Here the phases start equal. Where the kernel is a
    multiple of the stride, ``inner`` draws a kernel of ``k // s`` taps and each tap is repeated s times: the layer is
    that convolution followed by nearest-neighbour upsampling, as in Aitken et al. Elsewhere ``inner`` draws ``k - s +
    1`` taps, which are summed over windows of s: the layer is nearest-neighbour upsampling followed by that
    convolution, as in Odena et al. Either way every phase has the same sum of taps;
    the values are as large as ``inner`` draws them for the smaller kernel.

    Attributes:
      inner: what draws: a Keras name, a config dict, or a callable ``(key, shape, dtype)``.
      strides: those of the layer; None takes them from the layer that the initializer is given to.

    Raises:
      ValueError: in use, where the kernel is smaller than the stride, which leaves phases without a tap.

    References:
      Aitken et al., Checkerboard artifact free sub-pixel convolution, arXiv:1707.02937.
      Odena, Dumoulin and Olah, Deconvolution and checkerboard artifacts, Distill 2016.

    Example:
      >>> kernel = ICNR("he_normal", strides=2)(jax.random.key(0), (4, 4, 4, 8, 8), "float32")
      >>> bool((kernel[0::2] == kernel[1::2]).all())
      True
    """

    inner: Any = "glorot_uniform"
    strides: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        _canonical(self)
        get("ICNR.inner", self.inner)

    def __call__(self, key: jax.Array, shape: Sequence[int], dtype: DTypeLike) -> jax.Array:
        strides = _strides(self, shape)
        for name, k, s in zip(("depth", "height", "width"), shape, strides, strict=False):
            if k < s:
                raise ValueError(
                    f"ICNR needs a kernel of at least the stride: along {name} it is {k} for a stride of {s}, so that "
                    "some outputs have no tap; use a larger kernel or another initializer."
                )
        drawn = [k // s if k % s == 0 else k - s + 1 for k, s in zip(shape[:3], strides, strict=True)]
        kernel = get("ICNR.inner", self.inner)(key, (*drawn, *shape[3:]), dtype)
        for axis, (k, s) in enumerate(zip(shape[:3], strides, strict=True)):
            kernel = jnp.repeat(kernel, s, axis) if k % s == 0 else _window_sums(kernel, axis, s)
        return kernel


def _window_sums(kernel: jax.Array, axis: int, s: int) -> jax.Array:
    """The full convolution with s ones along an axis."""
    widths = [[(r, s - 1 - r) if a == axis else (0, 0) for a in range(kernel.ndim)] for r in range(s)]
    return jnp.stack([jnp.pad(kernel, width) for width in widths]).sum(0)


def _canonical(initializer: Trilinear | ICNR) -> None:
    """Sizes as triples, and lists and dicts frozen: a layer that holds this must be hashable."""
    name = type(initializer).__name__
    if initializer.strides is not None:
        object.__setattr__(initializer, "strides", args.triple(f"{name}.strides", initializer.strides, minimum=1))
    if isinstance(initializer, Trilinear):
        if initializer.groups is not None:
            groups = args.integer(f"{name}.groups", initializer.groups, minimum=1)
            object.__setattr__(initializer, "groups", groups)
    else:
        object.__setattr__(initializer, "inner", kept(initializer.inner))


def _strides(initializer: Trilinear | ICNR, shape: Sequence[int]) -> args.Triple:
    name = type(initializer).__name__
    if len(shape) != 5:
        raise ValueError(f"{name} makes kernels (kd, kh, kw, filters // groups, channels), not {tuple(shape)}.")
    if initializer.strides is None:
        raise ValueError(f"{name} on its own needs the strides of the layer: {name}(strides=2).")
    return args.triple(f"{name}.strides", initializer.strides, minimum=1)


CLASSES: dict[str, type] = {"icnr": ICNR, "trilinear": Trilinear}


def kept(identifier: Any) -> Any:
    """An identifier as a layer keeps it: hashable, picklable, equal to its like; Keras's objects as their configs."""
    if isinstance(identifier, type) and identifier in CLASSES.values():
        return identifier()
    value = _identifiers.as_config(identifier)
    if isinstance(value, Mapping) and str(value.get("class_name")).lower() in CLASSES:
        return get("kernel_initializer", value)
    return args.hashable(value)


def get(
    argument: str, identifier: Any, strides: Sequence[int] | None = None, groups: int | None = None
) -> _initializers.Initializer:
    """The initializer that a name, a config dict, an object or a callable stands for.

    Args:
      argument: the argument's name, for messages.
      identifier: a Keras name ("glorot_uniform", "GlorotUniform"), "trilinear" or "icnr", a config dict, an object of
        Keras's, or a callable ``(key, shape, dtype)`` as in `jax.nn.initializers` (or ``(shape, dtype)`` as in Keras).
      strides: those of the layer, for `Trilinear` and `ICNR`; None where there is no layer.
      groups: likewise.

    Raises:
      ValueError: an unknown name, or a config that does not fit.
      TypeError: none of the above.

    Example:
      >>> get("kernel_initializer", "icnr", strides=(2, 2, 2))
      ICNR(inner='glorot_uniform', strides=(2, 2, 2))
    """
    own = identifier
    if isinstance(identifier, str | Mapping):
        name, config = _identifiers.parse(argument, identifier)
        if name.lower() not in CLASSES:
            return _initializers.get(argument, identifier, also=CLASSES)
        own = _identifiers.call_with(argument, name, CLASSES[name.lower()], config)
    elif isinstance(identifier, type) and identifier in CLASSES.values():
        own = identifier()
    if not isinstance(own, Trilinear | ICNR):
        return _initializers.get(argument, identifier)
    if own.strides is None and strides is not None:
        own = dataclasses.replace(own, strides=tuple(strides))
    if isinstance(own, Trilinear) and own.groups is None and groups is not None:
        own = dataclasses.replace(own, groups=groups)
    return own
