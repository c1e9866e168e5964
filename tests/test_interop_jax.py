"""The layers of Flax (Linen and NNX), Equinox and Haiku: the same outputs in float64, and exact round trips."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import conv3dt_jax as c3t
from conv3dt_jax import interop

eqx = pytest.importorskip("equinox")
hk = pytest.importorskip("haiku")

pytestmark = [pytest.mark.lenient, pytest.mark.usefixtures("quick_compiles")]

X = np.random.default_rng(0).normal(size=(2, 4, 3, 8, 4))
PADDINGS = ["SAME", "VALID", "CIRCULAR", 1, ((0, 1), (1, 2), (2, 0))]
GRID = list(
    itertools.product(PADDINGS, [(2, 3, 4), (3, 3, 5)], [(1, 1, 1), (2, 3, 2)], [None, (2, 1, 2)], [False, True])
)


def assert_equal(got, want) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def close(got, want) -> None:
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.thinned
@pytest.mark.parametrize(
    ("padding", "kernel", "strides", "dilation", "transpose"), GRID[::7], ids=str
)  # 7 has no part in the sizes: all pairs occur
def test_linen(padding, kernel, strides, dilation, transpose, x64) -> None:
    peer = nn.ConvTranspose(
        6, kernel, strides, padding, kernel_dilation=dilation, transpose_kernel=transpose, param_dtype=jnp.float64,
        bias_init=nn.initializers.normal(),
    )  # fmt: skip
    variables = peer.init(jax.random.key(0), X)
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilation or (1, 1, 1), strict=True)]
    off = (
        padding == "CIRCULAR" and transpose and any(e > s and (e - s) % 2 for e, s in zip(spans, strides, strict=True))
    )
    params = interop.from_flax(peer, variables["params"])
    assert_equal(interop.to_flax(params, peer), dict(variables["params"]))
    if off:
        with pytest.raises(ValueError, match="lies one step off"):
            interop.spec_from_flax(peer)
        return
    close(c3t.apply(params, X, interop.spec_from_flax(peer)), peer.apply(variables, X))


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("use_bias", [False, True])
def test_nnx(transpose, use_bias, x64) -> None:
    options = {"strides": (2, 1, 2), "transpose_kernel": transpose, "use_bias": use_bias, "param_dtype": jnp.float64}
    peer = nnx.ConvTranspose(4, 6, (2, 3, 4), **options, bias_init=nn.initializers.normal(), rngs=nnx.Rngs(0))
    params = interop.from_flax(peer)
    close(c3t.apply(params, X, interop.spec_from_flax(peer)), peer(X))
    twin = nnx.ConvTranspose(4, 6, (2, 3, 4), **options, rngs=nnx.Rngs(1))
    interop.to_flax(params, twin)
    close(twin(X), peer(X))
    with pytest.raises(ValueError, match=r"nothing was changed|features"):
        interop.to_flax({"kernel": params["kernel"][..., :2]}, twin)
    close(twin(X), peer(X))


def test_a_mask_is_multiplied_into_the_kernel(x64) -> None:
    mask = np.random.default_rng(1).integers(0, 2, (2, 2, 2, 4, 6)).astype(np.float64)
    peer = nn.ConvTranspose(6, (2, 2, 2), mask=mask, param_dtype=jnp.float64)
    variables = peer.init(jax.random.key(0), X)
    close(
        c3t.apply(interop.from_flax(peer, variables["params"]), X, interop.spec_from_flax(peer)),
        peer.apply(variables, X),
    )


def test_parameters_must_be_those_of_the_flax_layer() -> None:
    peer = nn.ConvTranspose(6, (2, 2, 2))
    good = {"kernel": np.ones((2, 2, 2, 6, 4), "f4"), "bias": np.ones(6, "f4")}
    for wrong in (
        {"kernel": good["kernel"]},
        {**good, "kernel": good["kernel"][1:]},
        {**good, "kernel": good["kernel"][:, :, :, 1:]},
    ):
        with pytest.raises(ValueError, match=r"kernel_size=\(2, 2, 2\), 6 features and use_bias=True|makes 5 filters"):
            interop.to_flax(wrong, peer)
    with pytest.raises(ValueError, match="the bias has shape"):
        interop.to_flax({**good, "bias": np.ones(4, "f4")}, peer)
    with pytest.raises(ValueError, match="6 features"):
        interop.from_flax(peer, good)  # filters before channels, as here
    with pytest.raises(TypeError, match=r"must be a ConvTranspose or Conv of flax\.linen or flax\.nnx"):
        interop.spec_from_flax(nn.Dense(6))
    boxed = nn.ConvTranspose(6, (2, 2, 2), kernel_init=nn.with_partitioning(nn.initializers.normal(), (None,) * 5))
    variables = boxed.init(jax.random.key(0), X.astype("f4"))
    assert interop.from_flax(boxed, variables["params"])["kernel"].shape == (2, 2, 2, 6, 4)


def test_what_flax_has_and_we_do_not() -> None:
    with pytest.raises(ValueError, match="holds no parameters"):
        interop.from_flax(nn.ConvTranspose(6, (2, 2, 2)))
    with pytest.raises(ValueError, match="beyond the kernel's 1"):
        interop.spec_from_flax(nn.ConvTranspose(6, (2, 2, 2), padding=3))
    with pytest.raises(ValueError, match="three spatial dimensions"):
        interop.spec_from_flax(nn.ConvTranspose(6, (2, 2)))


EQUINOX = list(
    itertools.product(["VALID", "SAME", "SAME_LOWER", 1, ((0, 1), (1, 0), (1, 1))], [(2, 3, 4), (3, 3, 5)], [1, (2, 3, 2)], [1, 2], [1, (2, 1, 2)])
)  # fmt: skip


@pytest.mark.thinned
@pytest.mark.parametrize(("padding", "kernel", "stride", "groups", "dilation"), EQUINOX[::7], ids=str)
def test_equinox(padding, kernel, stride, groups, dilation, x64) -> None:
    a = 0 if stride == 1 or (isinstance(padding, str) and padding != "VALID") else (1, 2, 0)
    make = lambda seed: eqx.nn.ConvTranspose3d(
        4,
        6,
        kernel,
        stride,
        output_padding=a,
        padding=padding,
        dilation=dilation,
        groups=groups,
        key=jax.random.key(seed),
    )
    peer, x = make(0), np.moveaxis(X, -1, 1)
    params, spec = interop.from_equinox(peer), interop.spec_from_equinox(peer)
    close(c3t.apply(params, x[0], spec), peer(x[0]))
    close(c3t.apply(params, x, spec), jax.vmap(peer)(x))
    twin = interop.to_equinox(params, make(1))
    assert (twin.weight == peer.weight).all()
    assert (twin.bias == peer.bias).all()
    with pytest.raises(ValueError, match="nothing was changed"):
        interop.to_equinox({"kernel": params["kernel"][..., :2], "bias": params["bias"]}, peer)


@pytest.mark.parametrize(
    ("kernel", "stride"), [((3, 3, 5), 1), ((4, 4, 4), 2), ((2, 3, 4), (1, 2, 2)), ((3, 4, 5), (2, 3, 2))]
)
@pytest.mark.parametrize("padding", ["SAME", "SAME_LOWER"])
def test_equinox_circular(kernel, stride, padding, x64) -> None:
    peer = eqx.nn.ConvTranspose3d(4, 6, kernel, stride, padding=padding, padding_mode="CIRCULAR", key=jax.random.key(0))
    overlap = [k - s for k, s in zip(kernel, peer.stride, strict=True)]
    if padding == "SAME_LOWER" and any(o > 0 and o % 2 for o in overlap):
        with pytest.raises(ValueError, match="lies one step off"):
            interop.spec_from_equinox(peer)
        return
    x = np.moveaxis(X, -1, 1)[0]
    close(c3t.apply(interop.from_equinox(peer), x, interop.spec_from_equinox(peer)), peer(x))


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("padding", ["SAME", "VALID", ((1, 0), (1, 2), (0, 1))])
@pytest.mark.parametrize("with_bias", [False, True])
def test_haiku(data_format, padding, with_bias, x64) -> None:
    made = {}

    def forward(x):
        made["module"] = hk.Conv3DTranspose(
            6, (2, 3, 4), stride=(2, 3, 2), padding=padding, with_bias=with_bias, data_format=data_format,
            b_init=hk.initializers.RandomNormal(),
        )  # fmt: skip
        return made["module"](x)

    network = hk.without_apply_rng(hk.transform(forward))
    x = np.moveaxis(X, -1, 1) if data_format == "channels_first" else X
    tree = network.init(jax.random.key(0), x)
    params = interop.from_haiku(tree["conv3_d_transpose"])
    close(c3t.apply(params, x, interop.spec_from_haiku(made["module"])), network.apply(tree, x))
    assert_equal(interop.to_haiku(params, data_format), dict(tree["conv3_d_transpose"]))


def test_haiku_output_shape(x64) -> None:
    made = {}

    def forward(x):
        made["module"] = hk.Conv3DTranspose(6, 3, stride=2, output_shape=(7, 6, 15))
        return made["module"](x)

    network = hk.without_apply_rng(hk.transform(forward))
    tree = network.init(jax.random.key(0), X)
    params = interop.from_haiku(tree["conv3_d_transpose"])
    got = c3t.apply(params, X, interop.spec_from_haiku(made["module"]), output_size=(7, 6, 15))
    close(got, network.apply(tree, X))
    with pytest.raises(ValueError, match="'w' and 'b', not"):
        interop.from_haiku(tree)
