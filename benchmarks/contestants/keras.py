"""`keras.ops.conv_transpose` with the JAX backend, as `keras.layers.Conv3DTranspose` calls it."""

from __future__ import annotations

import os

os.environ["KERAS_BACKEND"] = "jax"

import jax
import keras

from benchmarks.cases import Case
from benchmarks.contestants import _jax
from benchmarks.contestants.base import Prepared, require


def prepare(case: Case, kind: str, variant: str) -> Prepared:
    require(case.transposed, "it stands for transposed convolutions alone")
    require(case.groups == 1, "Keras's transposed convolution has no groups")

    def operation(x: jax.Array, w: jax.Array) -> jax.Array:
        return keras.ops.conv_transpose(
            x,
            w,
            case.strides,
            case.padding,
            data_format=case.data_format,
            dilation_rate=case.dilation,
        )

    return _jax.prepared(case, kind, operation)
