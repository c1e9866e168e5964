"""The training state and its step: loss, mixed precision, clipping, schedule, accumulation, moving average."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax.training.dynamic_scale import DynamicScale

from examples.brain_segmentation.model import UNet
from examples.brain_segmentation.patches import augment
from examples.brain_segmentation.settings import Settings

Params = Any
WEIGHT_DECAY = 1e-4


@flax.struct.dataclass
class State:
    """All that a run goes on from.

    Attributes:
      step: batches seen.
      params: float32, whatever the precision of the computation.
      average: the exponential moving average of the parameters, which is what is evaluated.
      optimizer: the state of the optimizer, half-accumulated gradients included.
      scale: the loss scale, in float16; None in other precisions, which have the range of float32.
    """

    step: jax.Array
    params: Params
    average: Params
    optimizer: optax.OptState
    scale: DynamicScale | None


@flax.struct.dataclass
class Metrics:
    """What a step tells: float32 scalars. Where float16 overflows, and the step is skipped, the norm is not finite."""

    loss: jax.Array
    gradient_norm: jax.Array
    learning_rate: jax.Array


def loss_function(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy plus one minus the mean soft Dice of the classes but the background."""
    truth = jax.nn.one_hot(labels, logits.shape[-1])
    entropy = optax.softmax_cross_entropy(logits, truth).mean()  # by labels it has a scatter, which XLA folds slowly
    probabilities = jax.nn.softmax(logits)
    overlap = (probabilities * truth).sum((0, 1, 2, 3))
    total = (probabilities + truth).sum((0, 1, 2, 3))
    return entropy + 1 - ((2 * overlap + 1) / (total + 1))[1:].mean()


def learning_rate(settings: Settings) -> optax.Schedule:
    """A warm-up over a tenth of the updates, then the schedule."""
    updates = max(1, settings.steps // settings.accumulate)
    warmup, peak = max(1, updates // 10), settings.learning_rate
    after = {
        "cosine": optax.cosine_decay_schedule(peak, max(1, updates - warmup)),
        "linear": optax.linear_schedule(peak, 0.0, max(1, updates - warmup)),
        "constant": optax.constant_schedule(peak),
    }[settings.schedule]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def make_optimizer(settings: Settings) -> optax.MultiSteps:
    """AdamW behind a clipped gradient, the mean of ``accumulate`` batches."""
    adam = optax.adamw(learning_rate(settings), weight_decay=WEIGHT_DECAY)
    return optax.MultiSteps(optax.chain(optax.clip_by_global_norm(settings.clip), adam), settings.accumulate)


def make_model(classes: int, settings: Settings) -> UNet:
    return UNet(classes, settings.features, settings.upsampling, jnp.dtype(settings.precision))


def random_key(settings: Settings) -> jax.Array:
    return jax.random.key(settings.seed, impl="rbg")  # compiles in a fraction of the default generator's time


def initial_state(model: UNet, settings: Settings) -> State:
    image = jnp.zeros((1, *(settings.patch,) * 3, 1))
    params = jax.jit(model.init)(random_key(settings), image)["params"]
    scale = DynamicScale(fin_steps=jnp.int32(0), scale=jnp.float32(2**16))
    return State(
        step=jnp.zeros((), jnp.int32),
        params=params,
        average=params,
        optimizer=make_optimizer(settings).init(params),
        scale=scale if settings.precision == "float16" else None,
    )


def make_step(model: UNet, settings: Settings) -> Callable[[State, jax.Array, jax.Array], tuple[State, Metrics]]:
    """The function ``(state, images, labels) -> (state, metrics)``, pure; to be compiled by the caller."""
    optimizer, schedule = make_optimizer(settings), learning_rate(settings)

    def step(state: State, images: jax.Array, labels: jax.Array) -> tuple[State, Metrics]:
        if settings.augment:
            images, labels = augment(jax.random.fold_in(random_key(settings), state.step), images, labels)

        def loss_of(params: Params) -> jax.Array:
            return loss_function(jnp.asarray(model.apply({"params": params}, images)), labels)

        if state.scale is None:
            loss, gradient = jax.value_and_grad(loss_of)(state.params)
            scale, kept = None, jnp.bool_(True)
        else:
            scale, kept, loss, gradient = state.scale.value_and_grad(loss_of)(state.params)
        metrics = Metrics(loss, optax.tree.norm(gradient), schedule(state.optimizer.gradient_step))
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        average = moving_average(settings, state.average, params, optimizer_state)
        # An overflow of float16 leaves everything as it was but the scale.
        params, average, optimizer_state = jax.tree.map(
            lambda new, old: jnp.where(kept, new, old),
            (params, average, optimizer_state),
            (state.params, state.average, state.optimizer),
        )
        return State(state.step + 1, params, average, optimizer_state, scale), metrics

    return step


def moving_average(settings: Settings, average: Params, params: Params, state: optax.MultiStepsState) -> Params:
    """After each update, ``decay * average + (1 - decay) * params``; the decay grows from 2/11 to ``ema``."""
    count = state.gradient_step.astype(jnp.float32)
    decay = jnp.minimum(settings.ema, (1 + count) / (10 + count))
    weight = jnp.where(state.mini_step == 0, 1 - decay, 0.0)  # accumulating, nothing moves
    return optax.incremental_update(params, average, weight)
