"""The transposed 3-D convolution for JAX: a pure function, parameters as pytrees, and a Keras-exact Flax layer.

>>> import jax.numpy as jnp
>>> import conv3dt_jax as c3t
>>> c3t.conv3d_transpose(jnp.ones((1, 4, 4, 4, 3)), jnp.ones((2, 2, 2, 8, 3)), strides=2).shape
(1, 8, 8, 8, 8)
"""

from typing import TYPE_CHECKING, Any

from conv3dt_jax._explain import Explanation, explain
from conv3dt_jax._spec import Conv3DTransposeSpec
from conv3dt_jax.functional import apply, conv3d_transpose, init, output_shape

if TYPE_CHECKING:
    from conv3dt_jax.linen import Conv3DTranspose, Convolution3DTranspose

__version__ = "0.1.0"

__all__ = [
    "Conv3DTranspose",
    "Conv3DTransposeSpec",
    "Convolution3DTranspose",
    "Explanation",
    "apply",
    "conv3d_transpose",
    "explain",
    "init",
    "output_shape",
]

_LAYERS = ("Conv3DTranspose", "Convolution3DTranspose")


def __getattr__(name: str) -> Any:
    if name in _LAYERS:  # Flax loads when a layer is first touched: `import conv3dt_jax` stays quick
        from conv3dt_jax import linen

        return getattr(linen, name)
    raise AttributeError(f"module 'conv3dt_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAYERS])
