"""A layer's arguments as a dict for JSON, in Keras's form; and such dicts, of any Keras since 2.0, as arguments."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import jax
import numpy as np

from conv3dt_jax import _activations, _dtype_policy, _identifiers, _layer, constraints, initializers, regularizers
from conv3dt_jax import _arguments as args
from conv3dt_jax._placement import MeshAxes

# What Keras's layer may not take, or warns of, with its default: written where it differs.
_OURS = {
    "groups": 1,
    "precision": None,
    "implementation": "auto",
    "input_shape": None,
    "batch_input_shape": None,
    "weights": None,
    "mesh_axes": None,
}
# Where Keras keeps each kind, and the names in its files for the classes that stand for them here.
_MODULES = {
    **dict.fromkeys(regularizers.CLASSES.values(), "keras.regularizers"),
    **dict.fromkeys(constraints.CLASSES.values(), "keras.constraints"),
    **dict.fromkeys(initializers.CLASSES.values(), initializers.__name__),
}


def to_config(layer: Any, kind: _layer.Kind) -> dict[str, Any]:
    """The config of a layer, whose attributes are in canonical form."""
    config: dict[str, Any] = {"name": layer.name, "trainable": layer.trainable}
    policy = _dtype_policy.name_of(layer.dtype, layer.param_dtype)
    config["dtype"] = policy or (None if layer.dtype is None else layer.dtype.name)
    for name in kind.of_keras:
        value = getattr(layer, name)
        config[name] = _serialize(name, value, _kind(name)) if name in _layer.FUNCTIONS else _plain(value)
    if policy is None and (layer.dtype is not None or layer.param_dtype != np.float32):
        config["param_dtype"] = layer.param_dtype.name
    return config | {
        name: _plain(getattr(layer, name))
        for name, default in _OURS.items()
        if name not in kind.of_keras and getattr(layer, name) != default
    }


def _plain(value: Any) -> Any:
    """What JSON holds: lists for tuples and arrays, names for precisions."""
    if isinstance(value, jax.lax.Precision):
        return value.name.lower()
    if isinstance(value, np.ndarray):
        if np.iscomplexobj(value):
            raise ValueError("get_config: complex `weights` have no form in JSON; construct the layer without them.")
        return value.astype(np.float64).tolist()
    if isinstance(value, MeshAxes):
        value = value.as_dict()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, Sequence) and not isinstance(value, str) else value


def _serialize(argument: str, value: Any, kind: str) -> Any:
    """A name or a config dict for an activation, initializer, regularizer or constraint."""
    if value is None or isinstance(value, str | Mapping):
        return _plain(value)
    if type(value) in _MODULES:
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        if kind == "initializer":  # what is None comes from the layer
            fields = {name: field for name, field in fields.items() if field is not None}
        if "inner" in fields:
            fields["inner"] = _serialize(f"{argument}: inner", fields["inner"], kind)
        return _object(_MODULES[type(value)], type(value), _plain(fields))
    if hasattr(value, "get_config"):
        place = "keras.layers" if kind == "activation" else f"keras.{kind}s"
        module = place if _identifiers.from_keras(value) else type(value).__module__
        return _object(module, type(value), _plain(value.get_config()))
    return _function(argument, value, kind)


def _object(module: str, kind: type, config: Any) -> dict[str, Any]:
    registered = None if module.startswith("keras.") else _registered_name(kind)
    return {"module": module, "class_name": kind.__name__, "config": config, "registered_name": registered}


def _function(argument: str, value: Any, kind: str) -> str | dict[str, Any]:
    name = getattr(value, "__name__", "<none>")
    advice = (
        "Use a Keras name or config dict, a function of a module (and give it to from_config as custom_objects), or an "
        "object with get_config."
    )
    if not name.isidentifier() or "<locals>" in getattr(value, "__qualname__", ""):
        raise ValueError(f"get_config: {args.received(argument, value)} has no name that a config can hold. {advice}")
    if _is_known(kind, name):
        raise ValueError(
            f"get_config: {args.received(argument, value)} is not the {name!r} of Keras, for which its name "
            f"would stand in a config. {advice}"
        )
    named = _registered_name(value)
    return {"module": "builtins", "class_name": "function", "config": named, "registered_name": "function"}


def _registered_name(value: Any) -> str:
    """The name under which a function or class is registered with Keras, where Keras is in use; else its own."""
    keras = sys.modules.get("keras")
    return keras.saving.get_registered_name(value) if keras else value.__name__


def _is_known(kind: str, name: str) -> bool:
    """Whether a name means something already, so that it cannot stand for a user's function."""
    getter: dict[str, Callable[[], Any]] = {
        "activation": lambda: _activations.get(kind, name),
        "initializer": lambda: initializers.get(kind, name),
        "regularizer": lambda: regularizers.get(kind, name),
        "constraint": lambda: constraints.get(kind, name, rank=5),
    }
    try:
        getter[kind]()
    except ValueError:
        return False
    return True


def from_config(
    config: Mapping[str, Any], kind: _layer.Kind, known: Collection[str], custom_objects: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The arguments that a config means, for the constructor of a layer that knows the arguments ``known``."""
    config = _unwrap(config, kind)
    known = set(known) - {"parent"}
    unknown = sorted(map(str, set(config) - known))
    if unknown:
        close = get_close_matches(unknown[0], known, n=1)
        raise ValueError(
            f"from_config: unknown {'key' if len(unknown) == 1 else 'keys'} {', '.join(map(repr, unknown))}"
            + (f"; did you mean {close[0]!r}?" if close else ".")
            + f" A config has: {', '.join(sorted(known))}."
        )
    missing = {"filters", "kernel_size"} - set(config)
    if missing:
        raise ValueError(f"from_config: the config lacks {' and '.join(map(repr, sorted(missing)))}.")
    if not isinstance(custom_objects, Mapping | None):
        raise TypeError(f"`custom_objects` must be a dict by name, not {type(custom_objects).__name__}.")
    arguments = dict(config)
    if "dtype" in arguments and "param_dtype" not in arguments:
        arguments |= _dtypes(arguments.pop("dtype"))
    for name in _layer.FUNCTIONS:
        if name in arguments:
            arguments[name] = _custom(name, arguments[name], custom_objects or {})
    if isinstance(arguments.get("weights"), Sequence) and not isinstance(arguments["weights"], str):
        arguments["weights"] = [np.asarray(array) for array in arguments["weights"]]
    return arguments


def _unwrap(config: Any, kind: _layer.Kind) -> Mapping[str, Any]:
    """The layer's own config, out of the form in which a saved model holds it."""
    if not isinstance(config, Mapping):
        raise TypeError(f"from_config: the config must be a dict, not {type(config).__name__}.")
    if "class_name" not in config:
        return config
    name, inner = config["class_name"], config.get("config")
    if name not in kind.names or not isinstance(inner, Mapping):
        raise ValueError(f"from_config: this is the config of {name!r}; a layer of {kind.name!r} is wanted.")
    return inner


def _dtypes(dtype: Any) -> dict[str, Any]:
    """In a config a dtype is a policy: that of the computation and that of the parameters."""
    if dtype is None:
        return {}
    name = _dtype_policy.policy_name(dtype) or args.inexact_dtype("dtype", dtype).name
    compute, variable = _dtype_policy.split("dtype", name)
    return {"dtype": compute, "param_dtype": variable}


def _kind(argument: str) -> str:
    return argument.split("_")[-1]


def _custom(argument: str, value: Any, custom_objects: Mapping[str, Any]) -> Any:
    """What ``custom_objects`` (or Keras's registry) has in place of a name; else the name or the dict as it is."""
    if not isinstance(value, str | Mapping):
        return value
    name, inner = _identifiers.parse(argument, value)
    registered = str(value.get("registered_name") or name) if isinstance(value, Mapping) else name
    for spelling in (registered, name, name.rpartition(">")[2]):  # Keras registers as "package>name"
        found = custom_objects.get(spelling)
        if found is None and ">" in spelling and "keras" in sys.modules:
            found = sys.modules["keras"].saving.get_registered_object(spelling)
        if found is not None:
            make = getattr(found, "from_config", None)
            return (make(inner) if make else found(**inner)) if isinstance(found, type) else found
    if name.lower() == "icnr" and "inner" in inner:
        inner = {**inner, "inner": _custom(f"{argument}: inner", inner["inner"], custom_objects)}
        return _identifiers.call_with(argument, name, initializers.ICNR, inner)
    module = str(value.get("module") or "keras") if isinstance(value, Mapping) else "keras"
    if module.split(".")[0] not in ("keras", "builtins", "tensorflow", "tf_keras", "conv3dt_jax"):
        raise ValueError(
            f"from_config: `{argument}` names {name!r} of {module}; pass custom_objects={{{name!r}: ...}}."
        )
    return value
