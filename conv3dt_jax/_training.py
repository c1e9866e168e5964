"""Penalties and constraints of a model's layers, from its parameters: `regularization_loss` and `constrain`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from flax.core import meta

from conv3dt_jax import _layer

Path: TypeAlias = tuple[str, ...]
Projection: TypeAlias = tuple[_layer.LayerConfig, Callable[[jax.Array], jax.Array] | None]
RANKS = {"kernel": 5, "bias": 1}


def regularization_loss(variables: Mapping[str, Any], layers: Any = None) -> jax.Array:
    """The sum of a model's regularization losses: what the layers' ``losses`` add up to in Keras.

    Args:
      variables: parameters (of a layer, or of a model: nested dicts), or a dict of collections with "params", "losses"
        or both. The losses of the collection "losses", where activity regularizers leave theirs, are added.
      layers: whose regularizers are meant: a `Conv3DTranspose`, or layers by their paths among the parameters, as
        `find_layers` gives them (a path is a tuple of names, or the names joined by "/"). Layers with
        ``trainable=False`` have no penalty on their parameters. None where there are no parameters, "losses" alone.

    Returns:
      A scalar, at least float32 wide.

    Raises:
      ValueError: a path that the parameters do not have; parameters given, but no layers.

    Take the collection "losses" fresh from each call: one that goes back into ``apply`` grows. A model that scans or
    maps its layers says so of "losses" too (``variable_axes={"params": 0, "losses": 0}``), or its losses stay inside.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import conv3dt_jax as c3t
      >>> layer = c3t.Conv3DTranspose(2, 1, kernel_initializer="ones", kernel_regularizer="l2",
      ...     activity_regularizer="l1")
      >>> variables = layer.init(jax.random.key(0), jnp.ones((4, 1, 1, 1, 3)))
      >>> outputs, state = layer.apply(variables, jnp.ones((4, 1, 1, 1, 3)), mutable=["losses"])
      >>> c3t.regularization_loss(variables, layer).round(4)  # 0.01 * 6
      Array(0.06, dtype=float32)
      >>> c3t.regularization_loss({**variables, **state}, layer).round(4)  # and 0.01 * 3 * 2 for each sample
      Array(0.12, dtype=float32)
    """
    if not isinstance(variables, Mapping):
        raise TypeError(f"`variables` must be a dict of parameters or of collections, not {type(variables).__name__}.")
    collections = bool({"params", "losses"} & set(variables))
    params = variables.get("params") if collections else variables
    if params is not None and layers is None:
        raise ValueError(
            "regularization_loss needs the layers: pass a layer, or what find_layers(model, inputs) gives."
        )
    total = jnp.zeros((), jnp.float32)
    for loss in jax.tree.leaves(variables.get("losses", {})) if collections else []:
        total = _sum(total, loss)
    if params is None:
        return total
    for path, layer in _by_path(layers).items():
        config = _layer.configure(layer)
        for name in ("kernel", "bias") if config.trainable else ():
            regularizer = getattr(config, f"{name}_regularizer")
            if regularizer is not None and (name != "bias" or config.spec.use_bias):
                value = meta.unbox(_at(params, (*path, name)))
                _check_shape((*path, name), config, value)
                penalty = functools.partial(_layer.penalty, f"{name}_regularizer", regularizer)
                total = _sum(total, _stacked(penalty, value, name)(value))
    return total


def _sum(total: jax.Array, loss: Any) -> jax.Array:
    loss = jnp.asarray(loss)
    wide = jnp.promote_types(total.dtype, loss.dtype)
    return total.astype(wide) + loss.astype(wide).sum()


def _check_shape(path: Path, config: _layer.LayerConfig, value: Any) -> None:
    """The parameter must be that of the layer, or a stack of such along leading axes."""
    spec, shape = config.spec, jnp.shape(value)
    wanted = (*spec.kernel_size, spec.filters // spec.groups) if path[-1] == "kernel" else (spec.filters,)
    end = len(shape) - (path[-1] == "kernel")
    if shape[max(end - len(wanted), 0) : end] != wanted:
        raise ValueError(
            f"the parameter {'/'.join(path)} has shape {shape}, but the layer's is {wanted}"
            + (" with the channels last" if path[-1] == "kernel" else "")
            + "; layers that are stacked must be so along the first axis (variable_axes={'params': 0})."
        )


def _stacked(function: Callable[[jax.Array], jax.Array], value: jax.Array, name: str) -> Callable[..., jax.Array]:
    """The function for one layer's parameter, also where `flax.linen.vmap` or `scan` stacks those of many."""
    for _ in range(value.ndim - RANKS[name]):
        function = jax.vmap(function)
    return function


def constrain(optimizer: optax.GradientTransformation, layers: Any) -> optax.GradientTransformationExtraArgs:
    """An optimizer after whose updates the parameters satisfy the layers' constraints, as in Keras.

    Where a layer has a constraint, the update becomes ``constraint(parameter + update) - parameter``, so that
    `optax.apply_updates` leaves what Keras's optimizers leave. Parameters of layers with ``trainable=False`` stay as
    they are: their updates are zero, weight decay included.

    Args:
      optimizer: any `optax` transformation, complete: it is the last to see the updates. Put gradient accumulation or
        masks inside of it.
      layers: a `Conv3DTranspose`, or layers by their paths among the parameters, as `find_layers` gives them.

    Returns:
      An `optax.GradientTransformationExtraArgs`, whose ``update`` needs the parameters, and whose state is that of
      ``optimizer``.

    Raises:
      ValueError: in ``update``, where no parameters are given, a path is not among them, or a constraint returns
        another shape.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import conv3dt_jax as c3t
      >>> layer = c3t.Conv3DTranspose(2, 2, kernel_constraint="non_neg")
      >>> params = layer.init(jax.random.key(0), jnp.ones((1, 3, 3, 3, 4)))["params"]
      >>> optimizer = c3t.constrain(optax.sgd(1.0), layer)
      >>> updates, state = optimizer.update(params, optimizer.init(params), params)
      >>> bool((optax.apply_updates(params, updates)["kernel"] >= 0).all())
      True
    """
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(f"`optimizer` must be an optax transformation, not {type(optimizer).__name__}.")
    inner = optax.with_extra_args_support(optimizer)
    projections = _projections(_by_path(layers))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("constrain needs the parameters: optimizer.update(gradients, state, params).")
        updates, state = inner.update(updates, state, params, **extra)
        prefix = ("params",) if isinstance(params, Mapping) and "params" in params else ()
        for path, projection in projections.items():
            parameter, step = _at(params, (*prefix, *path)), _at(updates, (*prefix, *path))
            if not isinstance(step, optax.MaskedNode) and step is not None:
                updates = _replaced(updates, (*prefix, *path), _constrained(path, projection, parameter, step))
        return updates, state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _projections(layers: Mapping[Path, Any]) -> dict[Path, Projection]:
    """By the path of a parameter, its layer's config and its constraint; None for what is not trained."""
    found: dict[Path, Projection] = {}
    for path, layer in layers.items():
        config = _layer.configure(layer)
        for name in ("kernel", "bias") if config.spec.use_bias else ("kernel",):
            constraint = getattr(config, f"{name}_constraint")
            if constraint is not None or not config.trainable:
                found[(*path, name)] = (config, constraint if config.trainable else None)
    return found


def _constrained(path: Path, projection: Projection, parameter: Any, step: Any) -> Any:
    """The update that takes a parameter to the projection of where ``step`` would take it."""
    (config, project), old, move = projection, meta.unbox(parameter), meta.unbox(step)
    _check_shape(path, config, old)
    if project is None:
        new_move = jnp.zeros_like(move)
    else:
        moved = (old + move).astype(old.dtype)  # as optax.apply_updates has it
        new = jnp.asarray(_stacked(project, moved, path[-1])(moved))
        if new.shape != old.shape:
            raise ValueError(
                f"the constraint of {'/'.join(path)} made {new.shape} of {old.shape}; the shape must stay."
            )
        wide = jnp.promote_types(move.dtype, jnp.float32)
        new_move = new.astype(wide) - old.astype(wide)
    return meta.replace_boxed(step, new_move)


def _by_path(layers: Any) -> dict[Path, Any]:
    """The layers by path: of one layer alone, of `find_layers`, or with paths written "a/b"."""
    if not isinstance(layers, Mapping):
        layers = {(): layers}
    found = {}
    for path, layer in layers.items():
        if not hasattr(layer, "kernel_constraint"):
            raise TypeError(
                f"`layers` must be a Conv3DTranspose, or a dict of them by path, not {type(layer).__name__}; for a "
                "model use find_layers(model, inputs)."
            )
        found[tuple(path.split("/")) if isinstance(path, str) else tuple(path)] = layer
    return found


def _at(tree: Any, path: Path) -> Any:
    """What a tree of dicts holds at a path; an `optax.MaskedNode` on the way ends it."""
    for depth, name in enumerate(path):
        if isinstance(tree, optax.MaskedNode) or tree is None:
            return tree
        if not isinstance(tree, Mapping) or name not in tree:
            found = sorted(tree) if isinstance(tree, Mapping) else type(tree).__name__
            raise ValueError(
                f"the parameters have no {'/'.join(path)!r}: {'/'.join(path[:depth]) or 'the top'} holds {found}."
            )
        tree = tree[name]
    return tree


def _replaced(tree: Any, path: Path, value: Any) -> Any:
    """The tree with another value at a path; what is given stays as it is."""
    if not path:
        return value
    changed = {**tree, path[0]: _replaced(tree[path[0]], path[1:], value)}
    return changed if type(tree) is dict else type(tree)(changed)
