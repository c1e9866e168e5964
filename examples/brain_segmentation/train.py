"""Loss, step and loop."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

from examples.brain_segmentation.data import PatchSampler
from examples.brain_segmentation.model import UNet

Params = Any


class Stop:
    """Whether Ctrl-C was pressed. The first press asks for a clean stop, the second interrupts at once."""

    def __init__(self) -> None:
        self.requested = False

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("\nstopping after this step and keeping what was learnt; Ctrl-C again quits at once", file=sys.stderr)

    @contextlib.contextmanager
    def listen(self) -> Iterator[None]:
        before = signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


@dataclasses.dataclass(frozen=True)
class Trained:
    """The outcome of a training run: ``losses`` has one entry per step done."""

    params: Params
    losses: list[float]
    seconds_per_step: float
    compile_seconds: float


def loss_function(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy plus one minus the mean soft Dice of the classes but the background."""
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    probabilities = jax.nn.softmax(logits)
    truth = jax.nn.one_hot(labels, logits.shape[-1])
    overlap = (probabilities * truth).sum((0, 1, 2, 3))
    total = (probabilities + truth).sum((0, 1, 2, 3))
    return entropy + 1 - ((2 * overlap + 1) / (total + 1))[1:].mean()


def train(model: UNet, sampler: PatchSampler, steps: int, learning_rate: float, stop: Stop, name: str) -> Trained:
    """Trains with AdamW, a short warm-up and cosine decay, until ``steps`` are done or ``stop`` is requested."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, max(1, steps // 10), steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=1e-4))

    @jax.jit
    def step(
        params: Params, state: optax.OptState, image: jax.Array, labels: jax.Array
    ) -> tuple[Params, Any, jax.Array]:
        loss, gradient = jax.value_and_grad(
            lambda p: loss_function(jnp.asarray(model.apply({"params": p}, image)), labels)
        )(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    image, labels = sampler(0)
    key = jax.random.key(sampler.seed, impl="rbg")  # compiles in a fraction of the default generator's time
    params = jax.jit(model.init)(key, image)["params"]
    state = optimizer.init(params)
    started = time.perf_counter()
    compiled = step.lower(params, state, image, labels).compile()
    compile_seconds = time.perf_counter() - started
    losses: list[float] = []
    started = time.perf_counter()
    with tqdm(range(steps), desc=name, unit="step", dynamic_ncols=True) as progress:
        for i in progress:
            if stop.requested:
                break
            params, state, loss = compiled(params, state, *sampler(i))
            losses.append(float(loss))
            progress.set_postfix(loss=f"{sum(losses[-10:]) / len(losses[-10:]):.3f}")
    elapsed = time.perf_counter() - started
    return Trained(params, losses, elapsed / max(1, len(losses)), compile_seconds)
