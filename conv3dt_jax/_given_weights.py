"""Initial values that a layer was given: arrays that compare by value and hash, as a layer's attributes must."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from conv3dt_jax import _arguments as args
from conv3dt_jax._convolution_spec import ConvolutionSpec


class GivenWeights(Sequence[np.ndarray]):
    """``[kernel, bias]`` (or ``[kernel]``) in the dtype of the parameters: read-only, hashable, equal by value."""

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self._arrays = tuple(arrays)
        digest = hashlib.sha256()
        for array in self._arrays:
            array.flags.writeable = False
            digest.update(f"{array.shape}{array.dtype.name}".encode() + array.tobytes())
        self._digest = digest.digest()

    @classmethod
    def of(cls, value: Any, spec: ConvolutionSpec, dtype: np.dtype) -> GivenWeights:
        """Checks the arrays of ``weights=`` against a layer's arguments."""
        if isinstance(value, cls):
            arrays = list(value)
        elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
            arrays = [_array(item) for item in value]
        else:
            raise TypeError(f"`weights` must be a list of arrays, [kernel, bias], not {type(value).__name__}.")
        wanted = [f"(kd, kh, kw, {spec.kernel_layout})", "(filters,)"][: 1 + spec.use_bias]
        shapes = [array.shape for array in arrays]
        fits = len(shapes) == len(wanted) and len(shapes[0]) == 5 and 0 not in shapes[0]
        if not fits or shapes != [spec.kernel_shape(spec.channels_of(shapes[0])), (spec.filters,)][: len(wanted)]:
            raise ValueError(
                f"`weights` have the shapes {shapes}; the layer takes {len(wanted)}: {' and '.join(wanted)} with "
                f"kernel_size={spec.kernel_size}, filters={spec.filters}, groups={spec.groups}, "
                f"use_bias={spec.use_bias}."
            )
        if isinstance(value, cls) and all(array.dtype == dtype for array in arrays):
            return value
        if any(np.iscomplexobj(array) for array in arrays) and not jnp.issubdtype(dtype, jnp.complexfloating):
            raise TypeError(f"`weights` are complex, but `param_dtype={dtype.name}`; give a complex param_dtype.")
        with np.errstate(over="ignore"):
            cast = [np.array(array, dtype) for array in arrays]
        if any((np.isfinite(old) & ~np.isfinite(new)).any() for old, new in zip(arrays, cast, strict=True)):
            raise ValueError(f"`weights` hold values beyond `param_dtype={dtype.name}`; give a wider param_dtype.")
        return cls(cast)

    def __getitem__(self, index: Any) -> Any:
        return self._arrays[index]

    def __len__(self) -> int:
        return len(self._arrays)

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self._arrays)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GivenWeights) and self._digest == other._digest

    def __hash__(self) -> int:
        return hash(self._digest)

    def __reduce__(self) -> tuple[Any, ...]:
        return GivenWeights, (self._arrays,)

    def __repr__(self) -> str:
        return f"GivenWeights({[array.shape for array in self._arrays]})"

    def initializer(self, index: int) -> Any:
        """An initializer that draws nothing and returns the array."""

        def initialize(key: jax.Array, shape: Sequence[int], dtype: Any) -> jax.Array:
            del key
            if tuple(shape) != self[index].shape:
                raise ValueError(f"`weights` hold shape {self[index].shape}, but the inputs need {tuple(shape)}.")
            return jnp.asarray(self[index], dtype)

        return initialize


def _array(value: Any) -> np.ndarray:
    try:
        array = np.asarray(value)
    except (ValueError, TypeError):
        array = np.array(None)
    if not jnp.issubdtype(array.dtype, jnp.number):
        raise TypeError(f"{args.received('weights', value)} must hold arrays of numbers.")
    return array
