"""Keras's weights, both ways: live layers and models, `.keras`, `.weights.h5` and `.h5`, also damaged and hostile ones."""

import contextlib
import io
import json
import pathlib
import zipfile

import h5py
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

import conv3dt_jax as c3t
from conv3dt_jax import interop
from tests.helpers import label

pytestmark = [
    pytest.mark.lenient,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # Keras's own, in save
]

X = np.random.default_rng(0).normal(size=(2, 4, 4, 4, 3)).astype(np.float32)
LAYERS = ["c1", "up_a", "up_b"]


def model(seed=0):
    """Two transposed convolutions, one of them in a model of its own, a convolution, and layers of other kinds."""
    keras.utils.set_random_seed(seed)
    inner = keras.Sequential(
        [
            keras.Input((8, 8, 8, 4)),
            keras.layers.Conv3DTranspose(2, 2, 2, use_bias=False, activation="tanh", name="up_b"),
        ],
        name="inner",
    )
    inputs = keras.Input(X.shape[1:])
    x = keras.layers.Conv3D(5, 3, padding="same", bias_initializer="normal", name="c1")(inputs)
    x = keras.layers.BatchNormalization(name="norm")(x)
    x = keras.layers.Conv3DTranspose(4, 3, strides=2, padding="same", bias_initializer="normal", name="up_a")(x)
    x = inner(x)
    return keras.Model(inputs, keras.layers.Dense(3, name="dense")(x))


def values(keras_model):
    own = {layer.name: layer for layer in keras_model.layers} | {
        layer.name: layer for layer in keras_model.get_layer("inner").layers
    }
    return {name: dict(zip(("kernel", "bias"), own[name].get_weights(), strict=False)) for name in LAYERS}


def save(keras_model, folder: pathlib.Path, kind: str) -> pathlib.Path:
    path = folder / f"model{kind}"
    if kind == "_weights.h5":  # the legacy form of weights alone
        with h5py.File(path, "w") as file:
            keras.src.legacy.saving.legacy_h5_format.save_weights_to_hdf5_group(file, keras_model)
    elif kind == ".weights.h5":
        keras_model.save_weights(path)
    else:
        keras_model.save(path)
    return path


KINDS = [".keras", ".weights.h5", ".h5", "_weights.h5"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, original = tmp_path_factory.mktemp("keras"), model()
    original.compile("adam", "mse")
    original.train_on_batch(X, np.zeros((2, 16, 16, 16, 3), np.float32))  # the optimizer has slots of the same shapes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("absl.logging.warning", lambda *args: None)
        return original, {kind: save(original, folder, kind) for kind in KINDS}


def assert_equal(got, want) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


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
    with pytest.raises(ValueError, match=r"2 transposed 3-D convolutions: .*name one"):
        interop.layer_from_keras(source)
    with pytest.raises(ValueError, match="has no layer 'c1'"):
        interop.layer_from_keras(source, "c1")


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
    with pytest.raises(ValueError, match="a Keras Conv3DTranspose is wanted, not a Conv3D"):
        interop.layer_from_keras(keras.layers.Conv3D(2, 3))


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": np.ones((3, 3, 3, 4, 4), "f4")}, r"kernel \(3, 3, 3, 4, 5\) float32, but the parameters are"),
        ({"kernel": np.ones((3, 3, 3, 4, 5), "f8")}, r"float64; nothing was changed"),
        ({"bias": None}, "nothing was changed"),
        ({"bias": np.ones((1, 4), "f4")}, r"it must be \(filters,\)"),
        ({"kernel": np.ones((3, 3, 4, 5), "f4")}, r"it must be \(kd, kh, kw"),
        ({"scale": np.ones(4, "f4")}, "'kernel' and 'bias', not"),
    ],
    ids=label,
)
def test_what_does_not_fit_changes_nothing(files, kind, change, message, tmp_path) -> None:
    path = tmp_path / files[1][kind].name
    path.write_bytes(files[1][kind].read_bytes())
    new = {name: jax.tree.map(lambda a: a * 2, parts) for name, parts in values(files[0]).items()}
    new["up_a"] = {**new["up_a"], **change}
    for target in (path, files[0]):
        before = values(files[0])
        with pytest.raises(ValueError, match=message):
            interop.to_keras(new, target)
        assert_equal(values(files[0]), before)
    assert path.read_bytes() == files[1][kind].read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_and_overwritten_files_are_value_errors(files, kind, tmp_path) -> None:
    data = files[1][kind].read_bytes()
    path = tmp_path / files[1][kind].name
    for broken in (b"", b"PK\x03\x04", b"not a file of weights", data[:100], data[: len(data) // 2], data[:-30]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=path.name.replace(".", r"\.")):
            interop.from_keras(path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        interop.from_keras(tmp_path / "nowhere.keras")


def legacy(path: pathlib.Path, groups: dict[str, dict[str, np.ndarray]], config=None) -> pathlib.Path:
    """A file as Keras 2 wrote it: names in bytes, weights by their whole names."""
    with h5py.File(path, "w") as file:
        file.attrs["keras_version"], file.attrs["backend"] = b"2.4.0", b"tensorflow"
        if config is not None:
            file.attrs["model_config"] = json.dumps(config).encode()
        top = file.create_group("model_weights")
        top.attrs["layer_names"] = [name.encode() for name in groups]
        for name, weights in groups.items():
            group = top.create_group(name)
            group.attrs["weight_names"] = [weight.encode() for weight in weights]
            for weight, array in weights.items():
                group.create_dataset(weight, data=array)
    return path


def part(seed):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(2, 2, 2, 4, 3)).astype("f4"), rng.normal(size=4).astype("f4")


def test_files_of_keras_2(tmp_path) -> None:
    (k1, b1), (k2, b2), (k3, b3) = map(part, range(3))
    path = legacy(
        tmp_path / "old.h5",
        {
            "input_1": {}, "conv3d_transpose": {"conv3d_transpose/kernel:0": k1, "conv3d_transpose/bias:0": b1},
            "dec": {"unet/dec/b1/up/kernel:0": k2, "unet/dec/b1/up/bias:0": b2, "unet/dec/b2/up/bias:0": b3, "unet/dec/b2/up/kernel:0": k3},
        },
        {
            "class_name": "Functional",
            "config": {"name": "unet", "layers": [
                {"class_name": "InputLayer", "config": {"batch_input_shape": [None, 4, 4, 4, 3], "dtype": "float32", "name": "input_1"}},
                {"class_name": "Conv3DTranspose", "name": "conv3d_transpose", "inbound_nodes": [[["input_1", 0, 0, {}]]], "config": {
                    "name": "conv3d_transpose", "trainable": True, "dtype": "float32", "filters": 4, "kernel_size": [2, 2, 2],
                    "strides": [2, 2, 2], "padding": "valid", "data_format": "channels_last", "activation": "linear", "use_bias": True,
                    "kernel_initializer": {"class_name": "GlorotUniform", "config": {"seed": None}},
                    "bias_initializer": {"class_name": "Zeros", "config": {}}, "kernel_regularizer": None, "output_padding": None,
                }},
            ]},
        },
    )  # fmt: skip
    want = {name: {"kernel": k, "bias": b} for name, k, b in
            [("conv3d_transpose", k1, b1), ("dec/b1/up", k2, b2), ("dec/b2/up", k3, b3)]}  # fmt: skip
    assert_equal(interop.from_keras(path), want)
    layer = interop.layer_from_keras(path)
    assert layer.strides == (2, 2, 2)
    peer = keras.layers.Conv3DTranspose(4, 2, 2)
    peer.build((None, 4, 4, 4, 3))
    peer.set_weights([k1, b1])
    got = layer.apply({"params": interop.from_keras(path, "conv3d_transpose")}, X)
    np.testing.assert_allclose(got, peer(X), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="cannot be told apart"):
        interop.from_keras(legacy(tmp_path / "same.h5", {"x": {"p/x/kernel:0": k1, "q/x/kernel:0": k2}}))


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


def test_names_that_no_file_holds_are_refused(tmp_path) -> None:
    kernel, bias = part(0)
    with pytest.raises(ValueError, match="'q/r' is no name for a layer in a Keras file"):
        interop.to_keras({"q/r": {"kernel": kernel, "bias": bias}}, tmp_path / "new.h5")
    with pytest.raises(ValueError, match="there is no folder"):
        interop.to_keras({"q": {"kernel": kernel, "bias": bias}}, tmp_path / "none" / "new.h5")


def hostile(path: pathlib.Path, spoil) -> pathlib.Path:
    with h5py.File(path, "w") as file:
        group = file.create_group("layers/conv3d_transpose/vars")
        group.attrs["name"] = "up"
        spoil(group)
    return path


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda group: group.__setitem__("0", h5py.ExternalLink("/etc/passwd", "/")), "a link; that is refused"),
        (lambda group: group.__setitem__("0", h5py.SoftLink("/layers")), "a link; that is refused"),
        (lambda group: group.create_dataset("0", (2, 2, 2, 4, 3), "f4", external=[("/etc/passwd", 0, 400)]), "stored in other files"),
        (lambda group: group.create_dataset("0", (2**12, 2**12, 2**12, 4, 3), "f4", chunks=(1, 1, 1, 4, 3)), "claims .* bytes"),
        (lambda group: group.create_dataset("0", (2, 2, 2, 4, 3), "S4"), "no numbers"),
        (lambda group: group.create_group("0"), "is a Group where a Dataset is wanted"),
    ],
)  # fmt: skip
def test_hostile_files_are_refused(spoil, message, tmp_path) -> None:
    path = hostile(tmp_path / "bad.weights.h5", spoil)
    with pytest.raises(ValueError, match=message):
        interop.from_keras(path)
    archive = tmp_path / "bad.keras"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("config.json", "{}")
        file.write(path, "model.weights.h5")
    with pytest.raises(ValueError, match=message):
        interop.from_keras(archive)


def test_a_web_of_groups_is_refused(tmp_path) -> None:
    """Each level has two links to the next: walked as a tree it would not end."""
    with h5py.File(tmp_path / "web.weights.h5", "w") as file:
        group = file.create_group("layers")
        for _ in range(40):
            child = group.create_group("a")
            group["b"] = child
            group = child
    with pytest.raises(ValueError, match="is there twice"):
        interop.from_keras(tmp_path / "web.weights.h5")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_any_damaged_byte_of_an_archive_is_harmless_or_a_value_error(files, compression, tmp_path) -> None:
    path = tmp_path / "model.keras"
    with zipfile.ZipFile(files[1][".keras"]) as old, zipfile.ZipFile(path, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    data, rng = path.read_bytes(), np.random.default_rng(0)
    for place in rng.integers(0, len(data), 60):
        broken = bytearray(data)
        broken[place] ^= 0xFF
        path.write_bytes(broken)
        with contextlib.suppress(ValueError):
            interop.from_keras(path)


def test_archives_that_are_none(tmp_path) -> None:
    path = tmp_path / "odd.keras"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("config.json", "[1")
    with pytest.raises(ValueError, match=r"no \.keras archive"):
        interop.from_keras(path)
    with pytest.raises(ValueError, match="a config that is no JSON"):
        interop.layer_from_keras(path, "up")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("model.weights.h5", bytes(200 << 20))
    with pytest.raises(ValueError, match="claims 209715200 bytes"):
        interop.from_keras(path)


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


def test_without_h5py_the_error_says_what_to_install(files, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(ImportError, match=r"needs h5py, which is not installed: pip install 'conv3dt-jax\[keras\]'"):
        interop.from_keras(files[1][".keras"])


def test_reading_needs_no_keras(files) -> None:
    program = (
        "import sys; sys.modules['keras'] = None; from conv3dt_jax import interop; "
        f"print(sorted(interop.from_keras({str(files[1]['.keras'])!r})), 'torch' in sys.modules)"
    )
    done = __import__("subprocess").run(
        [__import__("sys").executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"{sorted(LAYERS)} False"


def test_metadata_of_the_archive_stays(files, tmp_path) -> None:
    path = tmp_path / "model.keras"
    path.write_bytes(files[1][".keras"].read_bytes())
    interop.to_keras(values(files[0])["up_a"], path, "up_a")
    with zipfile.ZipFile(path) as new, zipfile.ZipFile(files[1][".keras"]) as old:
        assert new.namelist() == old.namelist()
        assert json.loads(new.read("config.json")) == json.loads(old.read("config.json"))
        assert (
            h5py.File(io.BytesIO(new.read("model.weights.h5"))).keys()
            == h5py.File(io.BytesIO(old.read("model.weights.h5"))).keys()
        )
