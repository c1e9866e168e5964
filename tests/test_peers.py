"""The recorded values of TensorFlow's and PyTorch's own transposed convolutions (see tests/fixtures/record.py)."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import conv3dt_jax as c3t
from tests.fixtures import record
from tests.helpers import quick_jit

FOLDER = pathlib.Path(__file__).parent / "fixtures"
RECORDED = [("tensorflow", i) for i in range(len(record.TENSORFLOW))] + [
    ("pytorch", i) for i in range(len(record.PYTORCH))
]


@pytest.mark.parametrize(("peer", "i"), RECORDED, ids=lambda value: str(value))
@pytest.mark.parametrize("implementation", ["auto", "matmul"])
def test_values_and_gradients_are_those_of_the_peer(peer, i, implementation, x64) -> None:
    with np.load(FOLDER / f"{peer}.npz") as data:
        names = ("inputs", "kernel", "outputs", "inputs_gradient", "kernel_gradient")
        x, w, y, gx, gw = (data[f"{i}/{name}"] for name in names)
        kwargs = json.loads(str(data[f"{i}/kwargs"]))
    run = lambda x, w: c3t.conv3d_transpose(x, w, **kwargs, implementation=implementation)
    np.testing.assert_allclose(run(x, w), y, rtol=1e-11, atol=1e-11)
    mine = quick_jit(jax.grad(lambda x, w: jnp.sin(run(x, w)).sum(), (0, 1)))(x, w)
    np.testing.assert_allclose(mine[0], gx, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(mine[1], gw, rtol=1e-10, atol=1e-10)
