"""The transposed 3-D convolution for JAX, and the convolution that it is the adjoint of.

Pure functions, parameters as pytrees, and Keras-exact layers for Flax.

>>> import jax.numpy as jnp
>>> import conv3dt_jax as c3t
>>> c3t.conv3d_transpose(jnp.ones((1, 4, 4, 4, 3)), jnp.ones((2, 2, 2, 8, 3)), strides=2).shape
(1, 8, 8, 8, 8)
"""

import importlib
from typing import TYPE_CHECKING, Any

from conv3dt_jax import initializers, lax
from conv3dt_jax._accelerate import Acceleration, accelerate, accelerated, restore
from conv3dt_jax._explain import Explanation, explain
from conv3dt_jax._mesh_plan import MeshPlan
from conv3dt_jax._parameters import apply, init
from conv3dt_jax._placement import MeshAxes
from conv3dt_jax._sharded import Sharded, sharded
from conv3dt_jax._spec import Conv3DSpec, Conv3DTransposeSpec
from conv3dt_jax._tiled import tiled
from conv3dt_jax.functional import conv3d, conv3d_transpose, output_shape

if TYPE_CHECKING:
    from conv3dt_jax import constraints, interop, nnx, regularizers
    from conv3dt_jax._models import find_layers
    from conv3dt_jax._training import constrain, regularization_loss
    from conv3dt_jax.linen import Conv3D, Conv3DTranspose, Convolution3D, Convolution3DTranspose

__version__ = "0.1.0"

__all__ = [
    "Acceleration",
    "Conv3D",
    "Conv3DSpec",
    "Conv3DTranspose",
    "Conv3DTransposeSpec",
    "Convolution3D",
    "Convolution3DTranspose",
    "Explanation",
    "MeshAxes",
    "MeshPlan",
    "Sharded",
    "accelerate",
    "accelerated",
    "apply",
    "constrain",
    "constraints",
    "conv3d",
    "conv3d_transpose",
    "explain",
    "find_layers",
    "init",
    "initializers",
    "interop",
    "lax",
    "nnx",
    "output_shape",
    "regularization_loss",
    "regularizers",
    "restore",
    "sharded",
    "tiled",
]

# Flax and optax load when what needs them is first touched: `import conv3dt_jax` stays quick.
_LAZY = {
    "Conv3D": "linen",
    "Conv3DTranspose": "linen",
    "Convolution3D": "linen",
    "Convolution3DTranspose": "linen",
    "constrain": "_training",
    "constraints": "",
    "find_layers": "_models",
    "interop": "",
    "nnx": "",
    "regularization_loss": "_training",
    "regularizers": "",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'conv3dt_jax' has no attribute {name!r}")
    if not _LAZY[name]:
        return importlib.import_module(f"conv3dt_jax.{name}")
    return getattr(importlib.import_module(f"conv3dt_jax.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
