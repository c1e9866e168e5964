"""The demo's training step: precision, accumulation, clipping, schedule, average, patches and their augmentation."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("nibabel")

from examples.brain_segmentation import train
from examples.brain_segmentation.inference import gaussian, sliding_window, starts
from examples.brain_segmentation.model import UNet
from examples.brain_segmentation.patches import augment
from examples.brain_segmentation.settings import Settings

pytestmark = [pytest.mark.lenient, pytest.mark.usefixtures("quick_compiles")]  # optax and Flax promote implicitly

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(6, 2, 4, 4, 4, 1)).astype(np.float32)
LABELS = RNG.integers(0, 3, (6, 2, 4, 4, 4)).astype(np.int32)
PLAIN = Settings(data="", steps=10, patch=4, batch=2, augment=False, learning_rate=0.1, ema=0.5)


class Voxelwise(nn.Module):
    """A network that compiles at once."""

    dtype: jnp.dtype = jnp.float32
    gain: float = 1.0

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(4, dtype=self.dtype)(x.astype(self.dtype))) * jnp.asarray(self.gain, self.dtype)
        return nn.Dense(3, dtype=jnp.float32)(x)


def run(
    settings: Settings, model: nn.Module | None = None, batches=range(6)
) -> list[tuple[train.State, train.Metrics]]:
    """The states after each batch, the initial one first."""
    model = model or Voxelwise(jnp.dtype(settings.precision))
    step = jax.jit(train.make_step(model, settings))
    done = [(train.initial_state(model, settings), None)]
    for i in batches:
        done.append(step(done[-1][0], IMAGES[i], LABELS[i]))
    return done


def gradient(params, i: int):
    return jax.grad(lambda p: train.loss_function(Voxelwise().apply({"params": p}, IMAGES[i]), LABELS[i]))(params)


def close(a, b, rtol=1e-5, atol=1e-6) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def test_a_step_is_adamw_on_the_clipped_gradient() -> None:
    settings = dataclasses.replace(PLAIN, clip=0.01)
    done = run(settings)
    params = done[0][0].params
    adam = optax.adamw(train.learning_rate(settings), weight_decay=train.WEIGHT_DECAY)
    state = adam.init(params)
    for i in range(6):
        g = gradient(params, i)
        norm = float(optax.tree.norm(g))
        assert done[i + 1][1].gradient_norm == pytest.approx(norm, rel=1e-4)
        assert norm > settings.clip
        updates, state = adam.update(jax.tree.map(lambda x, n=norm: x * 0.01 / n, g), state, params)
        params = optax.apply_updates(params, updates)
        close(done[i + 1][0].params, params, 1e-4, 1e-5)


def test_accumulation_updates_once_with_the_mean_gradient() -> None:
    settings = dataclasses.replace(PLAIN, accumulate=3, clip=1e9)
    done = run(settings)
    params = done[0][0].params
    adam = optax.adamw(train.learning_rate(settings), weight_decay=train.WEIGHT_DECAY)
    state = adam.init(params)
    for first in (0, 3):
        for i in (first, first + 1):  # meanwhile nothing moves
            close(done[i + 1][0].params, params, 0, 0)
            close(done[i + 1][0].average, done[first][0].average, 0, 0)
        mean = jax.tree.map(lambda *g: sum(g) / 3, *(gradient(params, first + k) for k in range(3)))
        updates, state = adam.update(mean, state, params)
        params = optax.apply_updates(params, updates)
        close(done[first + 3][0].params, params, 1e-4, 1e-5)
    assert not np.array_equal(done[6][0].average["Dense_0"]["kernel"], done[3][0].average["Dense_0"]["kernel"])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_average_follows_its_formula(accumulate) -> None:
    done = run(dataclasses.replace(PLAIN, accumulate=accumulate))
    average = done[0][0].params
    for count, i in enumerate(range(accumulate, 7, accumulate), 1):
        decay = min(0.5, (1 + count) / (10 + count))
        average = jax.tree.map(lambda a, p, d=decay: d * a + (1 - d) * p, average, done[i][0].params)
        close(done[i][0].average, average)


def test_the_average_with_decay_0_is_the_parameters() -> None:
    state = run(dataclasses.replace(PLAIN, ema=0.0))[-1][0]
    close(state.average, state.params, 0, 0)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedules_warm_up_and_end_where_they_should(schedule) -> None:
    rate = train.learning_rate(dataclasses.replace(PLAIN, steps=200, accumulate=2, schedule=schedule))
    values = [float(rate(i)) for i in range(101)]
    assert values[0] == 0
    assert values[10] == max(values) == pytest.approx(0.1)
    assert values[5] == pytest.approx(0.05)
    end, middle = {"cosine": (0, 0.05), "linear": (0, 0.05), "constant": (0.1, 0.1)}[schedule]
    assert values[100] == pytest.approx(end, abs=1e-6)
    assert values[55] == pytest.approx(middle)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_parameters_stay_in_float32_whatever_computes(precision) -> None:
    settings = dataclasses.replace(PLAIN, precision=precision)
    model = train.make_model(3, dataclasses.replace(settings, features=2))
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 8, 1)))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(variables)} == {"float32"}
    text = jax.jit(model.apply).lower(variables, jnp.zeros((1, 8, 8, 8, 1))).as_text("hlo")
    kind = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[precision]
    assert f"{kind}[1,8,8,8,2]" in text.replace("{4,3,2,1,0}", "")
    state = run(settings)[-1][0]
    assert {leaf.dtype.name for leaf in jax.tree.leaves((state.params, state.average))} == {"float32"}
    full = run(PLAIN)[-1][0]
    close(state.params, full.params, 0.2, 0.05)


def test_an_overflow_of_float16_is_skipped_and_lowers_the_scale() -> None:
    settings = dataclasses.replace(PLAIN, precision="float16")
    done = run(settings, Voxelwise(jnp.float16, gain=30.0))  # the gradients behind it overflow at first
    scales = [float(state.scale.scale) for state, _ in done]
    assert scales[0] == 2**16
    skipped = [i for i in range(6) if scales[i + 1] < scales[i]]
    assert skipped
    assert skipped != list(range(6))
    for i in range(6):
        before, after = done[i][0], done[i + 1][0]
        same = jax.tree.all(
            jax.tree.map(np.array_equal, (before.params, before.optimizer), (after.params, after.optimizer))
        )
        assert same == (i in skipped)
        assert np.isfinite(done[i + 1][1].loss)
        assert np.isfinite(done[i + 1][1].gradient_norm) == (i not in skipped)


def test_augmentation_mirrors_images_and_labels_alike() -> None:
    labels = RNG.integers(0, 5, (16, 4, 4, 4)).astype(np.int32)
    images = (labels * 1.0)[..., None].astype(np.float32)
    new_images, new_labels = augment(jax.random.key(3), images, labels)
    assert new_images.shape == images.shape
    assert new_images.dtype == np.float32
    mirrored = [np.array_equal(new, old[::-1]) for new, old in zip(new_labels, labels, strict=True)]
    kept = [np.array_equal(new, old) for new, old in zip(new_labels, labels, strict=True)]
    assert all(a != b for a, b in zip(mirrored, kept, strict=True))
    assert 0 < sum(mirrored) < 16
    for new, label in zip(new_images, np.asarray(new_labels), strict=True):  # brighter where the label is higher, still
        means = [float(new[label == value].mean()) for value in range(5)]
        assert means == sorted(means)
        assert abs(means[1] - 1) < 0.4
        assert 0.02 < float(new[label == 0].std()) < 0.1


def test_augmentation_is_a_function_of_the_key() -> None:
    same, again, other = (augment(jax.random.key(k), IMAGES[0], LABELS[0])[0] for k in (1, 1, 2))
    np.testing.assert_array_equal(same, again)
    assert not np.array_equal(same, other)
    assert not np.array_equal(same[0], same[1])
    done, again = (run(dataclasses.replace(PLAIN, augment=True), batches=[0, 0]) for _ in range(2))
    assert float(done[1][1].loss) == float(again[1][1].loss)
    assert float(done[1][1].loss) != float(done[2][1].loss)  # the first update is at rate 0: only the step differs
    still = run(PLAIN, batches=[0, 0])
    assert float(still[1][1].loss) == float(still[2][1].loss)
    assert not np.array_equal(done[1][1].gradient_norm, run(PLAIN, batches=[0])[1][1].gradient_norm)


def test_the_same_network_by_each_upsampling() -> None:
    x = jnp.zeros((1, 8, 8, 8, 1))
    shapes = {}
    for upsampling in ("transposed", "trilinear", "flax"):
        variables = jax.eval_shape(UNet(3, 2, upsampling).init, jax.random.key(0), x)
        shapes[upsampling] = sorted(leaf.size for leaf in jax.tree.leaves(variables))
        assert jax.eval_shape(UNet(3, 2, upsampling).apply, variables, x).shape == (1, 8, 8, 8, 3)
    assert shapes["transposed"] == shapes["flax"]
    assert sum(shapes["trilinear"]) < sum(shapes["transposed"])


def test_windows_do_not_show_in_what_is_local() -> None:
    image = RNG.normal(size=(19, 40, 7)).astype(np.float32)
    seen = []

    def predict(windows):
        seen.append(windows.shape)
        return np.stack([windows, -2 * windows], -1)

    got = sliding_window(predict, image, window=16)
    np.testing.assert_allclose(got, np.stack([image, -2 * image], -1), rtol=1e-5, atol=1e-6)
    assert set(seen) == {(1, 16, 16, 16)}
    assert len(seen) == 2 * 4 * 1


def test_the_middle_of_a_window_outweighs_its_border() -> None:
    """Two windows that disagree: half and half where they meet, each nearly alone in its middle."""
    numbers = iter([0.0, 1.0])
    got = sliding_window(
        lambda w: np.full((*w.shape, 1), next(numbers), np.float32), np.zeros((24, 16, 16), np.float32), 16
    )
    line = got[:, 8, 8, 0]
    assert (np.diff(line) >= 0).all()
    np.testing.assert_allclose(line + line[::-1], 1, atol=1e-6)
    assert line[8] < 0.03
    weight = gaussian(16)
    assert weight.min() > 0
    np.testing.assert_array_equal(weight, weight[::-1].transpose(2, 1, 0))


@given(st.integers(1, 300), st.integers(1, 80), st.floats(0, 0.95))
def test_windows_cover_an_axis_and_overlap_as_asked(extra, window, overlap) -> None:
    size = window + extra - 1
    first = starts(size, window, overlap)
    assert first[0] == 0
    assert first[-1] == size - window
    steps = np.diff(first)
    assert (steps > 0).all()
    assert (steps <= max(1, np.ceil(window * (1 - overlap)))).all()
