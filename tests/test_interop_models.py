"""Whole models: a U-Net saved by Keras and one saved by PyTorch give in Flax, with our layer, the same outputs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import conv3dt_jax as c3t
from conv3dt_jax import interop
from tests.fixtures import unets

pytestmark = [
    pytest.mark.usefixtures("quick_compiles"),
    pytest.mark.lenient,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # Keras's own, in save
]


class UNet(nn.Module):
    """The networks of tests/fixtures/unets.py in Flax: ``padding`` and the upsampling layers are what differs."""

    padding: object
    ups: tuple

    @nn.compact
    def __call__(self, x):
        conv = lambda features, name, size=3, **kwargs: nn.Conv(
            features, (size,) * 3, padding=self.padding if size == 3 else "VALID", name=name, **kwargs
        )
        skips = [nn.relu(conv(6, "enter")(x))]
        for i, features in enumerate((8, 12)):
            skips.append(nn.relu(conv(features, f"down_{i}", strides=(2, 2, 2))(skips[-1])))
        x = skips.pop()
        for i, features in enumerate((8, 6)):
            up = c3t.Conv3DTranspose(**self.ups[i], name=f"up_{i}")
            x = jnp.concatenate([nn.relu(up(x)), skips.pop()], -1)
            x = nn.relu(conv(features, f"merge_{i}")(x))
        return conv(2, "leave", 1)(x)


def check_structure(model, params) -> None:
    want = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.ones(unets.SHAPE)))["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, dict(want))


def test_a_unet_saved_by_keras(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("absl.logging.warning", lambda *args: None)  # that .h5 is old
    theirs = unets.keras()
    layers = [theirs.get_layer(f"up_{i}") for i in range(2)]
    ups = tuple(
        {"filters": up.filters, "kernel_size": up.kernel_size, "strides": 2, "padding": "same"} for up in layers
    )
    model = UNet("SAME", ups)
    apply, want = jax.jit(model.apply), theirs(unets.inputs())
    for kind in (".keras", ".weights.h5", ".h5"):
        path = tmp_path / f"unet{kind}"
        (theirs.save_weights if kind == ".weights.h5" else theirs.save)(path)
        params = interop.from_keras(path)
        check_structure(model, params)
        np.testing.assert_allclose(apply({"params": params}, unets.inputs()), want, rtol=1e-5, atol=1e-5)


TORCH_UPS = (
    {"filters": 8, "kernel_size": 3, "strides": 2, "padding": 1, "output_padding": 1, "groups": 2},
    {"filters": 6, "kernel_size": 4, "strides": 2, "padding": 1, "use_bias": False},
)


@pytest.mark.parametrize("kind", ["unet.safetensors", "unet.pt", "live"])
def test_a_unet_saved_by_pytorch(kind) -> None:
    if kind != "unet.safetensors":
        pytest.importorskip("torch")
    source = unets.pytorch() if kind == "live" else unets.FOLDER / kind
    params = {name.replace(".", "_"): value for name, value in interop.from_pytorch(source).items()}
    model = UNet(1, TORCH_UPS)
    check_structure(model, params)
    with np.load(unets.FOLDER / "unet.npz") as recorded:
        want = recorded["outputs"]
    np.testing.assert_allclose(model.apply({"params": params}, unets.inputs()), want, rtol=1e-5, atol=1e-5)
