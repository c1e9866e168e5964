"""A training step of the demo's U-Net: as it is, or with Flax's own layers, `Conv` and `ConvTranspose`, instead."""

from __future__ import annotations

import contextlib
import time
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from benchmarks import data
from benchmarks.cases import Case
from benchmarks.contestants.base import Prepared
from examples.brain_segmentation import model as demo
from examples.brain_segmentation.train import loss_function

LEARNING_RATE = 1e-3


def flax_layer(kind: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """`Conv3D` or `Conv3DTranspose`, as far as the network calls it, by Flax's layer."""

    def make(
        filters: int,
        kernel_size: int,
        strides: int = 1,
        padding: str = "valid",
        use_bias: bool = True,
        kernel_initializer: str = "glorot_uniform",
        dtype: Any = None,
    ) -> nn.Module:
        initializer = getattr(nn.initializers, kernel_initializer)()
        sizes = (filters, (kernel_size,) * 3, (strides,) * 3, padding.upper())
        return kind(*sizes, use_bias=use_bias, kernel_init=initializer, dtype=dtype)

    return make


@contextlib.contextmanager
def layers(variant: str) -> Iterator[None]:
    """What the demo's module finds under the name of this library."""
    if variant == "ours":
        yield
        return
    stand_in = types.SimpleNamespace(Conv3D=flax_layer(nn.Conv), Conv3DTranspose=flax_layer(nn.ConvTranspose))
    with mock.patch.object(demo, "c3t", stand_in):
        yield


def prepare(case: Case, kind: str, variant: str) -> Prepared:
    network = demo.UNet(classes=case.filters)
    image, labels = jnp.asarray(data.operands(case)[0]), jnp.asarray(data.labels(case))
    optimizer = optax.sgd(LEARNING_RATE)

    def step(params: Any, state: Any) -> Any:
        def loss(p: Any) -> jax.Array:
            return loss_function(jnp.asarray(network.apply({"params": p}, image)), labels)

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    with layers(variant):
        params = jax.jit(network.init)(jax.random.key(0, impl="rbg"), image)["params"]
        started = time.perf_counter()
        compiled = jax.jit(step).lower(params, optimizer.init(params)).compile()
        compile_seconds = time.perf_counter() - started
    current = {"params": params, "state": optimizer.init(params)}

    def call() -> Any:
        current["params"], current["state"], value = jax.block_until_ready(compiled(*current.values()))
        return value

    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    memory = getattr(compiled.memory_analysis(), "temp_size_in_bytes", None)
    facts = {"parameters": parameters}
    return Prepared(call, lambda results: [], compile_seconds, memory, compared=False, facts=facts)
