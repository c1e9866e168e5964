"""Activations by their Keras 3 names, with the meaning that Keras 3 gives them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from conv3dt_jax import _arguments as args
from conv3dt_jax import _identifiers

Activation = Callable[[jax.Array], jax.Array]


def relu(
    x: jax.Array, negative_slope: float = 0.0, max_value: float | None = None, threshold: float = 0.0
) -> jax.Array:
    """``x`` above ``threshold`` up to ``max_value``, ``negative_slope * (x - threshold)`` below it."""
    if threshold == 0.0 and max_value is None:
        return jax.nn.leaky_relu(x, negative_slope) if negative_slope else jax.nn.relu(x)
    below = negative_slope * (x - threshold)
    above = x if max_value is None else jnp.minimum(x, max_value)
    return jnp.where(x > threshold, above, below).astype(x.dtype)


def leaky_relu(x: jax.Array, negative_slope: float = 0.2) -> jax.Array:
    return jax.nn.leaky_relu(x, negative_slope)


def gelu(x: jax.Array, approximate: bool = False) -> jax.Array:
    return jax.nn.gelu(x, approximate=approximate)


def tanh_shrink(x: jax.Array) -> jax.Array:
    return x - jnp.tanh(x)


def soft_shrink(x: jax.Array, threshold: float = 0.5) -> jax.Array:
    return jnp.where(x > threshold, x - threshold, jnp.where(x < -threshold, x + threshold, 0)).astype(x.dtype)


def hard_shrink(x: jax.Array, threshold: float = 0.5) -> jax.Array:
    return jnp.where(jnp.abs(x) > threshold, x, 0).astype(x.dtype)


def threshold(x: jax.Array, threshold: float, default_value: float) -> jax.Array:
    return jnp.where(x > threshold, x, default_value).astype(x.dtype)


def glu(x: jax.Array, axis: int = -1) -> jax.Array:
    if x.shape[axis] % 2:
        raise ValueError(f"`activation='glu'` halves axis {axis}, which must be even; the output has shape {x.shape}.")
    return jax.nn.glu(x, axis=axis)


def sparsemax(x: jax.Array, axis: int = -1) -> jax.Array:
    """Keras 3's function of this name, number for number.

    It is not the projection onto the simplex of Martins and Astudillo (2016): its threshold adds up the cumulative sums
    over the support, where theirs takes the last one, and the two differ from a support of two on.
    """
    moved = jnp.moveaxis(x, axis, -1)
    ordered = jnp.flip(jnp.sort(moved, -1), -1)
    sums = jnp.cumsum(ordered, -1)
    rank = jnp.arange(1, x.shape[axis] + 1, dtype=x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
    support = ordered - (sums - 1) / rank > 0
    threshold = (jnp.where(support, sums, 0).sum(-1, keepdims=True) - 1) / support.sum(-1, keepdims=True, dtype=x.dtype)
    return jnp.moveaxis(jnp.maximum(moved - threshold, 0), -1, axis)


def linear(x: jax.Array) -> jax.Array:
    return x


FUNCTIONS: dict[str, Callable[..., jax.Array]] = {
    "celu": jax.nn.celu,
    "elu": jax.nn.elu,
    "exponential": jnp.exp,
    "gelu": gelu,
    "glu": glu,
    "hard_shrink": hard_shrink,
    "hard_sigmoid": jax.nn.hard_sigmoid,
    "hard_silu": jax.nn.hard_silu,
    "hard_swish": jax.nn.hard_silu,
    "hard_tanh": jax.nn.hard_tanh,
    "leaky_relu": leaky_relu,
    "linear": linear,
    "log_sigmoid": jax.nn.log_sigmoid,
    "log_softmax": jax.nn.log_softmax,
    "mish": jax.nn.mish,
    "relu": relu,
    "relu6": jax.nn.relu6,
    "selu": jax.nn.selu,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "soft_shrink": soft_shrink,
    "softmax": jax.nn.softmax,
    "softplus": jax.nn.softplus,
    "softsign": jax.nn.soft_sign,
    "sparse_plus": jax.nn.sparse_plus,
    "sparse_sigmoid": jax.nn.sparse_sigmoid,
    "sparsemax": sparsemax,
    "squareplus": jax.nn.squareplus,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
    "tanh_shrink": tanh_shrink,
    "threshold": threshold,
}

# Functions that are Keras's, by the names to write for them; JAX's own count where they mean the same.
NAMED = [*FUNCTIONS.items(), ("relu", jax.nn.relu), ("softsign", jax.nn.soft_sign)]

# Keras's activation layers, which configs may name: layer -> (function, {config key: our argument}).
_LAYERS: dict[str, tuple[Callable[..., jax.Array], dict[str, str]]] = {
    "ReLU": (relu, {"max_value": "max_value", "negative_slope": "negative_slope", "threshold": "threshold"}),
    "LeakyReLU": (leaky_relu, {"negative_slope": "negative_slope", "alpha": "negative_slope"}),
    "ELU": (jax.nn.elu, {"alpha": "alpha"}),
    "Softmax": (jax.nn.softmax, {"axis": "axis"}),
}
_LAYER_DEFAULTS: dict[str, dict[str, Any]] = {"LeakyReLU": {"negative_slope": 0.3}}


def get(argument: str, identifier: Any) -> Activation:
    """The activation that a Keras user means: a name, a config dict, a callable, or None for the identity.

    Raises:
      ValueError: an unknown name or config.
      TypeError: neither a name, a dict nor a callable.
    """
    if identifier is None:
        return linear
    if isinstance(identifier, str | Mapping):
        name, config = _identifiers.parse(argument, identifier)
        if name in _LAYERS:
            return _from_layer(argument, name, config)
        if name not in FUNCTIONS:
            raise _identifiers.unknown_name(argument, name, FUNCTIONS)
        if name == "threshold" and not {"threshold", "default_value"} <= set(config):
            raise ValueError(
                f"`{argument}='threshold'` needs a threshold and a default_value; pass a callable, or the config dict "
                "{'class_name': 'threshold', 'config': {'threshold': ..., 'default_value': ...}}."
            )
        return _configured(argument, name, FUNCTIONS[name], config) if config else FUNCTIONS[name]
    if callable(identifier) and not isinstance(identifier, type):
        return identifier
    raise TypeError(
        f"`{argument}={identifier!r}` must be a Keras name, a config dict, a callable of one array, or None, "
        f"not {type(identifier).__name__}."
    )


def kept(identifier: Any) -> Any:
    """An identifier as a layer keeps it: hashable; functions that are Keras's by their names."""
    for name, function in NAMED:
        if function is identifier:
            return name
    if isinstance(identifier, Mapping):
        name, config = _identifiers.parse("activation", identifier)
        if name in _LAYERS:  # Keras reads it so
            return args.hashable(
                {"module": "keras.layers", "class_name": name, "config": config, "registered_name": None}
            )
        return args.hashable(identifier) if config else name
    module = str(getattr(identifier, "__module__", "")).split(".")[0]
    name = getattr(identifier, "__name__", "")
    return name if module == "keras" and name in FUNCTIONS else args.hashable(identifier)


def _configured(argument: str, name: str, function: Callable[..., jax.Array], config: Mapping[str, Any]) -> Activation:
    """The function with its options; one that it does not take is refused here, not at the first call."""
    configured = functools.partial(function, **config)
    try:
        jax.eval_shape(configured, jax.ShapeDtypeStruct((2, 2, 2, 2, 2), jnp.float32))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`{argument}`: the config {dict(config)!r} does not fit {name!r}: {str(error).splitlines()[0]}"
        ) from None
    return configured


def _from_layer(argument: str, name: str, config: Mapping[str, Any]) -> Activation:
    function, keys = _LAYERS[name]
    unknown = set(config) - set(keys) - {"name", "dtype", "trainable"}
    if unknown:
        raise ValueError(f"`{argument}`: the config of {name} has unknown keys {sorted(unknown)}.")
    given = {keys[key]: value for key, value in config.items() if key in keys}
    return _configured(argument, name, function, {**_LAYER_DEFAULTS.get(name, {}), **given})
