"""Plain `jax.jit` on eight virtual devices: results and gradients of one device, and nothing but halos travels.

Run by `test_sharding.py` in a process of its own, which has the devices.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import conv3dt_jax as c3t

QUICK = {"xla_backend_optimization_level": "0"}
CUBE = (2, 2, 2)
FIRST = {"data_format": "channels_first"}
T = functools.partial(c3t.Conv3DTransposeSpec, 4)
C = functools.partial(c3t.Conv3DSpec, 4)


def mesh(sizes=CUBE):
    devices = jax.devices()[: int(np.prod(sizes))]
    return jax.make_mesh(sizes, tuple("abc"[: len(sizes)]), axis_types=(AxisType.Auto,) * len(sizes), devices=devices)


def operands(spec, space, channels=4, batch=2, dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = spec.join_shape((batch,), space, channels), spec.kernel_shape(channels), (spec.filters,)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def call(spec, x, w, b):
    return c3t.apply({"kernel": w, "bias": b}, x, spec)


def put(on, *arrays):
    return [jax.device_put(array, NamedSharding(on, place)) for array, place in arrays]


def divides(on, where, shape) -> bool:
    """Whether all shards of such a shape are of one size."""
    try:
        NamedSharding(on, where).shard_shape(shape)
    except ValueError:
        return False
    return True


def collectives(compiled) -> dict[str, list[tuple[int, ...]]]:
    """The shapes of what travels, by kind."""
    found = re.findall(
        r"= (\(.*?\)|\S+) (all-gather|all-reduce|collective-permute|all-to-all|reduce-scatter)(?:-start)?\(",
        compiled.as_text(),
    )
    kinds: dict[str, list[tuple[int, ...]]] = {}
    for arrays, kind in found:  # one, or several in a tuple
        for shape in re.findall(r"\w+\[([\d,]*)\]", arrays):
            kinds.setdefault(kind, []).append(tuple(int(size) for size in shape.split(",") if size))
    return kinds


# spec, space, mesh, where the inputs and the kernel lie.
CASES = {
    "batch": (T(3, 2, "same"), (4, 4, 4), CUBE, P("a"), P()),
    "depth": (T(3, 2, "same"), (8, 4, 4), CUBE, P(None, "a"), P()),
    "three axes": (T(4, 2, 1), (4, 4, 4), CUBE, P(None, "a", "b", "c"), P()),
    "two mesh axes in one": (T(3, 2, "same"), (8, 4, 6), CUBE, P(None, ("a", "b"), None, "c"), P()),
    "batch and space": (T(3, 2, "same"), (4, 4, 4), CUBE, P("a", "b", "c"), P()),
    "uneven outputs": (T(3, 2, "valid"), (8, 4, 4), CUBE, P(None, ("a", "b"), "c"), P()),
    "windows beyond the neighbours": (T(7, 1, "same"), (8, 4, 4), (8,), P(None, "a"), P()),
    "dilation with strides": (T(3, 2, "valid", dilation_rate=3), (8, 4, 4), (4,), P(None, "a"), P()),
    "gaps": (T(1, 3, "valid", output_padding=1), (8, 4, 4), (4,), P(None, "a"), P()),
    "circular": (T(3, 2, "circular"), (8, 4, 4), CUBE, P(None, ("a", "b"), "c"), P()),
    "channels": (T(3, 2, "same"), (4, 4, 4), CUBE, P(None, None, None, None, "a"), P()),
    "filters": (T(3, 2, "same"), (4, 4, 4), CUBE, P("b"), P(None, None, None, "a")),
    "channels and filters": (T(3, 2, "same"), (4, 4, 4), CUBE, P(), P(None, None, None, "a", "b")),
    "groups": (T(3, 2, "same", groups=2), (4, 4, 4), CUBE, P(None, "b", None, None, "a"), P()),
    "groups of one channel": (T(3, 2, "same", groups=4), (4, 4, 4), CUBE, P(None, None, None, None, ("a", "b")), P()),
    "groups of one filter": (T(3, 2, "same", groups=4), (4, 4, 4), CUBE, P("c", None, None, None, "a"), P(), 8),
    "groups, one filter, one channel": (C(3, 2, "same", groups=4), (4, 4, 4), CUBE, P(None, "a", "b"), P()),
    "channels first": (T(3, 2, "same", **FIRST), (8, 4, 4), CUBE, P("a", None, "b", "c"), P()),
    "convolution": (C(3, 2, "same"), (8, 8, 8), CUBE, P(None, ("a", "b"), "c"), P()),
    "convolution without strides": (C(3, 1, "same"), (8, 8, 4), CUBE, P("a", "b", "c"), P()),
    "convolution, uneven": (C(3, 2, "valid"), (12, 8, 8), CUBE, P(None, ("a", "b"), "c"), P()),
    "convolution, circular, uneven": (C(3, 2, "circular"), (12, 8, 8), CUBE, P(None, ("a", "b"), "c"), P()),
    "convolution of channels": (C(3, 2, "same"), (4, 4, 4), CUBE, P(), P(None, None, None, "a", "b")),
    "convolution of groups": (C(3, 2, "same", groups=4), (4, 4, 4), CUBE, P(None, None, None, None, ("a", "b")), P()),
}


@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_are_those_of_one_device_and_only_halos_travel(name) -> None:
    spec, space, sizes, where, kernel_where, *channels = CASES[name]
    x, w, b = operands(spec, space, *channels)
    run = functools.partial(call, spec)

    def train(x, w, b, ct):
        y, pullback = jax.vjp(run, x, w, b)
        return y, *pullback(ct)

    ct = jnp.asarray(np.random.default_rng(1).normal(size=spec.output_shape(x.shape)), jnp.float32)
    want = jax.jit(train, compiler_options=QUICK)(x, w, b, ct)
    on = mesh(sizes)
    placed = put(on, (x, where), (w, kernel_where), (b, P()), (ct, P()))
    compiled = jax.jit(train, compiler_options=QUICK).lower(*placed).compile()
    for got, expected in zip(compiled(*placed), want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * float(jnp.abs(expected).max()))
    space_of = slice(2, 5) if spec.data_format == "channels_first" else slice(1, 4)
    if not divides(on, P(*tuple(where)[space_of]), ct.shape[space_of]):  # JAX gathers them where a program ends

        def reduced(x, w, b):
            return call(spec, x, w, b).sum()

        compiled = jax.jit(reduced, compiler_options=QUICK).lower(*placed[:3]).compile()
    found = collectives(compiled)
    assert set(found) <= {"collective-permute", "all-reduce"}
    piece = int(np.prod(placed[0].sharding.shard_shape(x.shape)))
    outputs = int(np.prod(ct.shape)) * piece // x.size
    for shape in found.get("collective-permute", []):
        assert np.prod(shape) <= 2 * max(piece, outputs)  # a halo in one axis holds those of the axes before


@pytest.mark.parametrize("name", ["channels", "channels and filters", "convolution of channels", "filters", "batch"])
def test_cut_channels_are_summed_up_once(name) -> None:
    spec, space, sizes, where, kernel_where = CASES[name]
    x, w, b = operands(spec, space)
    placed = put(mesh(sizes), (x, where), (w, kernel_where), (b, P()))
    found = collectives(jax.jit(functools.partial(call, spec), compiler_options=QUICK).lower(*placed).compile())
    assert {kind: len(shapes) for kind, shapes in found.items()} == ({"all-reduce": 1} if "channels" in name else {})


@pytest.mark.parametrize("implementation", ["dilated", "matmul", "phases", "winograd", "pallas"])
@pytest.mark.parametrize("spec", [T(3, 2, "same"), C(3, 1, "same")], ids=["transposed", "ordinary"])
def test_no_lowering_gathers_and_the_result_stays_cut(spec, implementation) -> None:
    spec = dataclasses.replace(spec, implementation=implementation)
    x, w, b = operands(spec, (8, 4, 4))
    placed = jax.device_put(x, NamedSharding(mesh(), P(None, "a", "b")))
    compiled = jax.jit(functools.partial(call, spec), compiler_options=QUICK).lower(placed, w, b).compile()
    assert set(collectives(compiled)) == {"collective-permute"}
    assert compiled.output_shardings.spec == P(None, "a", "b")
    assert all(shape.count(1) >= 1 for shape in collectives(compiled)["collective-permute"])  # one slice of an axis


@pytest.mark.parametrize("shards", [3, 5, 8])
@pytest.mark.parametrize(
    "spec",
    [T(3, 2, "same"), T(4, 3, "circular"), C(3, 2, "same"), C(3, 1, "valid")],
    ids=["same", "circular", "strided", "plain"],
)
def test_sizes_that_do_not_divide(spec, shards) -> None:
    x, w, b = operands(spec, (10, 4, 4), batch=3)
    want = call(spec, x, w, b)
    on = mesh((shards,))

    def run(x, w, b, dim):
        cut = NamedSharding(on, P(*[None] * dim, "a"))
        x = jax.lax.with_sharding_constraint(x, cut)

        def loss(x, w):
            y = jax.lax.with_sharding_constraint(call(spec, x, w, b), cut)
            return jnp.sum(jnp.sin(y)), y

        (_, y), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(x, w)
        return y, gradients

    placed = jax.device_put((x, w, b), NamedSharding(on, P()))
    _, wanted = jax.value_and_grad(lambda x, w: jnp.sum(jnp.sin(call(spec, x, w, b))), (0, 1))(x, w)
    for dim in (0, 1):
        y, gradients = jax.jit(run, static_argnums=3, compiler_options=QUICK)(*placed, dim)
        np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
        for got, expected in zip(gradients, wanted, strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", [T(3, 2, "same"), C(3, 2, "same"), C(3, 1, "same")], ids=["up", "down", "plain"])
@pytest.mark.parametrize("dim", [0, 1])
def test_what_lies_beyond_the_last_shard_may_be_anything(spec, dim) -> None:
    x, w, b = operands(spec, (10, 4, 4), batch=3)
    cut = NamedSharding(mesh((4,)), P(*[None] * dim, "a"))

    def gradients(x, w, cut=None):
        x = x if cut is None else jax.lax.with_sharding_constraint(x, cut)
        return jax.grad(lambda x, w: jnp.sum(jnp.sin(call(spec, 1 / x, w, b))), (0, 1))(x, w)  # infinite beyond

    placed = jax.device_put((x, w), NamedSharding(cut.mesh, P()))
    got = jax.jit(functools.partial(gradients, cut=cut))(*placed)
    for mine, expected in zip(got, gradients(x, w), strict=True):
        np.testing.assert_allclose(mine, expected, rtol=1e-3, atol=1e-3 * float(jnp.abs(expected).max()))


def test_dimensions_cut_over_parts_of_a_mesh_axis() -> None:
    spec = T(3, 2, "same")
    x, w, b = operands(spec, (4, 4, 4), batch=8)
    placed = jax.device_put(x, NamedSharding(mesh((8,)), P("a")))
    for shape in ((2, 16, 4, 4, 4), (4, 2, 4, 4, 4, 4)):
        run = lambda x, shape=shape: call(spec, x.reshape(shape), w, b)
        np.testing.assert_allclose(jax.jit(run)(placed), run(x), rtol=1e-5, atol=1e-5)
        compiled = jax.jit(lambda x, run=run: run(x).sum()).lower(placed).compile()
        assert set(collectives(compiled)) <= {"collective-permute", "all-reduce"}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int32, jnp.complex64])
def test_sums_over_devices_are_rounded_once(dtype) -> None:
    spec = T(3, 2, "same")
    x, w, b = (jnp.asarray(3 * a).astype(dtype) for a in operands(spec, (4, 4, 4), channels=8))
    placed = put(mesh(), (x, P("b", None, None, None, "a")), (w, P()))
    got, want = jax.jit(functools.partial(call, spec))(*placed, b), call(spec, x, w, b)
    assert got.dtype == want.dtype
    exact = dtype == jnp.int32
    wide = np.complex128 if dtype == jnp.complex64 else np.float64
    tolerance = 0 if exact else float(jnp.finfo(dtype).eps)
    largest = float(np.abs(np.asarray(want, wide)).max())
    sums = max(tolerance * (dtype == jnp.complex64), 1e-6 * (not exact)) * largest  # of float32, in another order
    np.testing.assert_allclose(np.asarray(got, wide), np.asarray(want, wide), rtol=tolerance, atol=sums)


def test_transformations_keep_the_cut() -> None:
    spec = T(3, 2, "same")
    x, w, b = operands(spec, (8, 4, 4))
    placed = jax.device_put(x, NamedSharding(mesh(), P(None, "a", "b")))
    run = functools.partial(call, spec)

    def tower(x, w):
        step = lambda carry, _: (jnp.tanh(run(carry, w, b)[:, ::2, ::2, ::2]), None)
        return jax.lax.scan(step, x, None, length=2)[0]

    programs = {
        "scan": tower,
        "gradient of scan": jax.grad(lambda x, w: tower(x, w).sum(), (0, 1)),
        "remat": jax.grad(lambda x, w: jax.checkpoint(run)(x, w, b).sum(), (0, 1)),
        "vmap": lambda x, w: jax.vmap(run, (0, None, None))(jnp.stack([x, 2 * x]), w, b),
        "jvp": lambda x, w: jax.jvp(run, (x, w, b), (x, w, b)),
        "second order": lambda x, w: jax.jvp(jax.grad(lambda x: (run(x, w, b) ** 3).sum()), (x,), (x,)),
        "slabs": lambda x, w: c3t.tiled(x, w, b, spec=spec, slabs=2),
    }
    for name, program in programs.items():
        compiled = jax.jit(program, compiler_options=QUICK).lower(placed, w).compile()
        assert set(collectives(compiled)) <= {"collective-permute", "all-reduce"}, name
        got, want = (jax.tree.leaves(value) for value in (compiled(placed, w), jax.jit(program)(x, w)))
        for mine, expected in zip(got, want, strict=True):
            np.testing.assert_allclose(mine, expected, rtol=2e-4, atol=2e-4, err_msg=name)


def test_exported_modules_and_manual_computations_are_as_before() -> None:
    spec = T(3, 2, "same")
    x, w, b = operands(spec, (8, 4, 4))
    on = mesh()
    want = call(spec, x, w, b)
    placed = jax.device_put(x, NamedSharding(on, P("a")))
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed.sharding)
    exported = jax.export.export(jax.jit(lambda x: call(spec, x, w, b)))(shape)
    np.testing.assert_allclose(jax.jit(exported.call)(placed), want, rtol=1e-5, atol=1e-5)
    for names in ({"a"}, {"a", "b", "c"}):
        local = jax.shard_map(
            functools.partial(call, spec),
            mesh=on,
            in_specs=(P("a"), P(), P()),
            out_specs=P("a"),
            axis_names=names,
        )
        np.testing.assert_allclose(jax.jit(local)(placed, w, b), want, rtol=1e-5, atol=1e-5)
