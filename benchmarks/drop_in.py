"""Times `jax.lax.conv_transpose` beside `conv3dt_jax.lax.conv_transpose`, and models with and without `accelerated`.

`python -m benchmarks.drop_in`: a process for each row, compiled ahead, interleaved rounds, medians.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jax.numpy as jnp
from tqdm import tqdm

import conv3dt_jax as c3t
from benchmarks import machine
from benchmarks.report import milliseconds, table, times, write_parts

ROUNDS, LONG = 7, 2.0
"""Rounds at least, and seconds of a call that is made in three of them only."""

MOST_ROUNDS, ENOUGH = 101, 0.5
"""Rounds at most, which short calls are given, and the seconds that the rounds of a call take then."""


class Call(NamedTuple):
    """The shapes of its operands with the channels last, and arguments; how the operands lie, see `LAYOUTS`."""

    inputs: Sequence[int]
    kernel: Sequence[int]
    strides: Sequence[int]
    padding: str = "SAME"
    layout: str = "last"


LAYOUTS = {
    "last": ("N*C", "*IO", False),
    "first": ("NC*", "OI*", False),
    "Keras, last": ("N*C", "*IO", True),
    "Keras, first": ("NC*", "*IO", True),
}
"""Of the inputs and the kernel, stars for the spatial axes; and whether the kernel is transposed. Flax calls "last",
Equinox "first"; Haiku does as Keras."""


CALLS = {
    "inverse short-time Fourier transform, 1-D, k1024 s256": Call((8, 129, 513), (1024, 513, 1), (256,)),
    "vocoder, 1-D, k16 s8": Call((1, 1000, 512), (16, 512, 256), (8,)),
    "wave U-Net, 1-D, k4 s2": Call((4, 32000, 32), (4, 32, 32), (2,)),
    "DCGAN, first layer, 2-D, k4 s2": Call((32, 4, 4, 512), (4, 4, 512, 256), (2, 2)),
    "DCGAN, second layer, 2-D, k4 s2": Call((32, 8, 8, 256), (4, 4, 256, 128), (2, 2)),
    "DCGAN, third layer, 2-D, k4 s2": Call((32, 16, 16, 128), (4, 4, 128, 64), (2, 2)),
    "DCGAN, last layer, 2-D, k4 s2": Call((32, 32, 32, 64), (4, 4, 64, 3), (2, 2)),
    "DCGAN, third layer of 8 samples, 2-D, k4 s2": Call((8, 16, 16, 128), (4, 4, 128, 64), (2, 2)),
    "DCGAN, first layer of one sample, 2-D, k4 s2": Call((1, 4, 4, 512), (4, 4, 512, 256), (2, 2)),
    "the same, 1024 channels": Call((1, 4, 4, 1024), (4, 4, 1024, 512), (2, 2)),
    "DCGAN, first layer of 1024 channels, 2-D, k4 s2": Call((64, 4, 4, 1024), (4, 4, 1024, 512), (2, 2)),
    "DCGAN, second layer, 2-D, k5 s2": Call((32, 8, 8, 256), (5, 5, 256, 128), (2, 2)),
    "U-Net, 2-D, k2 s2": Call((4, 64, 64, 128), (2, 2, 128, 64), (2, 2)),
    "U-Net, bottleneck, 2-D, k2 s2": Call((4, 32, 32, 256), (2, 2, 256, 128), (2, 2)),
    "the same of 1024 channels": Call((2, 28, 28, 1024), (2, 2, 1024, 512), (2, 2)),
    "U-Net, 2-D, k3 s2": Call((1, 256, 256, 32), (3, 3, 32, 16), (2, 2)),
    "the same, bottleneck of 1024 channels": Call((2, 28, 28, 1024), (3, 3, 1024, 512), (2, 2)),
    "without strides, 2-D, k5": Call((2, 128, 128, 32), (5, 5, 32, 32), (1, 1)),
    "image of 512 channels, 2-D, k3 s2": Call((4, 28, 28, 512), (3, 3, 512, 3), (2, 2)),
    "the same of 32 channels, k5 s2, VALID": Call((4, 28, 28, 32), (5, 5, 32, 32), (2, 2), "VALID"),
    "U-Net, 3-D, k2 s2": Call((1, 32, 32, 32, 64), (2, 2, 2, 64, 32), (2, 2, 2)),
    "U-Net, 3-D, k3 s2": Call((1, 32, 32, 32, 32), (3, 3, 3, 32, 32), (2, 2, 2)),
}

CHANNELS_FIRST = [
    "vocoder, 1-D, k16 s8",
    "wave U-Net, 1-D, k4 s2",
    "DCGAN, first layer, 2-D, k4 s2",
    "DCGAN, second layer, 2-D, k4 s2",
    "DCGAN, third layer, 2-D, k4 s2",
    "DCGAN, last layer, 2-D, k4 s2",
    "DCGAN, third layer of 8 samples, 2-D, k4 s2",
    "DCGAN, first layer of one sample, 2-D, k4 s2",
    "U-Net, 2-D, k2 s2",
    "the same of 1024 channels",
    "U-Net, 2-D, k3 s2",
    "the same, bottleneck of 1024 channels",
    "U-Net, 3-D, k2 s2",
    "U-Net, 3-D, k3 s2",
]
"""Those of `CALLS` that are measured so too."""

CODE = (8, 4, 4, 256)
WIDTHS = (128, 64, 3)
"""Of the models: a decoder from 4 x 4 to 32 x 32 pixels."""

Pair = tuple[Callable[[], Any], Callable[[], Any]]


def pairs_of(name: str, layout: str) -> tuple[Pair, Pair]:
    """The plain and the fast program of a call or a model: forward, and with gradients."""
    return _of_a_model(MODELS[name]) if name in MODELS else _of_a_call(CALLS[name]._replace(layout=layout))


def forward_of(call: Call) -> Pair:
    """The plain and the fast program of a call."""
    operands = _operands(call)
    plain, fast = (_compiled(function, *operands) for function in _functions(call))
    return plain, fast


def _operands(call: Call) -> list[jax.Array]:
    """Inputs and kernel, as they lie."""
    *lhs, channels = call.inputs
    *taps, inputs, outputs = call.kernel
    first, kernel, transposed = LAYOUTS[call.layout]
    lhs.insert(1 if first == "NC*" else len(lhs), channels)
    features = (outputs, inputs) if transposed or kernel == "OI*" else (inputs, outputs)
    rhs = (*features, *taps) if kernel == "OI*" else (*taps, *features)
    return [_normal(lhs, 0), _normal(rhs, 1)]


def _functions(call: Call) -> list[Callable[..., jax.Array]]:
    letters = "DHW"[-len(call.strides) :]
    lhs, rhs, transposed = LAYOUTS[call.layout]
    numbers = tuple(spec.replace("*", letters) for spec in (lhs, rhs, lhs))
    static: dict[str, Any] = {"strides": call.strides, "padding": call.padding, "dimension_numbers": numbers}
    functions: list[Callable[..., jax.Array]] = [jax.lax.conv_transpose, c3t.lax.conv_transpose]
    return [functools.partial(function, **static, transpose_kernel=transposed) for function in functions]


def _of_a_call(call: Call) -> tuple[Pair, Pair]:
    operands = _operands(call)
    plain, fast = (_compiled(_with_gradients(function), *operands) for function in _functions(call))
    return forward_of(call), (plain, fast)


def _of_a_model(make: Callable[[], tuple[Callable[..., Any], Any]]) -> tuple[Pair, Pair]:
    forward, parameters = make()
    x = _normal(CODE, 0)

    def training(parameters: Any, x: Any) -> Any:
        return jax.value_and_grad(lambda p: (forward(p, x) ** 2).mean())(parameters)

    plain = [_compiled(function, parameters, x) for function in (forward, training)]
    with c3t.accelerated():
        fast = [_compiled(function, parameters, x) for function in (forward, training)]
    return (plain[0], fast[0]), (plain[1], fast[1])


def linen() -> tuple[Callable[..., Any], Any]:
    import flax.linen as nn

    layers: list[Any] = []
    for width in WIDTHS:
        layers += [nn.ConvTranspose(width, (4, 4), strides=(2, 2)), nn.relu]
    model = nn.Sequential(layers[:-1])
    return model.apply, model.init(jax.random.key(0), jnp.ones(CODE))


def nnx_() -> tuple[Callable[..., Any], Any]:
    from flax import nnx

    rngs, before = nnx.Rngs(0), CODE[-1]
    layers: list[Any] = []
    for width in WIDTHS:
        layers += [nnx.ConvTranspose(before, width, (4, 4), strides=(2, 2), rngs=rngs), jax.nn.relu]
        before = width
    definition, state = nnx.split(nnx.Sequential(*layers[:-1]))
    return lambda state, x: nnx.merge(definition, state)(x), state


def haiku() -> tuple[Callable[..., Any], Any]:
    import haiku as hk

    def run(x: Any) -> Any:
        layers: list[Any] = []
        for width in WIDTHS:
            layers += [hk.Conv2DTranspose(width, 4, stride=2), jax.nn.relu]
        return hk.Sequential(layers[:-1])(x)

    model = hk.without_apply_rng(hk.transform(run))
    return model.apply, model.init(jax.random.key(0), jnp.ones(CODE))


def equinox() -> tuple[Callable[..., Any], Any]:
    import equinox as eqx

    layers, before = [], CODE[-1]
    for key, width in zip(jax.random.split(jax.random.key(0), len(WIDTHS)), WIDTHS, strict=True):
        layers += [eqx.nn.ConvTranspose2d(before, width, 4, stride=2, padding=1, key=key), eqx.nn.Lambda(jax.nn.relu)]
        before = width
    parameters, static = eqx.partition(eqx.nn.Sequential(layers[:-1]), eqx.is_array)
    return lambda p, x: jax.vmap(eqx.combine(p, static))(jnp.moveaxis(x, -1, 1)), parameters


def keras() -> tuple[Callable[..., Any], Any]:
    import keras

    layers = [keras.layers.Conv2DTranspose(width, 4, strides=2, padding="same", activation="relu") for width in WIDTHS]
    model = keras.Sequential([keras.Input(CODE[1:]), *layers])
    parameters = [jnp.asarray(variable.value) for variable in model.trainable_variables]
    return lambda p, x: model.stateless_call(p, [], x)[0], parameters


MODELS = {"Flax Linen": linen, "Flax NNX": nnx_, "Haiku": haiku, "Equinox": equinox, "Keras": keras}


def _normal(shape: Sequence[int], seed: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def _with_gradients(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    def run(x: jax.Array, w: jax.Array) -> Any:
        y, pullback = jax.vjp(function, x, w)
        return y, *pullback(y)

    return run


def _compiled(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    program = jax.jit(function).lower(*arguments).compile()
    return lambda: jax.block_until_ready(program(*arguments))


def measure(pair: Pair) -> tuple[float, float]:
    """Medians in seconds, of interleaved calls after one that is not timed; either is first in turn."""
    found: list[list[float]] = [[], []]
    started = time.perf_counter()
    for call in pair:
        call()
    rounds = int(ENOUGH * len(pair) / (time.perf_counter() - started))
    for round_ in range(min(max(rounds, ROUNDS), MOST_ROUNDS)):
        for seconds, call in list(zip(found, pair, strict=True))[:: 1 if round_ % 2 else -1]:
            if round_ < 3 or max(seconds) < LONG:
                started = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - started)
    return statistics.median(found[0]), statistics.median(found[1])


def row(name: str, layout: str = "last") -> list[str]:
    """Measured in a process of its own: what the heap holds from others changes the time of new pages."""
    command = [sys.executable, "-m", "benchmarks.drop_in", "--one", name, layout]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    cells = [name]
    for plain, fast in json.loads(done.stdout.splitlines()[-1]):
        cells += [milliseconds(plain), milliseconds(fast), times(plain / fast)]
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drop_in", description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/bench"))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps([measure(pair) for pair in pairs_of(*args.one)]))
        return
    rows = {name: row(name) for name in tqdm([*CALLS, *MODELS])}
    first = [row(name, "first") for name in tqdm(CHANNELS_FIRST)]
    heads = ["forward, JAX, ms", "ours, ms", "faster", "with gradients, JAX, ms", "ours, ms", "faster"]
    facts = machine.facts("default")
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    parts = [
        "## Drop-in",
        f"{facts['cpu']}, {facts['threads']} threads; float32; {ROUNDS} to {MOST_ROUNDS} rounds, medians.",
        versions,
    ]
    parts.append(table(["`conv_transpose`", *heads], [rows[name] for name in CALLS]))
    parts.append(table(["the same with the channels first, as Equinox calls it", *heads], first))
    parts.append(table(["model, a decoder of 4 x 4 to 32 x 32 pixels", *heads], [rows[name] for name in MODELS]))
    write_parts(parts, args.out / "drop-in.md")


if __name__ == "__main__":
    main()
