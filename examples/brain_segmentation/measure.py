"""Times the alternatives for each part of the network: `python -m examples.brain_segmentation.measure`.

A row is a part at the size at which a training step of the demo uses it, forward with the gradients of inputs and
parameters; the figures are medians of interleaved repeats, relative to the part that was chosen.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

import conv3dt_jax as c3t
from examples.brain_segmentation.model import TrilinearUpsample

REPEATS = 9


class MaxPoolDown(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(self.features)(nn.max_pool(x, (2, 2, 2), (2, 2, 2)))


def same(features: int) -> dict[str, nn.Module]:
    return {
        "Conv3D, stride 1": c3t.Conv3D(features, 3, padding="same"),
        "flax Conv, stride 1": nn.Conv(features, (3, 3, 3)),
    }


def down(features: int) -> dict[str, nn.Module]:
    return {
        "Conv3D 2x2x2, stride 2": c3t.Conv3D(features, 2, strides=2),
        "Conv3D 3x3x3, stride 2": c3t.Conv3D(features, 3, strides=2, padding="same"),
        "max pool + matrix": MaxPoolDown(features),
        "flax Conv 2x2x2, stride 2": nn.Conv(features, (2, 2, 2), (2, 2, 2), "VALID"),
        "flax Conv 3x3x3, stride 2": nn.Conv(features, (3, 3, 3), (2, 2, 2)),
    }


def up(features: int) -> dict[str, nn.Module]:
    return {
        "Conv3DTranspose, stride 2": c3t.Conv3DTranspose(features, 2, strides=2),
        "flax ConvTranspose, stride 2": nn.ConvTranspose(features, (2, 2, 2), (2, 2, 2)),
        "matrix + trilinear": TrilinearUpsample(features),
    }


# (part, its alternatives, input shape, features)
PARTS: list[tuple[str, Callable[[int], dict[str, nn.Module]], tuple[int, ...], int]] = [
    ("3x3x3", same, (4, 32, 32, 32, 8), 8),
    ("3x3x3", same, (4, 16, 16, 16, 16), 16),
    ("3x3x3", same, (4, 8, 8, 8, 32), 32),
    ("down", down, (4, 32, 32, 32, 8), 16),
    ("down", down, (4, 16, 16, 16, 16), 32),
    ("up", up, (4, 8, 8, 8, 32), 16),
    ("up", up, (4, 16, 16, 16, 16), 8),
]


def step(module: nn.Module, x: jax.Array) -> Callable[[], object]:
    """A compiled call: the result and the gradients of its square."""
    params = module.init(jax.random.key(0), x)

    @jax.jit
    def run(params: object, x: jax.Array) -> object:
        return jax.value_and_grad(lambda p, x: jnp.square(jnp.asarray(module.apply(p, x))).sum(), (0, 1))(params, x)

    jax.block_until_ready(run(params, x))
    return lambda: jax.block_until_ready(run(params, x))


def main() -> None:
    for part, alternatives, shape, features in PARTS:
        x = jax.random.normal(jax.random.key(1), shape)
        steps = {name: step(module, x) for name, module in alternatives(features).items()}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(REPEATS):
            for name, run in steps.items():
                started = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - started)
        medians = {name: statistics.median(values) for name, values in times.items()}
        chosen = next(iter(medians.values()))
        print(f"{part} {shape} -> {features} channels")
        for name, median in medians.items():
            print(f"  {name:30s} {median * 1e3:8.1f} ms  {median / chosen:6.1f} x")


if __name__ == "__main__":
    main()
