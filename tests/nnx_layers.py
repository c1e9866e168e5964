"""What the tests of the NNX layer share: inputs, and a short way to a layer."""

import numpy as np
from flax import nnx

import conv3dt_jax as c3t

X = np.random.default_rng(0).normal(size=(2, 3, 4, 2, 3)).astype(np.float32)
UP = {"strides": 2, "padding": "same", "activation": "tanh"}


def make(*arguments, rngs=None, **options) -> c3t.nnx.Conv3DTranspose:
    return c3t.nnx.Conv3DTranspose(3, *(arguments or (4, 3)), **options, rngs=rngs or nnx.Rngs(0))


def params_of(layer) -> dict:
    return {name: value[...] for name, value in (("kernel", layer.kernel), ("bias", layer.bias)) if value is not None}
