"""The NNX layer beside Linen, by the bridge both ways; and sharding annotations, of NNX and Linen, into jit."""

import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import conv3dt_jax as c3t
from conv3dt_jax import initializers
from conv3dt_jax.nnx import RegularizationLoss
from tests.nnx_layers import UP, X, make, params_of

# optax, Flax and Keras promote implicitly
pytestmark = [pytest.mark.lenient, pytest.mark.usefixtures("quick_compiles")]


def test_the_bridge_from_linen() -> None:
    linen = c3t.Conv3DTranspose(4, 3, **UP, activity_regularizer="l2")
    bridged = nnx.bridge.lazy_init(nnx.bridge.ToNNX(linen, rngs=nnx.Rngs(0)), X)
    assert isinstance(bridged.kernel, nnx.Param)
    params = params_of(bridged)
    np.testing.assert_array_equal(bridged(X), linen.apply({"params": params}, X))
    assert c3t.find_layers(nnx.Dict(up=bridged)) == {("up",): linen}
    bridged(X, mutable=["losses"])
    assert isinstance(bridged.activity_regularizer, RegularizationLoss)
    activity = c3t.regularization_loss(bridged)
    assert activity > 0
    bridged.to_nnx__module = linen.copy(kernel_regularizer="l1")
    penalty = 0.01 * jnp.abs(bridged.kernel[...]).sum()
    np.testing.assert_allclose(c3t.regularization_loss(bridged), activity + penalty, rtol=1e-5)


def test_the_bridge_to_linen() -> None:
    model = nnx.bridge.to_linen(c3t.nnx.Conv3DTranspose, 3, 4, 3, **UP, activity_regularizer="l2")
    variables = model.init(jax.random.key(0), X)
    linen = c3t.Conv3DTranspose(4, 3, **UP, activity_regularizer="l2")
    want, state = linen.apply({"params": variables["params"]}, X, mutable=["losses"])
    np.testing.assert_array_equal(model.apply(variables, X), want)
    got, left = model.apply(variables, X, mutable=["losses"])
    np.testing.assert_array_equal(got, want)
    assert jax.tree.leaves(left["losses"]) == jax.tree.leaves(state["losses"])
    np.testing.assert_allclose(c3t.regularization_loss(left), c3t.regularization_loss(state))


MESH_AXES = ("data", "model")
RULES = (("filters", "model"), ("channels", None))
SPEC = P(None, None, None, "model", None)


def plain(spec: P) -> P:
    """Without the trailing axes that are not split."""
    parts = list(spec)
    while parts and parts[-1] is None:
        parts.pop()
    return P(*parts)


def annotated(kind: str):
    """A layer with a sharding annotation of each kind that Flax knows, and the specification that comes of it."""
    glorot = initializers.get("kernel_initializer", "glorot_uniform")
    if kind in ("nnx.with_partitioning", "nnx from nn.with_partitioning"):
        box = nnx.with_partitioning if kind == "nnx.with_partitioning" else nn.with_partitioning
        layer = make(8, 2, kernel_initializer=box(glorot, tuple(SPEC)))
    elif kind == "nnx logical":
        layer = make(8, 2, kernel_metadata={"out_sharding": initializers.KERNEL_AXES, "sharding_rules": RULES})
    else:
        names = tuple(SPEC) if kind == "nn.with_partitioning" else initializers.KERNEL_AXES
        box = nn.with_partitioning if kind == "nn.with_partitioning" else nn.with_logical_partitioning
        linen = c3t.Conv3DTranspose(8, 2, kernel_initializer=box(glorot, names))
        specs = nn.get_partition_spec(jax.eval_shape(linen.init, jax.random.key(0), X))
        return linen, nn.logical_to_mesh(specs, RULES) if "logical" in kind else specs
    return layer, nnx.get_partition_spec(nnx.state(layer))


@pytest.mark.parametrize(
    "kind",
    [
        "nnx.with_partitioning",
        "nnx from nn.with_partitioning",
        "nnx logical",
        "nn.with_partitioning",
        "nn.with_logical_partitioning",
    ],
)
def test_sharding_annotations_survive_into_jit(kind) -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), MESH_AXES)
    with nnx.use_eager_sharding(False):
        layer, specs = annotated(kind)
    if kind.startswith("nnx"):
        assert plain(specs["kernel"].get_value()) == plain(SPEC)
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
        lowered = jax.jit(lambda: nnx.state(nnx.clone(layer)), out_shardings=shardings).lower()
    else:
        assert plain(specs["params"]["kernel"]) == plain(SPEC)
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
        lowered = jax.jit(lambda: layer.init(jax.random.key(0), X), out_shardings=shardings).lower()
    text = lowered.as_text()
    assert '{}, {}, {}, {"model"}, {}' in text


EIGHT_DEVICES = """
import jax, jax.numpy as jnp, optax
from flax import nnx
import conv3dt_jax as c3t
from conv3dt_jax.initializers import KERNEL_AXES

mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
rules = (("filters", "model"), ("channels", None))
with jax.set_mesh(mesh):
    layer = c3t.nnx.Conv3DTranspose(
        3, 8, 2, 2, kernel_metadata={"out_sharding": KERNEL_AXES, "sharding_rules": rules}, rngs=nnx.Rngs(0)
    )
    optimizer = nnx.Optimizer(layer, optax.adam(1e-3), wrt=nnx.Param)
    x = jax.device_put(jnp.ones((4, 4, 4, 4, 3)), jax.NamedSharding(mesh, jax.P("data")))

    @nnx.jit
    def step(layer, optimizer, x):
        gradients = nnx.grad(lambda layer: jnp.square(layer(x)).mean())(layer)
        optimizer.update(layer, gradients)
        return layer(x)

    y = step(layer, optimizer, x)
    moments = [leaf for leaf in jax.tree.leaves(optimizer.opt_state) if leaf.ndim == 5]
    for array in (layer.kernel[...], *moments, y):
        print(array.sharding.shard_shape(array.shape))
"""


def test_a_training_step_on_eight_devices_keeps_the_kernel_split() -> None:
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run([sys.executable, "-c", EIGHT_DEVICES], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    *kernels, output = done.stdout.splitlines()
    assert kernels == ["(2, 2, 2, 2, 3)"] * 3  # the kernel and its two moments
    assert output.startswith("(2, 8, 8, 8,")
