"""Initializers by their Keras 3 names, drawing from the distributions that Keras 3 draws from.

An initializer here is what JAX calls one: ``(key, shape, dtype) -> array``. Fans are computed as Keras does for the
kernel ``(kd, kh, kw, F // G, C)``: fan_in = F // G times the window, fan_out = C times the window.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from conv3dt_jax import _arguments as args
from conv3dt_jax import _identifiers
from conv3dt_jax._arguments import received

Initializer = Callable[[jax.Array, Sequence[int], DTypeLike], jax.Array]

# The standard deviation of a standard normal cut at two: what a truncated draw is divided by.
_TRUNCATED_STDDEV = 0.87962566103423978


def _zeros() -> Initializer:
    return lambda key, shape, dtype: jnp.zeros(shape, dtype)


def _ones() -> Initializer:
    return lambda key, shape, dtype: jnp.ones(shape, dtype)


def _constant(value: float = 0.0) -> Initializer:
    if not np.issubdtype(np.asarray(value).dtype, np.number):
        raise ValueError(f"{received('value', value)} must be a number, or numbers that fill the parameter.")
    return lambda key, shape, dtype: jnp.broadcast_to(jnp.asarray(value, dtype), shape)


def _random_normal(mean: float = 0.0, stddev: float = 0.05) -> Initializer:
    mean, stddev = args.number("mean", mean), args.number("stddev", stddev, minimum=0.0)
    return lambda key, shape, dtype: jax.random.normal(key, shape, dtype) * stddev + mean


def _truncated_normal(mean: float = 0.0, stddev: float = 0.05) -> Initializer:
    mean, stddev = args.number("mean", mean), args.number("stddev", stddev, minimum=0.0)
    return lambda key, shape, dtype: jax.random.truncated_normal(key, -2.0, 2.0, shape, dtype) * stddev + mean


def _random_uniform(minval: float = -0.05, maxval: float = 0.05) -> Initializer:
    minval, maxval = args.number("minval", minval), args.number("maxval", maxval)
    if minval > maxval:
        raise ValueError(f"`minval={minval}` must not be above `maxval={maxval}`.")
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, minval, maxval)


def _orthogonal(gain: float = 1.0) -> Initializer:
    return jax.nn.initializers.orthogonal(scale=args.number("gain", gain))


def _variance_scaling(
    scale: float = 1.0,
    mode: str = "fan_in",
    distribution: str = "truncated_normal",
    input_axes: Sequence[int] | None = None,
    output_axes: Sequence[int] | None = None,
) -> Initializer:
    distribution = {"normal": "truncated_normal"}.get(str(distribution).lower(), str(distribution).lower())
    if args.number("scale", scale) <= 0:
        raise ValueError(f"`scale={scale}` of a variance-scaling initializer must be positive.")
    if mode not in ("fan_in", "fan_out", "fan_avg"):
        raise ValueError(f"`mode={mode!r}` of a variance-scaling initializer must be 'fan_in', 'fan_out' or 'fan_avg'.")
    if distribution not in ("uniform", "truncated_normal", "untruncated_normal"):
        raise ValueError(
            f"`distribution={distribution!r}` of a variance-scaling initializer must be 'uniform', 'truncated_normal' "
            "or 'untruncated_normal'."
        )

    def initialize(key: jax.Array, shape: Sequence[int], dtype: DTypeLike) -> jax.Array:
        fan_in, fan_out = _fans(shape, input_axes, output_axes)
        fan = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}[mode]
        variance = scale / max(1.0, fan)
        if jnp.issubdtype(dtype, jnp.complexfloating):  # half of the variance in each part
            part, scaled = (
                jnp.finfo(dtype).dtype,
                _variance_scaling(scale / 2, mode, distribution, input_axes, output_axes),
            )
            real, imaginary = jax.random.split(key)
            return jax.lax.complex(scaled(real, shape, part), scaled(imaginary, shape, part))
        if distribution == "uniform":
            limit = math.sqrt(3 * variance)
            return _random_uniform(-limit, limit)(key, shape, dtype)
        if distribution == "truncated_normal":
            return _truncated_normal(0.0, math.sqrt(variance) / _TRUNCATED_STDDEV)(key, shape, dtype)
        return _random_normal(0.0, math.sqrt(variance))(key, shape, dtype)

    return initialize


def _fans(shape: Sequence[int], input_axes: Sequence[int] | None, output_axes: Sequence[int] | None) -> tuple[int, int]:
    if input_axes is not None and output_axes is not None:
        return math.prod(shape[axis] for axis in input_axes), math.prod(shape[axis] for axis in output_axes)
    if len(shape) == 1:
        return shape[0], shape[0]
    window = math.prod(shape[:-2])
    return shape[-2] * window, shape[-1] * window


def _scaled(scale: float, mode: str, distribution: str) -> Callable[..., Initializer]:
    def make(input_axes: Sequence[int] | None = None, output_axes: Sequence[int] | None = None) -> Initializer:
        return _variance_scaling(scale, mode, distribution, input_axes, output_axes)

    return make


MAKERS: dict[str, Callable[..., Initializer]] = {
    "constant": _constant,
    "glorot_normal": _scaled(1.0, "fan_avg", "truncated_normal"),
    "glorot_uniform": _scaled(1.0, "fan_avg", "uniform"),
    "he_normal": _scaled(2.0, "fan_in", "truncated_normal"),
    "he_uniform": _scaled(2.0, "fan_in", "uniform"),
    "lecun_normal": _scaled(1.0, "fan_in", "truncated_normal"),
    "lecun_uniform": _scaled(1.0, "fan_in", "uniform"),
    "ones": _ones,
    "orthogonal": _orthogonal,
    "random_normal": _random_normal,
    "random_uniform": _random_uniform,
    "truncated_normal": _truncated_normal,
    "variance_scaling": _variance_scaling,
    "zeros": _zeros,
}
_ALIASES = {
    "normal": "random_normal",
    "one": "ones",
    "orthogonal_initializer": "orthogonal",
    "uniform": "random_uniform",
    "zero": "zeros",
}
# Keras takes these names for any layer and fails when it builds a convolution with them.
_NOT_FOR_KERNELS = {"identity", "identity_initializer", "stft", "stft_initializer", "stftinitializer"}


def get(argument: str, identifier: Any, also: Collection[str] = ()) -> Initializer:
    """The initializer that a Keras or a JAX user means.

    Args:
      argument: the argument's name, for messages.
      identifier: a Keras name ("glorot_uniform", "GlorotUniform"), a Keras config dict, a Keras initializer object, or
        a callable ``(key, shape, dtype)`` as in `jax.nn.initializers` (or ``(shape, dtype)`` as Keras takes them).
      also: names that the caller knows besides, for the message.

    Raises:
      ValueError: an unknown name, or a config that does not fit.
      TypeError: none of the above.
    """
    if isinstance(identifier, type) and hasattr(identifier, "get_config"):
        identifier = identifier()  # Keras takes the class for an object with its defaults
    if isinstance(identifier, str | Mapping):
        return _from_name(argument, *_identifiers.parse(argument, identifier), also)
    if callable(identifier) and not isinstance(identifier, type):
        if hasattr(identifier, "get_config") and _canonical(type(identifier).__name__) in MAKERS:
            return _from_name(argument, type(identifier).__name__, identifier.get_config(), also)
        return _adapt(identifier)
    raise TypeError(
        f"{received(argument, identifier)} must be a Keras name, a config dict or a callable (key, shape, dtype), "
        f"not {type(identifier).__name__}."
    )


def _canonical(name: str) -> str:
    snake = _identifiers.snake_case(name)
    return _ALIASES.get(snake, snake)


def _from_name(argument: str, name: str, config: dict[str, Any], also: Collection[str]) -> Initializer:
    known = _canonical(name)
    if known in _NOT_FOR_KERNELS:
        raise ValueError(f"`{argument}={name!r}` makes no convolution parameters; choose another initializer.")
    if known not in MAKERS:
        raise _identifiers.unknown_name(argument, name, {*MAKERS, *also})
    config = dict(config)
    seed = config.pop("seed", None)
    if isinstance(seed, Mapping):  # a seed generator of Keras 3: its first draw is that of the seed
        inner = seed.get("config")
        seed = inner.get("seed", seed) if isinstance(inner, Mapping) else seed
    config.pop("dtype", None)  # written by TensorFlow 2's Keras; the dtype is the layer's to say
    initializer = _identifiers.call_with(argument, name, MAKERS[known], config)
    return initializer if seed is None else _seeded(argument, initializer, seed)


def _seeded(argument: str, initializer: Initializer, seed: Any) -> Initializer:
    """Always draws with ``seed``, and the values that Keras on JAX draws with it."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
        raise ValueError(f"`{argument}`: the seed {seed!r} must be an integer from 0 to 2**32 - 1.")

    def initialize(key: jax.Array, shape: Sequence[int], dtype: DTypeLike) -> jax.Array:
        del key
        fixed = jax.random.wrap_key_data(jnp.array([seed, 0], jnp.uint32), impl="threefry2x32")
        return initializer(fixed, shape, dtype)

    return initialize


def _adapt(function: Callable[..., Any]) -> Initializer:
    """A callable as an `Initializer`; one whose first parameter is ``shape`` is of Keras's kind and takes no key."""
    try:
        parameters = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a builtin without a signature
        return function
    if parameters[:1] == ["shape"]:
        return lambda key, shape, dtype: jnp.asarray(function(shape, dtype=jnp.dtype(dtype).name), dtype)
    return function
