"""How Keras names things: a string, or a config dict ``{"class_name": ..., "config": {...}}``."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

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
    """`GlorotUniform` to `glorot_uniform`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


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
    except TypeError as error:
        raise ValueError(f"`{argument}`: the config {dict(config)!r} does not fit {name!r}: {error}.") from None
