"""``python -m conv3dt_jax convert``: every pair of frameworks, what it prints, and what it refuses."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import serialization

from conv3dt_jax import __main__ as program
from conv3dt_jax import interop

keras = pytest.importorskip("keras")

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras's, in save
RNG = np.random.default_rng(0)


def layer(*shape, bias=True):
    kernel = RNG.normal(size=shape).astype(np.float32)
    return {"kernel": kernel, "bias": RNG.normal(size=shape[3]).astype(np.float32)} if bias else {"kernel": kernel}


MODEL = {"up_0": layer(2, 2, 2, 4, 3), "up_1": layer(3, 3, 3, 2, 4, bias=False)}


def assert_equal(got, want) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def read(path, of):
    if of == "keras":
        return interop.from_keras(path)
    if of == "pytorch":
        return interop.from_pytorch(path)
    if path.suffix == ".msgpack":
        return serialization.msgpack_restore(path.read_bytes())
    from safetensors.numpy import load_file

    tree = {}
    for name, array in load_file(path).items():
        owner, _, part = name.rpartition(".")
        tree.setdefault(owner, {})[part] = array
    return tree


FORMS = [("keras", "a.h5"), ("pytorch", "a.safetensors"), ("flax", "a.msgpack"), ("flax", "a.safetensors")]


@pytest.mark.parametrize(("before", "source"), FORMS, ids=str)
@pytest.mark.parametrize(("after", "target"), FORMS, ids=str)
def test_every_pair(before, source, after, target, tmp_path, capsys) -> None:
    start, source, target = tmp_path / "start.h5", tmp_path / source, tmp_path / f"new_{target}"
    interop.to_keras(MODEL, start)
    assert program.main(["convert", str(start), str(source), "--to", before, "--overwrite"]) == 0
    capsys.readouterr()
    assert program.main(["convert", str(source), str(target), "--to", after]) == 0
    printed = capsys.readouterr().out
    assert "up_0 -> up_0: kernel (2, 2, 2, 4, 3) float32, bias (4,) float32" in printed
    assert "2 layers of" in printed
    assert_equal(read(target, after), MODEL)


def test_layers_are_chosen_and_renamed(tmp_path) -> None:
    source, target = tmp_path / "a.safetensors", tmp_path / "b.msgpack"
    interop.to_pytorch({"decoder": MODEL}, source)
    assert program.main(["convert", str(source), str(target), "--layer", "decoder.up_1=head.up"]) == 0
    assert_equal(serialization.msgpack_restore(target.read_bytes()), {"head": {"up": MODEL["up_1"]}})
    variables = {"params": {"head": {"up": MODEL["up_1"]}}, "batch_stats": {"norm": {"mean": np.zeros(3)}}}
    target.write_bytes(serialization.msgpack_serialize(variables))
    assert program.main(["convert", str(target), str(source), "--to", "pytorch", "--overwrite"]) == 0
    assert_equal(interop.from_pytorch(source), {"head.up": MODEL["up_1"]})


def test_the_moments_of_an_optimizer_are_no_layers(tmp_path) -> None:
    source, target = tmp_path / "state.msgpack", tmp_path / "b.safetensors"
    state = {"step": 3, "params": MODEL, "opt_state": {"0": {"mu": MODEL, "nu": MODEL}}}
    source.write_bytes(serialization.msgpack_serialize(state))
    assert program.main(["convert", str(source), str(target), "--to", "pytorch"]) == 0
    assert_equal(interop.from_pytorch(target), MODEL)


def test_a_layer_within_a_layer_is_kept(tmp_path) -> None:
    paths = [tmp_path / name for name in ("a.safetensors", "b.msgpack", "c.safetensors")]
    both = {"a": MODEL["up_0"], "a.b": MODEL["up_1"]}
    interop.to_pytorch(both, paths[0])
    assert program.main(["convert", str(paths[0]), str(paths[1])]) == 0
    assert program.main(["convert", str(paths[1]), str(paths[2]), "--to", "pytorch"]) == 0
    assert_equal(interop.from_pytorch(paths[2]), both)


def test_a_template_makes_a_keras_archive(tmp_path) -> None:
    peer = keras.Sequential([keras.Input((4, 4, 4, 3)), keras.layers.Conv3DTranspose(4, 2, 2, name="up_0")])
    template, source, target = tmp_path / "t.keras", tmp_path / "a.safetensors", tmp_path / "b.keras"
    peer.save(template)
    interop.to_pytorch({"up_0": MODEL["up_0"]}, source)
    before = template.read_bytes()
    assert program.main(["convert", str(source), str(target), "--template", str(template)]) == 0
    assert template.read_bytes() == before
    np.testing.assert_array_equal(keras.saving.load_model(target).layers[0].get_weights()[0], MODEL["up_0"]["kernel"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.weights.h5", "b.keras"], "needs a template"),
        (["a.weights.h5", "b.onnx"], "must end in one of"),
        (["a.weights.h5", "b.safetensors"], "may be for PyTorch or for Flax"),
        (["a.weights.h5", "b.msgpack", "--to", "pytorch"], "is a file for flax, not for pytorch"),
        (["a.weights.h5", "a.weights.h5"], "is there already"),
        (["a.weights.h5", "b.msgpack", "--layer", "up_7"], "has no layer 'up_7'. Its layers"),
        (["a.weights.h5", "b.msgpack", "--template", "a.weights.h5"], "a template is for Keras"),
        (
            ["a.weights.h5", "b.msgpack", "--layer", "up_0=x", "--layer", "up_0=y"],
            "'up_0' would be converted or written twice",
        ),
        (["two.safetensors", "b.h5", "--layer", "a=x", "--layer", "a.b=x"], "'x' would be converted or written twice"),
        (["two.safetensors", "b.weights.h5"], "tells layers apart by their order"),
        (["clash.safetensors", "b.msgpack"], "rename that layer"),
        (["a.weights.h5", "c.h5", "--template", "a.weights.h5"], "must have the same ending"),
        (["two.safetensors", "c.weights.h5", "--template", "a.weights.h5"], "a.weights.h5 has no layer 'a"),
        (["two.safetensors", "nowhere/c.h5"], "there is no folder 'nowhere'"),
        (["none.keras", "b.msgpack"], "there is no file"),
        (["bad.msgpack", "b.weights.h5"], "is no Flax msgpack, or is damaged"),
        (["empty.msgpack", "b.weights.h5"], "no 3-D convolution to convert"),
    ],
)
def test_what_is_refused_writes_nothing(arguments, message, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    interop.to_keras({"up_0": MODEL["up_0"]}, "a.weights.h5")
    (tmp_path / "bad.msgpack").write_bytes(b"\xc1\xff")
    (tmp_path / "empty.msgpack").write_bytes(serialization.msgpack_serialize({"dense": {"kernel": np.ones((2, 3))}}))
    interop.to_pytorch({"a": MODEL["up_0"], "a.b": MODEL["up_1"]}, "two.safetensors")
    interop.to_pytorch({"a": MODEL["up_0"], "a.kernel": MODEL["up_1"]}, "clash.safetensors")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert program.main(["convert", *arguments]) == 1
    assert message in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_help_shows_the_formats_and_examples() -> None:
    run = lambda *words: subprocess.run(
        [sys.executable, "-m", "conv3dt_jax", *words], capture_output=True, text=True, check=False
    )
    done = run("convert", "--help")
    assert done.returncode == 0
    assert all(
        word in done.stdout for word in (".keras", ".safetensors", ".msgpack", "--layer", "examples:", "--template")
    )
    assert "convert" in run("--help").stdout
    assert run().returncode == 2
