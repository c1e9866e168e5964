"""Keras's files that do not fit, are old, damaged or hostile: a clear error, and nothing changed."""

import contextlib
import io
import json
import pathlib
import zipfile

import jax
import numpy as np
import pytest

from conv3dt_jax import interop
from tests.helpers import label
from tests.keras_models import KINDS, X, assert_equal, values

h5py = pytest.importorskip("h5py")
keras = pytest.importorskip("keras")

pytestmark = [
    pytest.mark.usefixtures("quick_compiles"),
    pytest.mark.lenient,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # Keras's own, in save
]


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


def test_without_h5py_the_error_says_what_to_install(files, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(ImportError, match=r"needs h5py, which is not installed: pip install 'conv3dt-jax\[keras\]'"):
        interop.from_keras(files[1][".keras"])


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
