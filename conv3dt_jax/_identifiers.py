"""How Keras names things: a string, or a config dict ``{"class_name": ..., "config": {...}}``."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

import jax

_KERAS = ("keras", "tensorflow", "tf_keras")
_DICT_KEYS = {"module", "class_name", "config", "registered_name", "build_config", "shared_object_id"}


def parse(argument: str, identifier: Any) -> tuple[str, dict[str, Any]]:
    """The name and the config in a string or a Keras config dict, old form or new."""
    if isinstance(identifier, str):
        return identifier, {}
    unknown = set(identifier) - _DICT_KEYS
    if unknown or not isinstance(identifier.get("class_name"), str):
        raise ValueError(
            f"`{argument}={dict(identifier)!r}` must be a config dict with 'class_name' (a string) and 'config'"
            + (f"; unknown keys: {sorted(unknown)}." if unknown else ".")
        )
    name, config = identifier["class_name"], identifier.get("config")
    if name == "function" and isinstance(config, str):  # Keras 3 writes functions so
        return config, {}
    if config is not None and not isinstance(config, Mapping):
        raise ValueError(f"`{argument}={dict(identifier)!r}` has a 'config' that is no dict.")
    return name, dict(config or {})


def snake_case(name: str) -> str:
    """`GlorotUniform` to `glorot_uniform`, `L1L2` to `l1l2`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def resolve(argument: str, identifier: Any, classes: Mapping[str, type], aliases: Mapping[str, str]) -> Any:
    """The object that a name, a config dict, an object of Keras's or a callable stands for; None stays None.

    Args:
      argument: the argument's name, for messages.
      identifier: what the user gave.
      classes: Keras's names in snake case, and what builds the object from its config.
      aliases: other names for them.

    Raises:
      ValueError: an unknown name, or a config that does not fit.
      TypeError: none of the above.
    """
    if isinstance(identifier, type) and (identifier in classes.values() or hasattr(identifier, "get_config")):
        with jax.ensure_compile_time_eval():  # Keras's objects hold arrays
            identifier = identifier()  # Keras takes the class for an object with its defaults
    if identifier is None or isinstance(identifier, tuple(classes.values())):
        return identifier
    if isinstance(identifier, str | Mapping):
        name, config = parse(argument, identifier)
    elif callable(identifier) and not isinstance(identifier, type):
        if not from_keras(identifier):
            return identifier
        name, config = parse(argument, as_config(identifier))
    else:
        raise TypeError(
            f"`{argument}={identifier!r}` must be a Keras name, a config dict, a callable of one array, or None, "
            f"not {type(identifier).__name__}."
        )
    known = aliases.get(snake_case(name), snake_case(name))
    if known not in classes:
        raise unknown_name(argument, name, classes)
    return call_with(argument, name, classes[known], config)


def as_config(value: Any) -> Any:
    """An object or a class of Keras's as its config dict; anything else as it is."""
    if isinstance(value, type) and value.__module__.split(".")[0] in _KERAS:
        with jax.ensure_compile_time_eval():
            value = value()
    if isinstance(value, type) or not from_keras(value):
        return value
    with jax.ensure_compile_time_eval():
        return {"class_name": type(value).__name__, "config": value.get_config()}


def from_keras(value: Any) -> bool:
    """Whether an object is one of Keras's own, not of a user's class."""
    return type(value).__module__.split(".")[0] in _KERAS and hasattr(value, "get_config")


def unknown_name(argument: str, name: str, known: Collection[str]) -> ValueError:
    close = get_close_matches(name.lower(), known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return ValueError(
        f"`{argument}={name!r}` is not a name that Keras knows{hint} Use a callable, a config dict, or one of: "
        f"{', '.join(sorted(known))}."
    )


def call_with(argument: str, name: str, maker: Any, config: Mapping[str, Any]) -> Any:
    """Builds an object from its config; keys it does not take are refused by name."""
    try:
        return maker(**config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{argument}`: the config {dict(config)!r} does not fit {name!r}: {error}") from None
