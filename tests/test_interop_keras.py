"""Keras's weights, both ways: live layers and models, `.keras`, `.weights.h5` and `.h5`, also damaged and hostile ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import conv3dt_jax as c3t
from conv3dt_jax import interop
from tests.keras_models import KINDS, LAYERS, X, assert_equal, model, save, values

keras = pytest.importorskip("keras")

pytestmark = [
    pytest.mark.usefixtures("quick_compiles"),
    pytest.mark.lenient,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # Keras's own, in save
]


@pytest.mark.parametrize("kind", [*KINDS, "live"])
def test_every_source_gives_the_model_s_weights(files, kind) -> None:
    original, paths = files
    source = original if kind == "live" else paths[kind]
    want = values(original)
    assert_equal(interop.from_keras(source), want)
    for name in LAYERS:
        assert_equal(interop.from_keras(source, name), want[name])
    with pytest.raises(ValueError, match=r"has no layer 'up_c'. Its layers of 3-D convolutions:\n  .*\n.*\n"):
        interop.from_keras(source, "up_c")


@pytest.mark.parametrize("kind", [".keras", ".h5", "live"])
def test_the_layer_of_a_file_computes_what_keras_computes(files, kind) -> None:
    original, paths = files
    source = original if kind == "live" else paths[kind]
    peer = original.get_layer("inner").get_layer("up_b")
    layer = interop.layer_from_keras(source, "up_b")
    assert layer.activation == "tanh"
    x = np.random.default_rng(1).normal(size=(1, 3, 4, 5, 4)).astype(np.float32)
    got = layer.apply({"params": interop.from_keras(source, "up_b")}, x)
    np.testing.assert_allclose(got, peer(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"2 transposed 3-D convolutions among .*name one"):
        interop.layer_from_keras(source)
    ordinary, peer = interop.layer_from_keras(source, "c1"), original.get_layer("c1")
    assert type(ordinary) is c3t.Conv3D
    x = np.random.default_rng(1).normal(size=(1, 3, 4, 5, peer.kernel.shape[3])).astype(np.float32)
    got = ordinary.apply({"params": interop.from_keras(source, "c1")}, x)
    np.testing.assert_allclose(got, peer(x), rtol=1e-5, atol=1e-5)


def test_weights_without_a_config_say_so(files) -> None:
    for kind in (".weights.h5", "_weights.h5"):
        with pytest.raises(ValueError, match="holds weights without a config"):
            interop.layer_from_keras(files[1][kind], "up_a")


@pytest.mark.parametrize("kind", [*KINDS, "live"])
def test_weights_written_into_keras_are_what_it_loads(files, kind, tmp_path) -> None:
    other = model(seed=5)
    target = other if kind == "live" else save(other, tmp_path, kind)
    new = values(files[0])
    before = other.get_layer("dense").get_weights()
    interop.to_keras({name: new[name] for name in ("up_a", "c1")}, target)
    interop.to_keras(new["up_b"], target, "up_b")
    if kind == "live":
        loaded = target
    elif kind in (".keras", ".h5"):
        loaded = keras.saving.load_model(target)
    else:
        loaded = model(seed=6)
        loaded.load_weights(target)
    assert_equal(values(loaded), new)
    for mine, theirs in zip(loaded.get_layer("dense").get_weights(), before, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@keras.saving.register_keras_serializable("tests")
class Block(keras.layers.Layer):
    """A layer of a user's with a convolution in it."""

    def __init__(self, filters, **kwargs):
        super().__init__(**kwargs)
        self.filters = filters
        self.up = keras.layers.Conv3DTranspose(filters, 2, 2, name="up")

    def build(self, shape):
        self.up.build(shape)

    def call(self, x):
        return self.up(x)

    def get_config(self):
        return {**super().get_config(), "filters": self.filters}


class Mine(keras.layers.Conv3DTranspose):
    """A subclass of Keras's layer."""


def test_names_that_are_there_twice_become_paths_everywhere(tmp_path) -> None:
    def part(filters, channels, name):
        up = keras.layers.Conv3DTranspose(filters, 2, 2, name="up")
        return keras.Sequential([keras.Input((None, None, None, channels)), up], name=name)

    peer = keras.Sequential([keras.Input((2, 2, 2, 3)), part(4, 3, "a"), part(5, 4, "b")])
    peer(np.zeros((1, 2, 2, 2, 3), "f4"))
    want = {f"{name}/up": interop.from_keras(peer.get_layer(name), "up") for name in ("a", "b")}
    for source in (peer, *(save(peer, tmp_path, kind) for kind in KINDS)):
        assert_equal(interop.from_keras(source), want)
        if not str(source).endswith("weights.h5"):
            assert interop.layer_from_keras(source, "b/up").filters == 5
            with pytest.raises(ValueError, match=r"no layer 'up'.*\n  a/up: .*\n  b/up: "):
                interop.layer_from_keras(source, "up")


def test_convolutions_within_other_layers_are_found(tmp_path) -> None:
    wrapped = keras.layers.TimeDistributed(keras.layers.Conv3DTranspose(2, 2, name="inner"), name="each")
    peer = keras.Sequential([keras.Input((2, 2, 2, 3)), Block(4, name="block"), Mine(3, 1, name="mine")])
    peer.build((None, 2, 2, 2, 3))
    assert list(interop.from_keras(peer)) == ["up", "mine"]
    assert_equal(interop.from_keras(save(peer, tmp_path, ".keras")), interop.from_keras(peer))
    assert interop.layer_from_keras(peer, "mine").filters == 3
    assert interop.layer_from_keras(peer, "up").strides == (2, 2, 2)
    interop.to_keras(jax.tree.map(lambda a: a * 2, interop.from_keras(peer, "up")), peer, "up")
    other = keras.Sequential([keras.Input((5, 2, 2, 2, 3)), wrapped])
    assert list(interop.from_keras(other)) == ["inner"]
    with pytest.raises(ValueError, match="a Keras Conv3DTranspose or Conv3D is wanted, not a Conv2D"):
        interop.layer_from_keras(keras.layers.Conv2D(2, 3))


def test_several_layers_in_a_new_file_are_told_apart_by_name(tmp_path) -> None:
    names = ["up2", "up10"]
    peer = keras.Sequential(
        [keras.Input((4, 4, 4, 3)), *(keras.layers.Conv3DTranspose(3, 2, name=name) for name in names)]
    )
    params = jax.tree.map(lambda a: a * 1, {name: interop.from_keras(peer, name) for name in names})
    params = jax.tree.map(lambda a: a + np.random.default_rng(a.size).normal(), params)
    interop.to_keras(params, tmp_path / "new.h5")
    peer.load_weights(tmp_path / "new.h5", by_name=True)
    assert_equal(interop.from_keras(peer), params)
    assert_equal(interop.from_keras(tmp_path / "new.h5"), params)
    with pytest.raises(ValueError, match="tells layers apart by their order alone"):
        interop.to_keras(params, tmp_path / "new.weights.h5")
    assert [file.name for file in tmp_path.iterdir()] == ["new.h5"]


def test_a_new_weights_file_loads_into_keras(tmp_path) -> None:
    peer = keras.Sequential([keras.Input((4, 4, 4, 3)), keras.layers.Conv3DTranspose(4, 2, 2)])
    rng = np.random.default_rng(3)
    params = {
        "first": {"kernel": rng.normal(size=(2, 2, 2, 4, 3)).astype("f4"), "bias": rng.normal(size=4).astype("f4")}
    }
    path = tmp_path / "new.weights.h5"
    interop.to_keras(params, path)
    peer.load_weights(path)
    np.testing.assert_array_equal(peer.layers[0].get_weights()[0], params["first"]["kernel"])
    assert_equal(interop.from_keras(path), params)


@pytest.mark.parametrize(
    "arguments",
    [
        {"strides": 2, "padding": "same", "activation": "relu"},
        {"data_format": "channels_first", "use_bias": False, "kernel_regularizer": "l2", "name": "up"},
        {"dtype": "mixed_bfloat16", "trainable": False},
    ],
    ids=str,
)
def test_a_new_archive_of_one_layer_loads_into_keras(arguments, tmp_path) -> None:
    layer = c3t.Conv3DTranspose(4, (2, 3, 2), **arguments)
    x = np.moveaxis(X, -1, 1) if layer.data_format == "channels_first" else X
    want, variables = layer.init_with_output(jax.random.key(0), x)
    path = tmp_path / "one.keras"
    interop.to_keras(variables["params"], path, layer)
    loaded = keras.saving.load_model(path)
    got = loaded(x)
    assert keras.backend.standardize_dtype(got.dtype) == str(want.dtype)
    tolerance = 1e-5 if want.dtype == jnp.float32 else 0.02
    np.testing.assert_allclose(np.asarray(got, "f4"), np.asarray(want, "f4"), rtol=tolerance, atol=tolerance)
    assert loaded.layers[0].trainable == layer.trainable
    assert_equal(interop.from_keras(path, loaded.layers[0].name), dict(variables["params"]))
    assert interop.layer_from_keras(path).clone(name=layer.name).filters == 4
    with pytest.raises(ValueError, match=r"must be a new \.keras archive"):
        interop.to_keras(variables["params"], path, layer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"groups": 2}, "Keras's layer has no groups"), ({"padding": "circular"}, "no padding='circular'"), ({"filters": 6}, "the layer takes")],
)  # fmt: skip
def test_a_layer_that_keras_has_not_makes_no_archive(arguments, message, tmp_path) -> None:
    params = {"kernel": np.ones((2, 2, 2, 4, 3), "f4"), "bias": np.ones(4, "f4")}
    with pytest.raises(ValueError, match=message):
        interop.to_keras(
            params, tmp_path / "one.keras", c3t.Conv3DTranspose(**{"filters": 4, "kernel_size": 2, **arguments})
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        {"strides": (2, 1, 3), "padding": "same"}, {"strides": 2, "output_padding": (1, 0, 1)}, {"dilation_rate": (2, 1, 3)},
        {"strides": 2, "padding": "same", "output_padding": 1, "data_format": "channels_first"},
    ],
    ids=str,
)  # fmt: skip
def test_outputs_are_those_of_keras_in_float64(arguments, x64) -> None:
    peer = keras.layers.Conv3DTranspose(4, (3, 2, 3), **arguments, dtype="float64", bias_initializer="normal")
    x = np.random.default_rng(2).normal(size=(2, 3, 4, 3, 3))
    x = np.moveaxis(x, -1, 1) if peer.data_format == "channels_first" else x
    want = np.asarray(peer(x))
    layer, params = interop.layer_from_keras(peer), interop.from_keras(peer)
    np.testing.assert_allclose(layer.apply({"params": params}, x), want, rtol=1e-12, atol=1e-12)


def test_a_live_layer_both_ways_in_any_dtype() -> None:
    for dtype in ("float32", "bfloat16", "float16"):
        layer = keras.layers.Conv3DTranspose(4, 2, dtype=dtype, bias_initializer="normal")
        layer.build((None, 3, 3, 3, 3))
        params = interop.from_keras(layer)
        assert params["kernel"].dtype == dtype
        twin = keras.layers.Conv3DTranspose(4, 2, dtype=dtype)
        twin.build((None, 3, 3, 3, 3))
        interop.to_keras({"params": params}, twin)
        assert_equal(interop.from_keras(twin), params)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_in_files(kind, tmp_path) -> None:
    peer = keras.Sequential(
        [keras.Input((4, 4, 4, 3)), keras.layers.Conv3DTranspose(4, 2, 2, dtype="bfloat16", name="up")]
    )
    path = save(peer, tmp_path, kind)
    params = interop.from_keras(path, "up")
    assert params["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(params["kernel"], np.asarray(peer.layers[0].kernel.value))
    interop.to_keras(jax.tree.map(lambda a: a * 2, params), path, "up")
    assert_equal(interop.from_keras(path, "up"), jax.tree.map(lambda a: a * 2, params))


def test_a_name_that_is_not_that_of_the_layer_is_refused() -> None:
    layer = keras.layers.Conv3DTranspose(4, 2, name="up")
    layer.build((None, 3, 3, 3, 3))
    assert interop.from_keras(layer, "up")
    for call in (interop.from_keras, interop.layer_from_keras):
        with pytest.raises(ValueError, match="`layer='nope'` is not the name of the one layer that was given, 'up'"):
            call(layer, "nope")
    for params in (None, [1], {}):
        with pytest.raises(TypeError, match="`params` must be a dict"):
            interop.to_keras(params, layer)


def test_what_is_no_convolution_is_said() -> None:
    dense = keras.layers.Dense(3)
    dense.build((None, 4))
    with pytest.raises(ValueError, match="is no 3-D convolution"):
        interop.from_keras(dense)
    with pytest.raises(ValueError, match="has no weights yet"):
        interop.from_keras(keras.layers.Conv3DTranspose(4, 2))
    with pytest.raises(TypeError, match="must be a Keras layer or model, or the path"):
        interop.from_keras({"kernel": 1})
    with pytest.raises(ValueError, match="`layer` must name the layer"):
        interop.to_keras({"kernel": np.ones((2, 2, 2, 1, 1), "f4")}, model())


def test_reading_needs_no_keras(files) -> None:
    program = (
        "import sys; sys.modules['keras'] = None; from conv3dt_jax import interop; "
        f"print(sorted(interop.from_keras({str(files[1]['.keras'])!r})), 'torch' in sys.modules)"
    )
    done = __import__("subprocess").run(
        [__import__("sys").executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"{sorted(LAYERS)} False"
