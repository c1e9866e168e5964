"""Penalties and constraints of a model's layers: `regularization_loss` and `constrain`, for Linen and NNX."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from flax.core import meta

from conv3dt_jax import _layer, _models
from conv3dt_jax._models import Path

Projection: TypeAlias = tuple[_layer.LayerConfig, Callable[[jax.Array], jax.Array] | None]
RANKS = {"kernel": 5, "bias": 1}


def regularization_loss(variables: Any, layers: Any = None, *, losses: Any = None) -> jax.Array:
    """The sum of a model's regularization losses: what the layers' ``losses`` add up to in Keras.

    Args:
      variables: an NNX model, or the parameters of a Linen layer or model (nested dicts), or a dict of collections with
        "params", "losses" or both. The losses of the collection "losses", where activity regularizers leave theirs,
        are added; those of an NNX model are what the latest call of each layer left in it.
      layers: whose regularizers are meant: one of our layers, or layers by their paths among the parameters, as
        `find_layers` gives them (a path is a tuple of names, or the names joined by "/"). Layers with
        ``trainable=False`` have no penalty on their parameters. None where there are no parameters, "losses" alone, and
        for an NNX model, which holds its layers.
      losses: what `flax.nnx.capture` collected of `conv3dt_jax.nnx.RegularizationLoss` (or a collection "losses"), in
        place of what ``variables`` hold of them: the losses of every call where layers are called more than once.

    Returns:
      A scalar, at least float32 wide.

    Raises:
      ValueError: a path that the parameters do not have; parameters given, but no layers; a loss of an NNX model that
        was left outside of the transformation that asks for it.

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

      In NNX:

      >>> from flax import nnx
      >>> layer = c3t.nnx.Conv3DTranspose(3, 2, 1, kernel_initializer="ones", kernel_regularizer="l2",
      ...     activity_regularizer="l1", rngs=nnx.Rngs(0))
      >>> outputs = layer(jnp.ones((4, 1, 1, 1, 3)))
      >>> c3t.regularization_loss(layer).round(4)
      Array(0.12, dtype=float32)
    """
    if _models.is_nnx(variables):
        return _loss_of_nnx(variables, layers, losses)
    if not isinstance(variables, Mapping):
        raise TypeError(
            "`variables` must be an NNX model, or a dict of parameters or of collections, not "
            f"{type(variables).__name__}."
        )
    collections = bool({"params", "losses"} & set(variables)) and not hasattr(variables, "raw_mapping")
    params = variables.get("params") if collections else variables
    if params is not None and layers is None:
        raise ValueError(
            "regularization_loss needs the layers: pass a layer, or what find_layers(model, inputs) gives."
        )
    if losses is None:
        losses = variables.get("losses", {}) if collections else _variables_of_losses(variables)
    if params is None:
        return _total(losses)
    by_path = _by_path(layers)
    parameters = {(*path, name): _at(params, (*path, name)) for path, name in _penalized(by_path)}
    return _total([losses, *_penalties(by_path, parameters)])


def _variables_of_losses(state: Any) -> list[Any]:
    """What a `flax.nnx.State` holds of activity losses."""
    if not hasattr(state, "raw_mapping"):
        return []
    from flax import nnx

    from conv3dt_jax.nnx import RegularizationLoss

    return jax.tree.leaves(nnx.filter_state(state, RegularizationLoss))


def _loss_of_nnx(model: Any, layers: Any, losses: Any) -> jax.Array:
    from flax import nnx

    from conv3dt_jax._nnx import kept_losses

    if layers is not None:
        raise TypeError("`layers` are for Linen; an NNX model holds its layers.")
    found, state = _models.find_layers(model), nnx.state(model)
    paths = [(*path, name) for path, name in _penalized(found)]
    # A parameter that two layers share is in the state once, and penalized once, as in Keras.
    parameters = {path: _at(state, path) for path in paths if _has(state, path)}
    return _total([kept_losses(model) if losses is None else losses, *_penalties(found, parameters)])


def _penalized(layers: Mapping[Path, Any]) -> list[tuple[Path, str]]:
    """The parameters that have a penalty: the paths of their layers, and their names."""
    found = []
    for path, layer in layers.items():
        config = _layer.configure(layer, layer.kind)
        for name in ("kernel", "bias") if config.trainable else ():
            if getattr(config, f"{name}_regularizer") is not None and (name != "bias" or config.spec.use_bias):
                found.append((path, name))
    return found


def _penalties(layers: Mapping[Path, Any], parameters: Mapping[Path, Any]) -> Iterator[jax.Array]:
    """The penalty of each parameter; one for each of the layers where many are stacked."""
    for path, parameter in parameters.items():
        layer, name, value = layers[path[:-1]], str(path[-1]), _value(parameter)
        config = _layer.configure(layer, layer.kind)
        _check_shape(path, config, value)
        penalty = functools.partial(_layer.penalty, f"{name}_regularizer", getattr(config, f"{name}_regularizer"))
        yield _stacked(penalty, value, name)(value)


def _total(losses: Any) -> jax.Array:
    total = jnp.zeros((), jnp.float32)
    for loss in map(jnp.asarray, jax.tree.leaves(losses)):
        wide = jnp.promote_types(total.dtype, loss.dtype)
        total = total.astype(wide) + loss.astype(wide).sum()
    return total


def _value(parameter: Any) -> Any:
    """The array in a box of Linen's or a variable of NNX's."""
    return parameter.get_value() if hasattr(parameter, "get_value") else meta.unbox(parameter)


def _check_shape(path: Path, config: _layer.LayerConfig, value: Any) -> None:
    """The parameter must be that of the layer, or a stack of such along leading axes."""
    spec, shape = config.spec, jnp.shape(value)
    wanted = spec.partial_kernel_shape() if path[-1] == "kernel" else (spec.filters,)
    own = shape[-len(wanted) :]
    if len(own) != len(wanted) or any(b is not None and a != b for a, b in zip(own, wanted, strict=True)):
        shown = str(wanted).replace("None", "channels")
        raise ValueError(
            f"the parameter {_joined(path)} has shape {shape}, but the layer's is {shown}; layers that "
            "are stacked must be so along the first axis (in Linen, variable_axes={'params': 0})."
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
      layers: one of our layers, or layers by their paths among the parameters, as `find_layers` gives them; or an
        NNX model. The optimizer is then one for `flax.nnx.Optimizer`, also where that is for a part of the parameters.

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
    # Of an NNX model the optimizer may hold a part, and shared parameters once.
    names = _models.names_in(layers) if _models.is_nnx(layers) else None

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("constrain needs the parameters: optimizer.update(gradients, state, params).")
        if names is not None and not (isinstance(params, Mapping) and names >= set(params)):
            raise ValueError(
                "the parameters are not those of the model that constrain was given: use flax.nnx.Optimizer(model, "
                f"...), or states of the model, not {type(params).__name__}."
            )
        updates, state = inner.update(updates, state, params, **extra)
        direct = any(_has(params, path) for path in projections)
        inside = not direct and names is None and isinstance(params, Mapping) and "params" in params
        prefix = ("params",) if inside else ()
        for path, projection in projections.items():
            if names is not None and not _has(params, path):
                continue
            parameter, step = _at(params, (*prefix, *path)), _at(updates, (*prefix, *path))
            if not isinstance(step, optax.MaskedNode) and step is not None:
                updates = _replaced(updates, (*prefix, *path), _constrained(path, projection, parameter, step))
        return updates, state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _projections(layers: Mapping[Path, Any]) -> dict[Path, Projection]:
    """By the path of a parameter, its layer's config and its constraint; None for what is not trained."""
    found: dict[Path, Projection] = {}
    for path, layer in layers.items():
        config = _layer.configure(layer, layer.kind)
        for name in ("kernel", "bias") if config.spec.use_bias else ("kernel",):
            constraint = getattr(config, f"{name}_constraint")
            if constraint is not None or not config.trainable:
                found[(*path, name)] = (config, constraint if config.trainable else None)
    return found


def _constrained(path: Path, projection: Projection, parameter: Any, step: Any) -> Any:
    """The update that takes a parameter to the projection of where ``step`` would take it."""
    (config, project), old, move = projection, _value(parameter), _value(step)
    _check_shape(path, config, old)
    if project is None:
        new_move = jnp.zeros_like(move)
    else:
        moved = (old + move).astype(old.dtype)  # as optax.apply_updates has it
        new = jnp.asarray(_stacked(project, moved, str(path[-1]))(moved))
        if new.shape != old.shape:
            raise ValueError(f"the constraint of {_joined(path)} made {new.shape} of {old.shape}; the shape must stay.")
        wide = jnp.promote_types(move.dtype, jnp.float32)
        new_move = new.astype(wide) - old.astype(wide)
    return step.replace(new_move) if hasattr(step, "get_value") else meta.replace_boxed(step, new_move)


def _by_path(layers: Any) -> dict[Path, Any]:
    """The layers by path: of one layer alone, of `find_layers`, or with paths written "a/b"; of an NNX model."""
    if _models.is_nnx(layers):
        return _models.find_layers(layers)
    found = {}
    for path, layer in (layers if isinstance(layers, Mapping) else {(): layers}).items():
        if not _models.is_layer(layer):
            raise TypeError(
                f"`layers` must be one of our layers, or a dict of them by path, not {type(layer).__name__}; for a "
                "model use find_layers(model, inputs)."
            )
        found[tuple(path.split("/")) if isinstance(path, str) else tuple(path)] = layer
    return found


def _has(tree: Any, path: Path) -> bool:
    try:
        _at(tree, path)
    except ValueError:
        return False
    return True


def _at(tree: Any, path: Path) -> Any:
    """What a tree of dicts holds at a path; an `optax.MaskedNode` on the way ends it."""
    for depth, name in enumerate(path):
        if isinstance(tree, optax.MaskedNode) or tree is None:
            return tree
        name = _key(tree, name)
        if not isinstance(tree, Mapping) or name not in tree:
            found = sorted(tree, key=str) if isinstance(tree, Mapping) else type(tree).__name__
            raise ValueError(
                f"the parameters have no {_joined(path)!r}: {_joined(path[:depth]) or 'the top'} holds {found}."
            )
        tree = tree[name]
    return tree


def _replaced(tree: Any, path: Path, value: Any) -> Any:
    """The tree with another value at a path; what is given stays as it is."""
    if not path:
        return value
    if hasattr(tree, "raw_mapping"):  # a State of NNX, dicts inside
        return type(tree)(_replaced(tree.raw_mapping, path, value))
    name = _key(tree, path[0])
    changed = {**tree, name: _replaced(tree[name], path[1:], value)}
    return changed if type(tree) is dict else type(tree)(changed)


def _key(tree: Any, name: Any) -> Any:
    """A name as the tree has it: NNX numbers what is in lists, and "a/0" is written with a text."""
    if isinstance(tree, Mapping) and name not in tree and isinstance(name, str) and name.isdigit():
        return int(name)
    return name


def _joined(path: Path) -> str:
    return "/".join(map(str, path))
