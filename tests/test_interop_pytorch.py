"""PyTorch's weights, both ways; without PyTorch what needs none of it: arrays and safetensors."""

import itertools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import conv3dt_jax as c3t
from conv3dt_jax import interop

RNG = np.random.default_rng(0)
PARAMS = {"kernel": RNG.normal(size=(2, 3, 4, 6, 3)).astype("f4"), "bias": RNG.normal(size=6).astype("f4")}


def assert_equal(got, want) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert jax.tree.map(lambda a: str(a.dtype), got) == jax.tree.map(lambda a: str(a.dtype), want)


def test_a_state_dict_of_arrays() -> None:
    weight = PARAMS["kernel"].transpose(4, 3, 0, 1, 2)
    assert_equal(interop.from_pytorch({"weight": weight, "bias": PARAMS["bias"]}), PARAMS)
    state = {"a.up.weight": weight, "a.up.bias": PARAMS["bias"], "b.weight": weight, "norm.weight": PARAMS["bias"]}
    assert_equal(interop.from_pytorch(state, "a.up"), PARAMS)
    assert_equal(interop.from_pytorch(state), {"a.up": PARAMS, "b": {"kernel": PARAMS["kernel"]}})
    with pytest.raises(
        ValueError, match=r"no layer 'c'. Its layers of 3-D convolutions:\n  a.up: kernel .*\n  b: kernel"
    ):
        interop.from_pytorch(state, "c")
    with pytest.raises(ValueError, match=r"no weight of a 3-D convolution.*among: norm.weight"):
        interop.from_pytorch({"norm.weight": PARAMS["bias"]})
    with pytest.raises(TypeError, match="must be a torch module, a state_dict or the path"):
        interop.from_pytorch(3)
    with pytest.raises(TypeError, match="64-bit types switched off"):
        interop.from_pytorch({"weight": weight.astype(np.float64)})


@pytest.mark.parametrize(
    "bias", [np.ones(7, "f4"), np.ones((2, 3), "f4"), np.ones(0, "f4")], ids=lambda b: str(b.shape)
)
def test_a_bias_that_does_not_fit_the_kernel_is_refused(bias) -> None:
    with pytest.raises(ValueError, match=r"it must be \(filters,\)"):
        interop.from_pytorch({"weight": PARAMS["kernel"].transpose(4, 3, 0, 1, 2), "bias": bias})
    for call in (interop.to_pytorch, interop.to_haiku):
        with pytest.raises(ValueError, match=r"it must be \(filters,\)"):
            call({**PARAMS, "bias": bias})


@pytest.mark.parametrize(
    "call",
    [
        interop.spec_from_pytorch,
        interop.spec_from_equinox,
        interop.spec_from_haiku,
        interop.from_equinox,
        interop.spec_from_flax,
    ],
)
@pytest.mark.parametrize("what", [3, "x.pt", object()], ids=["int", "str", "object"])
def test_what_is_no_layer_is_a_type_error(call, what) -> None:
    with pytest.raises(TypeError, match="`module` must be a"):
        call(what)


@pytest.mark.parametrize("key", ["parametrizations.weight.original1", "weight_v", "weight_orig"])
def test_weights_that_are_computed_from_others_are_named(key) -> None:
    weight = PARAMS["kernel"].transpose(4, 3, 0, 1, 2)
    state = {"a.weight": weight, f"b.{key}": weight}
    with pytest.raises(ValueError, match="the weight of 'b' is computed from others"):
        interop.from_pytorch(state)
    with pytest.raises(ValueError, match="computed from others"):
        interop.from_pytorch(state, "b")
    assert_equal(interop.from_pytorch(state, "a"), {"kernel": PARAMS["kernel"]})
    with pytest.raises(ValueError, match="the weight of 'the layer' is computed"):
        interop.from_pytorch({key: weight})


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_safetensors_round_trip_bit_exact(dtype, tmp_path) -> None:
    params = jax.tree.map(lambda a: jnp.asarray(a, dtype), PARAMS)
    path = tmp_path / "model.safetensors"
    model = {"decoder": {"up": params, "out": {"kernel": params["kernel"]}}}
    written = interop.to_pytorch(model, path)
    assert sorted(written) == ["decoder.out.weight", "decoder.up.bias", "decoder.up.weight"]
    assert_equal(interop.from_pytorch(path), {"decoder.up": params, "decoder.out": {"kernel": params["kernel"]}})
    assert_equal(interop.from_pytorch(path, "decoder.up"), params)


def test_damaged_safetensors_are_value_errors(tmp_path) -> None:
    path = tmp_path / "model.safetensors"
    interop.to_pytorch(PARAMS, path)
    data = path.read_bytes()
    for broken in (b"", b"nonsense", data[:50], data[:-8], b"\xff" * 64 + data):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"model\.safetensors is no safetensors file, or is damaged"):
            interop.from_pytorch(path)
    with pytest.raises(ValueError, match=r"must end in \.safetensors, \.pt or \.pth"):
        interop.to_pytorch(PARAMS, tmp_path / "model.bin")
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_missing_package_says_what_to_install(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    monkeypatch.setitem(__import__("sys").modules, "safetensors.numpy", None)
    (tmp_path / "model.pt").write_bytes(b"")
    with pytest.raises(ImportError, match=r"torch, which is not installed: pip install 'conv3dt-jax\[pytorch\]'"):
        interop.from_pytorch(tmp_path / "model.pt")
    with pytest.raises(ImportError, match=r"pip install 'conv3dt-jax\[safetensors\]'"):
        interop.to_pytorch(PARAMS, tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "params", [[1], {"kernel": PARAMS["kernel"][0]}, {"kernel": "a"}, {"up": {}}, {}, {"kernel": None}], ids=str
)
def test_parameters_that_are_none(params) -> None:
    with pytest.raises((ValueError, TypeError), match=r"params|kernel|up"):
        interop.to_pytorch(params)


CASES = [
    dict(zip(("kernel_size", "stride", "padding", "output_padding", "groups", "dilation", "bias"), case, strict=True))
    for case in itertools.product(
        [(2, 3, 4), (3, 1, 3)], [1, (2, 3, 2)], [0, (0, 0, 1)], [0, (1, 0, 1)], [1, 2], [1, (2, 1, 2)], [True, False]
    )
    if all(
        a < max(s, d)
        for a, s, d in zip(*(v if isinstance(v, tuple) else (v,) * 3 for v in (case[3], case[1], case[5])), strict=True)
    )
]


@pytest.mark.parametrize("case", CASES[::3], ids=lambda case: "-".join(map(str, case.values())))
def test_outputs_are_those_of_pytorch_in_float64(case, x64) -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    module = torch.nn.ConvTranspose3d(4, 6, **case, dtype=torch.float64)
    x = RNG.normal(size=(2, 4, 3, 4, 5))
    spec, params = interop.spec_from_pytorch(module), interop.from_pytorch(module)
    want = module(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(c3t.apply(params, x, spec), want, rtol=1e-12, atol=1e-12)
    back = interop.to_pytorch(params)
    assert all((back[name] == value).all() for name, value in module.state_dict().items())
    twin = torch.nn.ConvTranspose3d(4, 6, **case, dtype=torch.float64)
    interop.to_pytorch(params, twin)
    assert (twin(torch.from_numpy(x)).detach().numpy() == want).all()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_pt_files_round_trip_bit_exact(dtype, tmp_path) -> None:
    torch = pytest.importorskip("torch")
    params = jax.tree.map(lambda a: jnp.asarray(a, dtype), PARAMS)
    path = tmp_path / "model.pt"
    interop.to_pytorch(params, path, layer="up")
    assert torch.load(path, weights_only=True)["up.weight"].dtype == getattr(torch, dtype)
    assert_equal(interop.from_pytorch(path, "up"), params)
    torch.save({"epoch": 3, "state_dict": torch.load(path, weights_only=True)}, path)
    assert_equal(interop.from_pytorch(path), {"up": params})


class Harm:
    def __reduce__(self):
        return (exec, ("raise SystemExit('the pickle ran code')",))


def test_pickles_that_run_code_and_damaged_ones_are_refused(tmp_path) -> None:
    torch = pytest.importorskip("torch")
    path = tmp_path / "model.pt"
    torch.save({"weight": Harm()}, path)
    with pytest.raises(ValueError, match="its pickle would run code, and is refused"):
        interop.from_pytorch(path)
    path.write_bytes(pickle.dumps({"weight": Harm()}))
    with pytest.raises(ValueError, match=r"model\.pt"):
        interop.from_pytorch(path)
    torch.save(torch.nn.ConvTranspose3d(2, 2, 2), path)
    with pytest.raises(ValueError, match=r"Save module\.state_dict\(\)"):
        interop.from_pytorch(path)
    torch.save({"weight": torch.ones(2, 2, 2, 2, 2)}, path)
    data = path.read_bytes()
    for broken in (b"", data[:100], data[: len(data) // 2], b"nonsense"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"model\.pt"):
            interop.from_pytorch(path)
    torch.save({"model": {"up.weight": torch.ones(2, 2, 2, 2, 2).to_sparse()}}, path)
    assert interop.from_pytorch(path, "up")["kernel"].sum() == 32
    torch.save({"weight": torch.ones(2, 2, 2, 2, 2) > 0}, path)
    with pytest.raises(TypeError, match="must be an array of numbers"):
        interop.from_pytorch(path)
    with pytest.raises(ValueError, match="on the device 'meta'"):
        interop.from_pytorch({"weight": torch.ones(2, 2, 2, 2, 2, device="meta")})
    with pytest.raises(TypeError, match=r"`target` must be a torch\.nn\.Module"):
        interop.to_pytorch(PARAMS, 42)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="holds a list, no state_dict"):
        interop.from_pytorch(path)


def test_what_does_not_fit_a_module_changes_nothing() -> None:
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(torch.nn.ConvTranspose3d(3, 6, (2, 3, 4)), torch.nn.ConvTranspose3d(6, 1, 2))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    wrong = {"kernel": PARAMS["kernel"][..., :2], "bias": PARAMS["bias"]}
    for params, layer, message in [
        (wrong, "0", "nothing was changed"), ({"0": PARAMS, "1": wrong}, None, "nothing was changed"),
        ({"kernel": PARAMS["kernel"]}, "0", "nothing was changed"), (PARAMS, "2", "the module has no 2.bias, 2.weight"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            interop.to_pytorch(params, module, layer)
        assert all((before[name] == value).all() for name, value in module.state_dict().items())
    interop.to_pytorch(PARAMS, module, "0")
    assert_equal(interop.from_pytorch(module, "0"), PARAMS)
    with pytest.raises(TypeError, match=r"a torch.nn.ConvTranspose3d or torch.nn.Conv3d is wanted"):
        interop.spec_from_pytorch(torch.nn.Conv2d(2, 2, 2))
