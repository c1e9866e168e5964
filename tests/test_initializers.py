"""`Trilinear` and `ICNR`: what they promise of the layer's first outputs, and how they are named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import conv3dt_jax as c3t
from conv3dt_jax import initializers
from tests.helpers import label

pytestmark = pytest.mark.usefixtures("quick_compiles")

KEY = jax.random.key(0)
VOLUME = np.random.default_rng(0).normal(size=(1, 5, 6, 4, 2)).astype(np.float32)


@pytest.mark.parametrize(("kernel", "strides"), [(4, 2), (6, 2), (5, 3), (8, 4), ((4, 5, 3), (2, 3, 1)), (3, 1)])
def test_trilinear_is_linear_resizing_away_from_the_borders(kernel, strides) -> None:
    layer = c3t.Conv3DTranspose(2, kernel, strides=strides, padding="same", kernel_initializer="trilinear")
    got = layer.init_with_output(KEY, VOLUME)[0]
    want = jax.image.resize(VOLUME, got.shape, "linear", antialias=False)
    steps = layer.strides
    inside = (slice(None), *(slice(s, n - s) for s, n in zip(steps, got.shape[1:4], strict=True)))
    np.testing.assert_allclose(got[inside], want[inside], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kernel", "strides"), [(3, 2), (4, 2), (5, 2), (5, 3), (6, 3), (7, 4), ((3, 4, 5), (2, 2, 3))]
)
def test_trilinear_keeps_constants_and_ramps(kernel, strides) -> None:
    layer = c3t.Conv3DTranspose(1, kernel, strides=strides, kernel_initializer="trilinear")
    ones, variables = layer.init_with_output(KEY, jnp.ones((1, 6, 6, 6, 1)))
    inside = (slice(None), *(slice(k, -k) for k in layer.kernel_size))
    np.testing.assert_allclose(ones[inside], 1, rtol=1e-6)
    ramp = layer.apply(variables, jnp.broadcast_to(jnp.arange(6.0)[:, None], (1, 6, 6, 6, 1)))[inside]
    np.testing.assert_allclose(jnp.diff(ramp, axis=3), 1 / layer.strides[2], rtol=1e-4, atol=1e-5)


def test_trilinear_keeps_channels_and_groups_apart() -> None:
    x = np.random.default_rng(1).normal(size=(1, 4, 4, 4, 6)).astype(np.float32)
    results = []
    for groups in (1, 2, 3, 6):
        layer = c3t.Conv3DTranspose(6, 4, strides=2, groups=groups, kernel_initializer="trilinear")
        results.append(layer.init_with_output(KEY, x)[0])
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], rtol=1e-5, atol=1e-5)
    alone = c3t.Conv3DTranspose(1, 4, strides=2, kernel_initializer="trilinear")
    np.testing.assert_allclose(alone.init_with_output(KEY, x[..., 4:5])[0], results[0][..., 4:5], rtol=1e-5, atol=1e-5)


def checkerboard(layer, inputs):
    """Spread of the outputs over the phases of the stride, where the input is constant, against their size."""
    outputs = layer.init_with_output(KEY, inputs)[0]
    inside = outputs[(slice(None), *(slice(k, -k) for k in layer.kernel_size))]
    return float(inside.std((1, 2, 3)).max() / jnp.abs(inside).mean())


SIZES = [(2, 2), (4, 2), (3, 2), (5, 2), (3, 3), (5, 3), (7, 3), ((4, 3, 5), (2, 1, 4))]


INNER = ["glorot_uniform", "orthogonal", {"class_name": "HeNormal", "config": {"seed": 1}}]


@pytest.mark.thinned
@pytest.mark.parametrize(
    ("kernel", "strides", "inner"), [(*size, INNER[i % 3]) for i, size in enumerate(SIZES)], ids=label
)
def test_icnr_starts_without_a_checkerboard(kernel, strides, inner) -> None:
    constant = jnp.ones((1, 8, 8, 8, 3))
    named = {"class_name": "icnr", "config": {"inner": inner}}
    plain, icnr = (
        c3t.Conv3DTranspose(4, kernel, strides=strides, kernel_initializer=one) for one in (inner, named)
    )  # fmt: skip
    assert checkerboard(icnr, constant) < 1e-4
    assert checkerboard(plain, constant) > 0.1


@pytest.mark.parametrize(("kernel", "s"), [(2, 2), (4, 2), (6, 3)])
def test_icnr_is_a_small_convolution_and_nearest_neighbours(kernel, s) -> None:
    layer = c3t.Conv3DTranspose(4, kernel, strides=s, kernel_initializer=initializers.ICNR("he_normal"))
    outputs, variables = layer.init_with_output(KEY, VOLUME)
    kernel_of_one = variables["params"]["kernel"][::s, ::s, ::s]
    small = c3t.conv3d_transpose(VOLUME, kernel_of_one)
    repeated = small.repeat(s, 1).repeat(s, 2).repeat(s, 3)
    np.testing.assert_allclose(outputs, repeated, rtol=1e-5, atol=1e-5)
    drawn = initializers.get("kernel_initializer", "he_normal")
    key = jax.random.key(3)
    shape = (kernel, kernel, kernel, 4, 2)
    of_inner = drawn(key, (kernel // s,) * 3 + shape[3:], jnp.float32)
    np.testing.assert_array_equal(
        initializers.ICNR("he_normal", strides=s)(key, shape, jnp.float32)[::s, ::s, ::s], of_inner
    )


@pytest.mark.parametrize(
    "name", ["trilinear", "Trilinear", "icnr", "ICNR", initializers.ICNR, initializers.Trilinear()]
)
def test_by_name_class_or_object(name) -> None:
    spec = c3t.Conv3DTransposeSpec(filters=2, kernel_size=4, strides=2)
    params = c3t.init(KEY, spec, 2, kernel_initializer=name)
    layer = c3t.Conv3DTranspose(2, 4, strides=2, kernel_initializer=name)
    assert params["kernel"].shape == layer.init(KEY, VOLUME)["params"]["kernel"].shape
    assert hash(layer) == hash(layer.clone())


@pytest.mark.lenient
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "complex64"])
def test_parameter_dtypes(dtype) -> None:
    for name in ("trilinear", "icnr"):
        layer = c3t.Conv3DTranspose(2, 4, strides=2, kernel_initializer=name, param_dtype=dtype)
        assert layer.init(KEY, VOLUME)["params"]["kernel"].dtype == dtype


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"filters": 3, "kernel_size": 4, "kernel_initializer": "trilinear"},
            "as many filters as channels: 3 filters, 2",
        ),
        (
            {"kernel_size": 2, "kernel_initializer": "trilinear"},
            "a kernel of 2 is too small to interpolate at stride 2",
        ),
        ({"kernel_size": (3, 3, 1), "kernel_initializer": "icnr"}, "along width it is 1 for a stride of 2"),
    ],
)
def test_what_cannot_be_made_is_said(arguments, message) -> None:
    layer = c3t.Conv3DTranspose(**{"filters": 2, "strides": 2, **arguments})
    with pytest.raises(ValueError, match=message):
        layer.init(KEY, VOLUME)


def test_what_is_refused_at_construction() -> None:
    with pytest.raises(ValueError, match=r"`ICNR\.inner='he'` is not a name that Keras knows"):
        initializers.ICNR("he")
    with pytest.raises(ValueError, match="does not fit 'icnr'"):
        c3t.Conv3DTranspose(2, 4, kernel_initializer={"class_name": "icnr", "config": {"scale": 2}})
    with pytest.raises(ValueError, match=r"`Trilinear\.strides=0` must be at least 1"):
        initializers.Trilinear(strides=0)
    with pytest.raises(ValueError, match="needs the strides of the layer"):
        initializers.Trilinear()(KEY, (4, 4, 4, 1, 1), jnp.float32)
    for name in ("icnr", "trilinear"):
        with pytest.raises(ValueError, match=f"`bias_initializer='{name}'` makes kernels alone"):
            c3t.Conv3DTranspose(2, 4, bias_initializer=name)
    with pytest.raises(ValueError, match="makes kernels"):
        initializers.ICNR(strides=2)(KEY, (4,), jnp.float32)
    with pytest.raises(ValueError, match="did you mean 'trilinear'"):
        c3t.Conv3DTranspose(2, 4, kernel_initializer="trilinaer")


def test_a_seed_in_a_config_is_that_of_keras() -> None:
    keras = pytest.importorskip("keras")
    generator = keras.initializers.HeNormal(seed=7)
    config = keras.saving.serialize_keras_object(generator)
    config["config"]["seed"] = {"class_name": "SeedGenerator", "module": "keras.random", "config": {"seed": 7}}
    drawn = initializers.get("kernel_initializer", config)(KEY, (2, 2, 2, 3, 4), jnp.float32)
    np.testing.assert_allclose(drawn, np.asarray(generator((2, 2, 2, 3, 4))), rtol=1e-5, atol=1e-6)
