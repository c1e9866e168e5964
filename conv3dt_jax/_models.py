"""The layers of a model: `find_layers`, for Linen and NNX."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeAlias

import flax.linen as nn
import jax

from conv3dt_jax import _layer
from conv3dt_jax.linen import Conv3D, Conv3DTranspose, Layer

Path: TypeAlias = tuple[Any, ...]


def find_layers(model: Any, *inputs: Any, **options: Any) -> dict[Path, Any]:
    """The `Conv3DTranspose` and `Conv3D` layers of a Linen or NNX model, by their paths among its parameters.

    `regularization_loss` and `constrain` take the dict. Nothing is computed: the call of a Linen model is traced with
    abstract values, and an NNX model holds its layers.

    Args:
      model: the model.
      inputs: what a Linen model is called with; `jax.ShapeDtypeStruct` may stand for arrays. None for NNX.
      options: keyword arguments of the call, likewise; also ``method`` (as `flax.linen.Module.init` takes it).

    Returns:
      ``{("decoder", "up_0"): Conv3DTranspose(...), ...}``; the path of a model that is a layer itself is ``()``.
      Of what an NNX model has taken over from Linen by `flax.nnx.bridge`, only single layers are among them, not those
      within a larger module; a Linen model's layers for NNX neither.

    Example:
      >>> import jax.numpy as jnp, flax.linen as nn, conv3dt_jax as c3t
      >>> model = nn.Sequential([nn.Conv(4, (3, 3, 3)), c3t.Conv3DTranspose(2, 2, strides=2)])
      >>> [*find_layers(model, jnp.ones((1, 4, 4, 4, 1)))]
      [('layers_1',)]
      >>> from flax import nnx
      >>> [*find_layers(nnx.Sequential(nnx.relu, c3t.nnx.Conv3DTranspose(1, 2, 2, rngs=nnx.Rngs(0))))]
      [('layers', 1)]
    """
    if is_nnx(model):
        if inputs or options:
            raise TypeError("find_layers takes an NNX model alone: it holds its layers, and is not called.")
        return _in_nnx(model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a flax.linen.Module or a flax.nnx.Module, not {type(model).__name__}.")
    return _in_linen(model, inputs, options)


def is_nnx(model: Any) -> bool:
    """Whether something is a module of Flax NNX; Flax NNX is not loaded for that."""
    return "flax.nnx" in sys.modules and isinstance(model, sys.modules["flax.nnx"].Module)


def is_layer(candidate: Any) -> bool:
    """Whether something is one of our layers."""
    if is_nnx(candidate):
        return () in _in_nnx(candidate)
    return isinstance(candidate, Layer)


def names_in(model: Any) -> set[Any]:
    """What the states of an NNX model can hold at their top."""
    from flax import nnx

    return set(nnx.state(model))


def _in_nnx(model: Any) -> dict[Path, Any]:
    from flax import nnx

    from conv3dt_jax import _nnx as ours

    found: dict[Path, Any] = {}
    for path, module in nnx.iter_modules(model):
        layer = module.to_nnx__module if isinstance(module, nnx.bridge.ToNNX) else module
        if isinstance(layer, ours.Layer | Layer):
            found[tuple(path)] = layer
    return found


def _in_linen(model: nn.Module, inputs: Any, options: Any) -> dict[Path, Layer]:
    found: dict[Path, Layer] = {}

    def note(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if isinstance(context.module, Layer) and context.method_name == "__call__":
            layer = context.module
            fields = {name: getattr(layer, name) for name in layer.kind.arguments}
            plain = Conv3DTranspose if layer.kind is _layer.TRANSPOSED else Conv3D
            found[layer.path] = plain(**fields, name=layer.name, parent=None)
        return call(*args, **kwargs)

    flat, tree = jax.tree.flatten((inputs, options))
    traced = [i for i, leaf in enumerate(flat) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")]

    def init(key: jax.Array, *arrays: Any) -> Any:
        leaves = list(flat)
        for i, array in zip(traced, arrays, strict=True):
            leaves[i] = array
        given, keywords = jax.tree.unflatten(tree, leaves)
        return model.init({"params": key, "dropout": key}, *given, **keywords)

    with nn.intercept_methods(note):
        jax.eval_shape(init, jax.random.key(0), *(flat[i] for i in traced))
    return found
