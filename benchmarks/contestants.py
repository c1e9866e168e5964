"""The contestants: each makes, for a case, a function ``(inputs, kernel) -> outputs`` of the same operation.

The kernel is in Keras's layout ``(kd, kh, kw, F, C)`` throughout; a peer that wants another gets it transposed inside,
a few kilobytes against megabytes of data.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

import conv3dt_jax as c3t
from benchmarks.cases import Case
from conv3dt_jax.functional import Implementation

Operation = Callable[[jax.Array, jax.Array], jax.Array]


def ours(implementation: Implementation) -> Callable[[Case], Operation]:
    def make(case: Case) -> Operation:
        return functools.partial(
            c3t.conv3d_transpose, strides=case.strides, padding=case.padding, implementation=implementation
        )  # fmt: skip

    return make


def jax_lax(case: Case) -> Operation:
    """`jax.lax.conv_transpose` with ``transpose_kernel``, and Keras's alignment as explicit padding."""
    padding = []
    for n, k, s in zip(case.inputs[1:4], case.kernel, case.strides, strict=True):
        full = (n - 1) * s + k
        out = n * s + (max(k - s, 0) if case.padding == "valid" else 0)
        lo = max(full - out, 0) // 2
        padding.append((k - 1 - lo, k - 1 - (full - out - lo)))
    numbers = ("NDHWC", "DHWIO", "NDHWC")

    def run(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.conv_transpose(x, w, case.strides, padding, dimension_numbers=numbers, transpose_kernel=True)

    return run


def keras_on_jax(case: Case) -> Operation:
    import keras

    def run(x: jax.Array, w: jax.Array) -> jax.Array:
        return keras.ops.conv_transpose(x, w, case.strides, case.padding, data_format="channels_last")

    return run


def flax_linen(case: Case) -> Operation:
    """`flax.linen.ConvTranspose`; its "same" is aligned differently, so its values are not compared."""
    import flax.linen as nn

    layer = nn.ConvTranspose(case.filters, case.kernel, case.strides, case.padding.upper(), use_bias=False)

    def run(x: jax.Array, w: jax.Array) -> jax.Array:
        kernel = jnp.flip(w, (0, 1, 2)).swapaxes(3, 4)
        return jnp.asarray(layer.apply({"params": {"kernel": kernel}}, x))

    return run


CONTESTANTS: dict[str, Callable[[Case], Operation]] = {
    "auto": ours("auto"),
    "dilated": ours("dilated"),
    "matmul": ours("matmul"),
    "phases": ours("phases"),
    "jax.lax": jax_lax,
    "flax": flax_linen,
    "keras": keras_on_jax,
}
NOT_COMPARED = {"flax"}
