"""Models of other frameworks are the same while `accelerated` lasts, and compute nothing on inserted zeros."""

import functools
import os
import threading

os.environ.setdefault("KERAS_BACKEND", "jax")

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import conv3dt_jax as c3t

pytestmark = [pytest.mark.lenient, pytest.mark.usefixtures("quick_compiles")]

DILATED = "lhs_dilate = [2"
ORIGINALS = (jax.lax.conv_transpose, jax.lax.conv_general_dilated)
X = jax.random.normal(jax.random.key(0), (2, 6, 5, 4))


@pytest.fixture(autouse=True)
def _restored():
    yield
    c3t.restore()
    assert (jax.lax.conv_transpose, jax.lax.conv_general_dilated) == ORIGINALS


def linen(**options):
    model = nn.Sequential(
        [nn.ConvTranspose(6, (3, 3), strides=(2, 2), **options), nn.relu, nn.ConvTranspose(3, (4, 4), strides=(2, 2))]
    )
    return lambda parameters: model.apply(parameters, X), model.init(jax.random.key(1), X)


def nnx_model():
    model = nnx.ConvTranspose(4, 3, (3, 3), strides=(2, 2), rngs=nnx.Rngs(0))
    definition, state = nnx.split(model)
    return lambda state: nnx.merge(definition, state)(X), state


def haiku():
    hk = pytest.importorskip("haiku")
    model = hk.without_apply_rng(hk.transform(lambda x: hk.Conv2DTranspose(3, 4, stride=2)(x)))
    return lambda parameters: model.apply(parameters, X), model.init(jax.random.key(1), X)


def haiku_volume():
    hk = pytest.importorskip("haiku")
    model = hk.without_apply_rng(hk.transform(lambda x: hk.Conv3DTranspose(3, 3, stride=2)(x)))
    x = X[:, :, :, None]
    return lambda parameters: model.apply(parameters, x), model.init(jax.random.key(1), x)


def equinox(**options):
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, key=jax.random.key(2), **options)
    parameters, static = eqx.partition(model, eqx.is_array)
    return lambda parameters: jax.vmap(eqx.combine(parameters, static))(jnp.moveaxis(X, -1, 1)), parameters


def keras(dims):
    keras = pytest.importorskip("keras")
    x = {1: X[:, :, 0], 2: X, 3: X[:, :, :, None]}[dims]
    layer = getattr(keras.layers, f"Conv{dims}DTranspose")(3, 3, strides=2, padding="same")
    layer.build(x.shape)
    parameters = [jnp.asarray(variable.value) for variable in layer.trainable_variables]
    return lambda parameters: layer.stateless_call(parameters, [], x)[0], parameters


MODELS = {
    "linen": linen,
    "linen circular": lambda: linen(padding="CIRCULAR"),
    "nnx": nnx_model,
    "haiku": haiku,
    "haiku 3-D": haiku_volume,
    "equinox": equinox,
    "equinox groups": lambda: equinox(groups=2),
    "keras 1-D": lambda: keras(1),
    "keras 2-D": lambda: keras(2),
    "keras 3-D": lambda: keras(3),
}


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_equal_and_no_zeros_are_inserted(name) -> None:
    run, parameters = MODELS[name]()

    @jax.jit
    def training(parameters):
        return run(parameters), jax.grad(lambda p: (run(p) ** 2).sum())(parameters)

    want = training(parameters)
    assert DILATED in training.lower(parameters).as_text()
    with c3t.accelerated() as found:
        got = training(parameters)
        assert DILATED not in training.lower(parameters).as_text()
    assert found.calls
    assert not any(call.left for call in found.calls)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())
    assert DILATED in training.lower(parameters).as_text()


def plain(x):
    return jax.lax.conv_transpose(x, jnp.ones((3, 3, 4, 2)), (2, 2), "SAME")


def is_fast(function=plain) -> bool:
    return DILATED not in jax.jit(function).lower(X).as_text()


def test_nesting_threads_and_exact_restoring() -> None:
    seen = []

    def look() -> None:
        seen.append(is_fast())

    with c3t.accelerated():
        with c3t.accelerated():
            assert is_fast()
        assert is_fast()
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        with pytest.raises(ZeroDivisionError), c3t.accelerated():
            raise ZeroDivisionError
        assert is_fast()
    assert seen == [False]
    assert not is_fast()
    assert (jax.lax.conv_transpose, jax.lax.conv_general_dilated) == ORIGINALS


def test_many_threads_at_once() -> None:
    wrong = []

    def work(fast: bool) -> None:
        for _ in range(20):
            if fast:
                with c3t.accelerated():
                    wrong.append(not is_fast())
            else:
                wrong.append(is_fast())

    threads = [threading.Thread(target=work, args=(i % 2 == 0,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 80
    assert not any(wrong)
    assert (jax.lax.conv_transpose, jax.lax.conv_general_dilated) == ORIGINALS


def test_as_a_decorator() -> None:
    decorated = c3t.accelerated()(is_fast)
    assert decorated()
    assert decorated()
    assert not is_fast()


def test_for_the_whole_process() -> None:
    found = c3t.accelerate()
    assert c3t.accelerate() is found
    seen = []
    thread = threading.Thread(target=lambda: seen.append(is_fast()))
    thread.start()
    thread.join()
    assert seen == [True]
    assert is_fast()
    with c3t.accelerated():
        pass
    assert is_fast()
    c3t.restore()
    assert not is_fast()
    c3t.restore()


def test_jit_keeps_both_programs_apart_and_traces_each_once() -> None:
    traces = []

    @jax.jit
    def run(x):
        traces.append(None)
        return plain(x)

    for _ in range(3):
        run(X)
        with c3t.accelerated():
            run(X)
    assert len(traces) == 2


def test_it_says_what_it_replaced_and_what_it_met(caplog) -> None:
    with c3t.accelerated() as found:
        plain(X)
        jax.lax.conv_transpose(X, jnp.ones((3, 3, 4, 2)), (1, 1), "valid")
        jax.lax.conv_general_dilated(jnp.ones((1, 4, 8, 8)), jnp.ones((2, 4, 3, 3)), (1, 1), "SAME")
    assert found.replaced == ("jax.lax.conv_transpose", "jax.lax.conv_general_dilated")
    assert [bool(call.left) for call in found.calls] == [False, True]
    text = str(found)
    assert "jax.lax.conv_transpose of (2, 6, 5, 4) and (3, 3, 4, 2): accelerated" in text
    assert "left to JAX, its padding 'valid' is not what it says" in text
    assert repr(found) == "<Acceleration: 1 calls accelerated, 1 left to JAX>"


@pytest.mark.parametrize(
    "call",
    [
        lambda f: f.conv_transpose(X, jnp.ones((3, 3, 4, 2)), (1, 1), "valid"),
        lambda f: f.conv_transpose(X[None], jnp.ones((1, 3, 3, 3, 4, 2))[0], (1, 2, 2), "SAME"),
        lambda f: f.conv_transpose(
            jnp.ones((1, 2, 2, 2, 2, 3)),
            jnp.ones((1, 1, 1, 1, 3, 2)),
            (2,) * 4,
            "SAME",
            dimension_numbers=jax.lax.ConvDimensionNumbers((0, 5, 1, 2, 3, 4), (5, 4, 0, 1, 2, 3), (0, 5, 1, 2, 3, 4)),
        ),
        lambda f: f.conv_general_dilated(
            X, jnp.ones((3, 3, 4, 2)), (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        lambda f: f.conv_general_dilated(
            X, jnp.ones((3, 3, 4, 2)), (2, 1), [(1, 1), (1, 1)], (2, 2), dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        lambda f: f.conv_general_dilated(
            X,
            jnp.ones((3, 3, 4, 2)),
            (1, 1),
            [(1, 1), (1, 1)],
            (2, 2),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            batch_group_count=2,
        ),
    ],
    ids=["lower case", "one more dimension", "four dimensions", "ordinary", "both strides", "batch groups"],
)
def test_what_it_cannot_take_goes_to_jax_unchanged(call) -> None:
    want = call(jax.lax)
    with c3t.accelerated():
        got = call(jax.lax)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_errors_are_jax_s() -> None:
    wrong = (X, jnp.ones((3, 3, 5, 2)), (2, 2), "SAME")
    with pytest.raises(Exception) as plain_error:
        jax.lax.conv_transpose(*wrong)
    with c3t.accelerated(), pytest.raises(type(plain_error.value)) as error:
        jax.lax.conv_transpose(*wrong)
    assert str(error.value) == str(plain_error.value)


def test_our_own_dilated_convolution_stays_jax_s() -> None:
    run = lambda: c3t.conv3d_transpose(
        X[:, None], jnp.ones((1, 3, 3, 2, 4)), strides=(1, 2, 2), implementation="dilated"
    )
    want = run()
    with c3t.accelerated() as found:
        np.testing.assert_array_equal(run(), want)
    assert not found.calls


def test_equal_calls_are_listed_once() -> None:
    found = c3t.accelerate()
    for _ in range(3):
        plain(X)
    assert len(found.calls) == 1


def test_padding_that_jax_refuses_is_refused() -> None:
    with c3t.accelerated():
        for padding in ([1, 1], [(1.5, 1), (1, 1)]):
            with pytest.raises((TypeError, ValueError)):
                jax.lax.conv_transpose(X, jnp.ones((3, 3, 4, 2)), (2, 2), padding)


def test_what_others_put_over_it_is_left() -> None:
    with c3t.accelerated():
        ours = jax.lax.conv_transpose

        @functools.wraps(ours)
        def mine(*args, **kwargs):
            return ours(*args, **kwargs)

        jax.lax.conv_transpose = mine
    try:
        assert jax.lax.conv_transpose is mine
    finally:
        jax.lax.conv_transpose = ORIGINALS[0]
