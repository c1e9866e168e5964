"""Ordinary convolutions of other frameworks: outputs in float64 or as recorded, exact round trips, refusals."""

import itertools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import conv3dt_jax as c3t
from conv3dt_jax import interop
from tests.fixtures import record
from tests.helpers import label, quick_jit
from tests.test_peers import FOLDER

eqx = pytest.importorskip("equinox")
hk = pytest.importorskip("haiku")
keras = pytest.importorskip("keras")

pytestmark = [pytest.mark.lenient, pytest.mark.usefixtures("quick_compiles")]

X = np.random.default_rng(0).normal(size=(2, 7, 6, 8, 4))
FIRST = np.moveaxis(X, -1, 1)
KERNELS, STRIDES, DILATIONS = [(2, 3, 4), (3, 3, 1)], [(1, 1, 1), (2, 3, 2)], [1, (2, 1, 2)]


def close(got, want) -> None:
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-11)


RECORDED = [("tensorflow", i) for i in range(len(record.TENSORFLOW_CONVOLUTIONS))] + [
    ("pytorch", i) for i in range(len(record.PYTORCH_CONVOLUTIONS))
]


@pytest.mark.thinned
@pytest.mark.parametrize(("peer", "i"), RECORDED, ids=str)
@pytest.mark.parametrize("implementation", ["auto", "dilated"])
def test_values_and_gradients_are_those_recorded(peer, i, implementation, x64) -> None:
    with np.load(FOLDER / f"{peer}_convolutions.npz") as data:
        names = ("inputs", "kernel", "outputs", "inputs_gradient", "kernel_gradient")
        x, w, y, gx, gw = (data[f"{i}/{name}"] for name in names)
        kwargs = json.loads(str(data[f"{i}/kwargs"]))
    run = lambda x, w: c3t.conv3d(x, w, **kwargs, implementation=implementation)
    close(quick_jit(run)(x, w), y)
    mine = quick_jit(jax.grad(lambda x, w: jnp.sin(run(x, w)).sum(), (0, 1)))(x, w)
    np.testing.assert_allclose(mine[0], gx, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(mine[1], gw, rtol=1e-10, atol=1e-10)


FLAX = list(
    itertools.product(["SAME", "VALID", "CIRCULAR", 1, ((0, 1), (1, 2), (2, 0))], KERNELS, STRIDES, DILATIONS, [1, 2])
)


@pytest.mark.parametrize(("padding", "kernel", "strides", "dilation", "groups"), FLAX[::7], ids=str)
def test_flax(padding, kernel, strides, dilation, groups, x64) -> None:
    options = {
        "padding": padding, "kernel_dilation": dilation, "feature_group_count": groups, "param_dtype": jnp.float64,
        "bias_init": nn.initializers.normal(),
    }  # fmt: skip
    peer = nn.Conv(6, kernel, strides, **options)
    variables = peer.init(jax.random.key(0), X)
    params = interop.from_flax(peer, variables["params"])
    jax.tree.map(np.testing.assert_array_equal, interop.to_flax(params, peer), dict(variables["params"]))
    twin = nnx.Conv(4, 6, kernel, strides, **options, rngs=nnx.Rngs(1))
    interop.to_flax(params, twin)
    close(np.asarray(twin(X)), peer.apply(variables, X))
    if padding == "CIRCULAR" and max(strides) > 1:
        with pytest.raises(ValueError, match="lies otherwise than here"):
            interop.spec_from_flax(peer)
        return
    for module in (peer, twin):
        close(c3t.apply(params, X, interop.spec_from_flax(module)), peer.apply(variables, X))


@pytest.mark.parametrize(
    ("padding", "kernel", "strides"),
    [
        ("same", 3, 2),
        ("valid", 3, 2),
        ("SAME_LOWER", (2, 3, 4), 1),
        ("CIRCULAR", 1, 2),
        ("CIRCULAR", (1, 3, 4), (2, 1, 1)),
    ],
)
def test_flax_spells_and_aligns_otherwise(padding, kernel, strides, x64) -> None:
    sizes = [tuple(np.broadcast_to(value, 3).tolist()) for value in (kernel, strides)]
    peer = nn.Conv(6, *sizes, padding, param_dtype=jnp.float64)
    variables = peer.init(jax.random.key(0), X)
    params = interop.from_flax(peer, variables["params"])
    close(c3t.apply(params, X, interop.spec_from_flax(peer)), peer.apply(variables, X))


def test_equinox_that_pads_nothing_is_valid_whatever_its_mode() -> None:
    for mode in ("ZEROS", "CIRCULAR", "REFLECT", "REPLICATE"):
        peer = eqx.nn.Conv3d(4, 6, 3, 2, padding=0, padding_mode=mode, key=jax.random.key(0))
        assert interop.spec_from_equinox(peer).padding == "valid"


def test_what_flax_has_and_we_do_not() -> None:
    for options, message in (
        ({"padding": "REFLECT"}, "no counterpart"),
        ({"input_dilation": 2}, "makes a transposed convolution"),
    ):
        with pytest.raises(ValueError, match=message):
            interop.spec_from_flax(nn.Conv(6, (2, 2, 2), **options))
    with pytest.raises(ValueError, match="three spatial dimensions"):
        interop.spec_from_flax(nn.Conv(6, (2, 2)))
    with pytest.raises(TypeError, match="must be a ConvTranspose or Conv"):
        interop.spec_from_flax(nn.ConvLocal(6, (2, 2, 2)))
    with pytest.raises(ValueError, match="6 features"):
        interop.to_flax({"kernel": np.ones((2, 2, 2, 6, 4), "f4"), "bias": np.ones(6, "f4")}, nn.Conv(6, (2, 2, 2)))


EQUINOX = list(
    itertools.product(["VALID", "SAME", "SAME_LOWER", 1, ((0, 1), (1, 0), (2, 1))], KERNELS, STRIDES, DILATIONS, [1, 2], ["ZEROS", "CIRCULAR"])
)  # fmt: skip


def equinox_is_off(padding, spans, stride, mode) -> bool:
    """Whether it pads in a way that depends on the volume's size, or puts other ends around than we do."""
    if padding in ("VALID", "SAME") or (mode == "ZEROS" and padding != "SAME_LOWER"):
        return False
    pads = padding if isinstance(padding, tuple) else [(padding, padding)] * 3
    if padding == "SAME_LOWER":
        pads = [(e // 2, (e - 1) // 2) for e in spans]
    return max(stride) > 1 or (mode == "CIRCULAR" and [*pads] != [((e - 1) // 2, e // 2) for e in spans])


@pytest.mark.thinned
@pytest.mark.parametrize(("padding", "kernel", "stride", "dilation", "groups", "mode"), EQUINOX[::7], ids=str)
def test_equinox(padding, kernel, stride, dilation, groups, mode, x64) -> None:
    make = lambda seed: eqx.nn.Conv3d(
        4, 6, kernel, stride, padding=padding, dilation=dilation, groups=groups, padding_mode=mode, key=jax.random.key(seed)
    )  # fmt: skip
    peer = make(0)
    params = interop.from_equinox(peer)
    twin = interop.to_equinox(params, make(1))
    assert (twin.weight == peer.weight).all()
    assert (twin.bias == peer.bias).all()
    if equinox_is_off(padding, [(k - 1) * d + 1 for k, d in zip(kernel, peer.dilation, strict=True)], stride, mode):
        with pytest.raises(ValueError, match="has no counterpart here"):
            interop.spec_from_equinox(peer)
        return
    spec = interop.spec_from_equinox(peer)
    close(c3t.apply(params, FIRST[0], spec), peer(FIRST[0]))
    close(c3t.apply(params, FIRST, spec), jax.vmap(peer)(FIRST))


@pytest.mark.parametrize("mode", ["ZEROS", "CIRCULAR"])
def test_equinox_pads_alike_without_strides(mode, x64) -> None:
    for padding in ("SAME", "SAME_LOWER", ((1, 1), (1, 2), (0, 0))):
        kernel = (3, 4, 1) if mode == "ZEROS" or padding != "SAME_LOWER" else (3, 3, 1)
        peer = eqx.nn.Conv3d(4, 6, kernel, padding=padding, padding_mode=mode, key=jax.random.key(0))
        close(c3t.apply(interop.from_equinox(peer), FIRST, interop.spec_from_equinox(peer)), jax.vmap(peer)(FIRST))


HAIKU = list(
    itertools.product(["SAME", "VALID", ((0, 1), (1, 2), (2, 0))], STRIDES, [1, 2], ["channels_last", "channels_first"])
)


@pytest.mark.parametrize(("padding", "stride", "groups", "data_format"), HAIKU[::5], ids=str)
def test_haiku(padding, stride, groups, data_format, x64) -> None:
    made = {}
    x = X if data_format == "channels_last" else FIRST

    def forward(x):
        made["module"] = hk.Conv3D(
            6, (2, 3, 4), stride, rate=(2, 1, 1) if max(stride) == 1 else 1, padding=padding, data_format=data_format,
            feature_group_count=groups, b_init=hk.initializers.RandomNormal(),
        )  # fmt: skip
        return made["module"](x)

    network = hk.without_apply_rng(hk.transform(forward))
    tree = network.init(jax.random.key(0), x)
    params = interop.from_haiku(tree["conv3_d"], "Conv3D")
    close(c3t.apply(params, x, interop.spec_from_haiku(made["module"])), network.apply(tree, x))
    jax.tree.map(np.testing.assert_array_equal, interop.to_haiku(params, data_format, "Conv3D"), dict(tree["conv3_d"]))
    with pytest.raises(ValueError, match="must be one of 'Conv3DTranspose', 'Conv3D'"):
        interop.from_haiku(tree["conv3_d"], "Conv2D")


PYTORCH = [
    {"kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "padding_mode": mode}
    for kernel, stride, padding, dilation, groups, mode in itertools.product(
        [(2, 3, 4), 3, (1, 5, 3)], [1, (2, 3, 2)], [0, 1, (0, 1, 2), "same"], DILATIONS, [1, 2], ["zeros", "circular"]
    )
    if padding != "same" or stride == 1
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("case", PYTORCH[::3], ids=label)
def test_pytorch(case, x64) -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    module = torch.nn.Conv3d(4, 6, **case, dtype=torch.float64)
    params = interop.from_pytorch(module)
    assert all((interop.to_pytorch(params)[name] == value).all() for name, value in module.state_dict().items())
    reach = [(k - 1) * d for k, d in zip(module.kernel_size, module.dilation, strict=True)]
    around = case["padding_mode"] == "circular" and case["padding"] not in (0, "same")
    if around and (case["stride"] != 1 or [2 * p for p in module.padding] != reach):
        with pytest.raises(ValueError, match="is not aligned as padding='circular' is here"):
            interop.spec_from_pytorch(module)
        return
    spec = interop.spec_from_pytorch(module)
    close(c3t.apply(params, FIRST, spec), module(torch.from_numpy(FIRST)).detach().numpy())


class Convolution:
    """The attributes of a `torch.nn.Conv3d`, of which a spec is made without PyTorch."""

    out_channels, kernel_size, stride, dilation, groups, bias = 6, (3, 3, 3), (1, 1, 1), (1, 1, 1), 1, None
    transposed, output_padding, padding, padding_mode = False, (0, 0, 0), (1, 1, 1), "circular"


def test_pytorch_s_circular_padding_is_ours_where_it_is_aligned() -> None:
    module = Convolution()
    assert interop.spec_from_pytorch(module) == c3t.Conv3DSpec(
        6, 3, padding="circular", use_bias=False, data_format="channels_first"
    )
    for change, message in (
        ({"stride": (2, 2, 2)}, "is not aligned"), ({"padding": (1, 1, 2)}, "is not aligned"), ({"padding_mode": "reflect"}, "no counterpart"),
    ):  # fmt: skip
        other = Convolution()
        vars(other).update(change)
        with pytest.raises(ValueError, match=message):
            interop.spec_from_pytorch(other)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras's own, in load_weights
def test_a_new_keras_archive_is_loaded_by_keras(tmp_path) -> None:
    layer = c3t.Conv3D(6, (2, 3, 1), 2, "same", groups=2, activation="relu", name="down")
    x = X.astype(np.float32)
    params = layer.init(jax.random.key(0), x)["params"]
    interop.to_keras(params, tmp_path / "down.keras", layer)
    peer = keras.saving.load_model(tmp_path / "down.keras")
    np.testing.assert_allclose(peer(x), layer.apply({"params": params}, x), rtol=1e-5, atol=1e-5)
    back = interop.layer_from_keras(tmp_path / "down.keras")
    assert {**back.get_config(), "dtype": None} == layer.get_config()
    jax.tree.map(np.testing.assert_array_equal, interop.from_keras(tmp_path / "down.keras", "down"), params)
    interop.to_keras(jax.tree.map(lambda a: 2 * a, params), tmp_path / "new.weights.h5", layer)
    peer.load_weights(tmp_path / "new.weights.h5")
    np.testing.assert_array_equal(peer.get_weights()[0], 2 * params["kernel"])
    with pytest.raises(ValueError, match="Keras's layer has no padding='circular'"):
        interop.to_keras(params, tmp_path / "new.keras", c3t.Conv3D(6, (2, 3, 1), padding="circular"))


def test_of_several_layers_the_transposed_one_is_meant() -> None:
    """And of one alone that one, also where Keras 2 derives one class from the other."""
    down, up = keras.layers.Conv3D(4, 3, name="down"), keras.layers.Conv3DTranspose(2, 2, name="up")
    peer = keras.Sequential([keras.Input((6, 6, 6, 2)), down, up])
    assert type(interop.layer_from_keras(peer)) is c3t.Conv3DTranspose
    assert interop.layer_from_keras(peer, "down").filters == 4
    assert type(interop.layer_from_keras(keras.Sequential([keras.Input((6, 6, 6, 2)), down]))) is c3t.Conv3D

    class Conv3D:
        def get_config(self):
            return {"filters": 4, "kernel_size": (2, 2, 2)}

    class Conv3DTranspose(Conv3D): ...

    assert type(interop.layer_from_keras(Conv3DTranspose())) is c3t.Conv3DTranspose
    assert type(interop.layer_from_keras(Conv3D())) is c3t.Conv3D
