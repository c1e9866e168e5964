"""Keras's dtype policies: one name for the dtype of the computation and that of the parameters.

"mixed_bfloat16" computes in bfloat16 and keeps float32 parameters; "bfloat16" does both in bfloat16. To a layer of this
package a plain dtype says what is computed in, as in Flax; in a Keras config it is a policy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from conv3dt_jax import _arguments as args

_MIXED = {"mixed_bfloat16": "bfloat16", "mixed_float16": "float16"}
_CLASSES = ("DTypePolicy", "FloatDTypePolicy", "Policy", "PolicyV1")  # Keras 3, 3.0, 2.4 and 2.3


def resolve(dtype: Any, param_dtype: Any) -> tuple[np.dtype | None, np.dtype]:
    """The dtypes of the computation (None promotes) and of the parameters that a layer's arguments mean.

    Raises:
      TypeError: what is no dtype, or one that cannot be trained.
      ValueError: an unknown policy, or one that contradicts ``param_dtype``.
    """
    param = args.inexact_dtype("param_dtype", param_dtype)
    name = policy_name(dtype)
    if name is None:
        return (None if dtype is None else args.inexact_dtype("dtype", dtype)), param
    compute, variable = split("dtype", name)
    if variable != param:
        raise ValueError(
            f"`dtype={name!r}` is a policy that keeps parameters in {variable.name}, but `param_dtype={param.name}`; "
            f"give param_dtype={variable.name!r}, or the dtype of the computation alone."
        )
    return compute, param


def policy_name(value: Any) -> str | None:
    """The name of a mixed policy, of a policy's config dict or of a Keras policy object; None for a plain dtype."""
    if isinstance(value, str):
        return value if value.startswith("mixed_") else None
    if isinstance(value, Mapping):
        config = value.get("config")
        name = config.get("name") if isinstance(config, Mapping) else None
        if value.get("class_name") not in _CLASSES or not isinstance(name, str):
            raise ValueError(
                f"{args.received('dtype', dict(value))} must be a dtype, or the config of one of Keras's policies "
                f"{', '.join(_CLASSES)} with a 'name'."
            )
        return name
    if hasattr(value, "compute_dtype") and hasattr(value, "variable_dtype"):
        return str(value.name)
    return None


def split(argument: str, name: str) -> tuple[np.dtype, np.dtype]:
    """The dtypes (of the computation, of the parameters) of a policy."""
    if name in _MIXED:
        return args.inexact_dtype(argument, _MIXED[name]), args.inexact_dtype(argument, "float32")
    if name.startswith("mixed_"):
        raise ValueError(
            f"`{argument}={name!r}` is not a policy that Keras knows; the mixed ones are {', '.join(_MIXED)}."
        )
    plain = args.inexact_dtype(argument, name)
    return plain, plain


def name_of(dtype: np.dtype | None, param_dtype: np.dtype) -> str | None:
    """The policy with these dtypes, or None where Keras has none."""
    if dtype is None:
        return None
    if dtype == param_dtype:
        return dtype.name
    mixed = f"mixed_{dtype.name}"
    return mixed if mixed in _MIXED and param_dtype == np.float32 else None
