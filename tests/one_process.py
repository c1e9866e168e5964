"""One of several processes that compute together: `python -m tests.one_process PORT COUNT RANK [dies]`."""

import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import conv3dt_jax as c3t


def check(got, want) -> None:
    """What this process holds of an array is what one alone would have there."""
    assert got.shape == want.shape
    scale = max(1.0, float(np.abs(want).max()))
    for shard in got.addressable_shards:
        np.testing.assert_allclose(shard.data, np.asarray(want)[shard.index], rtol=1e-5, atol=1e-5 * scale)


def train(layer, x, target, on=None):
    """The losses of three steps, and the parameters after them."""
    params = layer.init(jax.random.key(0), x)
    optimizer = optax.sgd(0.1)

    def step(params, x, target):
        loss, gradients = jax.value_and_grad(lambda p: jnp.mean((layer.apply(p, x) - target) ** 2))(params)
        return optax.apply_updates(params, optimizer.update(gradients, optimizer.init(params))[0]), loss

    if on is not None:
        params = jax.device_put(jax.tree.map(np.asarray, params), NamedSharding(on, P()))
        x, target = (jax.device_put(a, NamedSharding(on, P("data", "depth"))) for a in (x, target))
    losses = []
    for _ in range(3):
        params, loss = jax.jit(step)(params, x, target)
        losses.append(loss)
    return losses, params


def main(port: str, count: int, rank: int, dies: bool) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", count, rank, heartbeat_timeout_seconds=10)
    assert jax.process_count() == len(jax.devices()) == count
    rng = np.random.default_rng(0)
    spec = c3t.Conv3DTransposeSpec(4, 3, 2, "same")
    x, w, b = (rng.normal(size=s).astype(np.float32) for s in ((2, 8, 4, 4, 3), (3, 3, 3, 4, 3), (4,)))

    def gradients(run):
        return jax.jit(jax.grad(lambda x, w: jnp.sum(jnp.sin(run(x, w, b))), (0, 1)))

    def alone(x, w, b):
        return c3t.apply({"kernel": w, "bias": b}, x, spec)

    want, wanted = jax.jit(alone)(x, w, b), gradients(alone)(x, w)
    depth = c3t.sharded(jax.make_mesh((count,), ("depth",), axis_types=(AxisType.Auto,)), spec, depth="depth")
    check(depth(x, w, b), want)
    if dies:
        beat_until_one_dies(depth, x, w, b, rank == count - 1)
    for got, expected in zip(gradients(depth)(jax.device_put(x, depth.sharding("inputs")), w), wanted, strict=True):
        check(got, expected)
    placed = jax.device_put(x, depth.sharding("inputs"))
    check(jax.jit(alone)(placed, w, b), want)  # without a word about shards in the program

    on = jax.make_mesh((2, count // 2), ("data", "depth"))
    layer = c3t.Conv3DTranspose(3, 3, padding="same", mesh_axes={"batch": "data", "depth": "depth"})
    target = rng.normal(size=x.shape).astype(np.float32)
    losses, params = train(layer, x, target)
    with jax.set_mesh(on):
        for got, expected in zip(
            *(jax.tree.leaves(v) for v in (train(layer, x, target, on), (losses, params))), strict=True
        ):
            check(got, expected)
    print(f"process {rank} of {count}: done", flush=True)


def beat_until_one_dies(run, x, w, b, mine: bool) -> None:
    """Exchanges halos again and again; one process ends without a word."""
    step = jax.jit(lambda x, w, b: jnp.tanh(run(x, w, b))[:, ::2, ::2, ::2, :3])
    x = jax.device_put(x, run.sharding("inputs"))
    for i in range(10**9):
        x = step(x, w, b).block_until_ready()
        if mine and i == 10:
            os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), "dies" in sys.argv)
