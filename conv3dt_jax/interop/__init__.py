"""Weights from everywhere and back: Keras, PyTorch, Flax, Equinox, Haiku. One function for each direction.

Parameters here are ``{"kernel": (kd, kh, kw, F // G, C), "bias": (F,)}``, of an ordinary convolution with the kernel
``(kd, kh, kw, C // G, F)``: what `conv3dt_jax.apply` and the layers take.
``spec_from_...`` gives the operation that goes with them, so that ``apply(params, inputs, spec)`` is the other
framework's output. The packages are optional and imported when they are needed.

>>> import numpy as np
>>> from conv3dt_jax import interop
>>> params = interop.from_pytorch({"weight": np.ones((3, 8, 2, 2, 2), "f4"), "bias": np.zeros(8, "f4")})
>>> {name: value.shape for name, value in params.items()}
{'kernel': (2, 2, 2, 8, 3), 'bias': (8,)}
"""

from conv3dt_jax.interop._equinox_haiku import (
    from_equinox,
    from_haiku,
    spec_from_equinox,
    spec_from_haiku,
    to_equinox,
    to_haiku,
)
from conv3dt_jax.interop._flax import from_flax, spec_from_flax, to_flax
from conv3dt_jax.interop._keras import from_keras, layer_from_keras, to_keras
from conv3dt_jax.interop._pytorch import from_pytorch, spec_from_pytorch, to_pytorch

__all__ = [
    "from_equinox",
    "from_flax",
    "from_haiku",
    "from_keras",
    "from_pytorch",
    "layer_from_keras",
    "spec_from_equinox",
    "spec_from_flax",
    "spec_from_haiku",
    "spec_from_pytorch",
    "to_equinox",
    "to_flax",
    "to_haiku",
    "to_keras",
    "to_pytorch",
]
