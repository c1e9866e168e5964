"""Over a mesh, what is seldom met: axes in another order, biases and batches cut apart, mapped axes, other ends.

Run by `test_sharding.py` in a process of its own, which has the devices.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import conv3dt_jax as c3t
from tests.eight_devices import QUICK, C, T, call, collectives, operands
from tests.eight_devices_declared import AUTO, EXPLICIT, check, mesh, training

KINDS = pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
MOVES = {"collective-permute", "all-reduce"}


def put(on, array, *entries):
    return jax.device_put(array, NamedSharding(on, P(*entries)))


@KINDS
@pytest.mark.parametrize("names", [("b", "a"), ("c", "a"), ("c", "a", "b")], ids="".join)
@pytest.mark.parametrize("spec", [T(3, 2, "same"), C(3, 1, "same"), C(3, 2, "circular")], ids=["up", "plain", "around"])
def test_the_first_of_several_mesh_axes_is_the_outermost_whatever_their_order_in_the_mesh(spec, names, kind) -> None:
    x, w, b = operands(spec, (16, 4, 4))
    on, plain = mesh(kind=kind), functools.partial(call, spec)
    want = training(plain)(x, w, b)
    placed = put(on, x, None, names), put(on, w), put(on, b)
    with jax.set_mesh(on):
        check(training(c3t.sharded(on, spec, depth=names))(*placed), want)
        check(training(plain)(*placed), want)


def test_parts_of_a_mesh_axis_may_come_in_any_order() -> None:
    _, w, b = operands(T(3, 2, "same"), (8, 8, 4))
    y = jnp.asarray(np.random.default_rng(0).normal(size=(8, 2, 8, 4, 4)), jnp.float32)

    def run(y):
        moved = y.reshape(2, 2, 2, 2, 8, 4, 4).transpose(3, 2, 1, 0, 4, 5, 6).reshape(2, 8, 8, 4, 4)
        return call(T(3, 2, "same"), moved, w, b)

    check(jax.jit(run)(put(mesh((8,)), y, "a")), run(y))


def test_a_bias_that_is_cut_otherwise_than_the_filters() -> None:
    on = mesh(kind=EXPLICIT)
    for spec in (C(3, 2, "same"), C(3, 1, "same"), T(3, 2, "same")):
        x, w, b = operands(spec, (8, 4, 4))
        want = call(spec, x, w, b)
        check(jax.jit(functools.partial(call, spec))(put(on, x, "a"), put(on, w), put(on, b, "a")), want)
        run = c3t.sharded(on, spec, depth="a", filters="b")
        with jax.set_mesh(on):
            check(jax.jit(run)(x, w, put(on, b, "a")), want)


@KINDS
@pytest.mark.parametrize("space", [(8, 9, 4), (9, 16, 4), (10, 16, 4)], ids=str)
def test_a_circle_that_strides_do_not_divide_is_cut_too_and_only_halos_travel(kind, space) -> None:
    spec = C(3, 3, "circular")
    x, w, b = operands(spec, space)
    on = mesh(kind=kind)
    run = c3t.sharded(on, spec, depth="a", height="c")
    with jax.set_mesh(on):
        check(training(run)(x, w, b), training(functools.partial(call, spec))(x, w, b))
        loss = jax.grad(lambda x, w, b: jnp.sum(jnp.sin(run(x * x, w, b))), (0, 1))
        if space == (10, 16, 4):  # inputs and outputs divide
            placed = jax.device_put(x, run.sharding("inputs"))
            found = collectives(jax.jit(loss, compiler_options=QUICK).lower(placed, w, b).compile())
            assert set(found) == MOVES
            plan = c3t.explain(x.shape, spec, platforms=["cpu"], mesh=on, mesh_axes=run.mesh_axes).mesh
            said = [e.bytes for e in (*plan.result_exchanges, *plan.gradient_exchanges) if e.kind != "all-reduce"]
            assert sum(4 * int(np.prod(shape)) for shape in found["collective-permute"]) == sum(said)
    typed = put(on, x, None, "a") if space[0] % 2 == 0 else put(on, x, None, None, "a")
    check(jax.jit(functools.partial(call, spec))(typed, put(on, w), put(on, b)), call(spec, x, w, b))


@KINDS
def test_dimensions_of_batch_of_any_number(kind) -> None:
    spec, on = T(3, 2, "same"), mesh(kind=kind)
    x, w, b = operands(spec, (8, 4, 4))
    many = jnp.stack([x, 2 * x, 3 * x])
    want = call(spec, many, w, b)
    with jax.set_mesh(on):
        for axes in ({"depth": "a", "batch": "b"}, {"batch": ("a", "b")}, {"height": "c"}):
            check(c3t.sharded(on, spec, **axes)(many, w, b), want)
            check(c3t.sharded(on, spec, **axes)(many[:2], w, b), want[:2])
            check(c3t.sharded(on, spec, **axes)(x[0], w, b), call(spec, x[0], w, b))
        for entries in ((None, "b"), (None, "b", "a"), (None, None, "a")):
            got = jax.jit(functools.partial(call, spec))(put(on, many, *entries), put(on, w), put(on, b))
            check(got, want)
            if kind == EXPLICIT:
                assert got.sharding.is_equivalent_to(NamedSharding(on, P(*entries)), 6)


@KINDS
def test_a_mapped_axis_keeps_the_mesh_axes_that_it_lies_over(kind) -> None:
    spec, on = T(3, 2, "same", use_bias=False), mesh(kind=kind)
    x, w, _ = operands(spec, (8, 4, 4))
    plain = lambda x, w: c3t.apply({"kernel": w}, x, spec)
    declared = c3t.sharded(on, spec, depth="a")
    xs, ws = jnp.stack([x, 2 * x]), jnp.stack([w, 3 * w])
    gradient = lambda run: lambda x, w: jax.grad(lambda x, w: (run(x, w) ** 2).sum(), (0, 1))(x, w)
    mapped = {"inputs": ((0, None), xs, w), "kernel": ((None, 0), x, ws), "both": ((0, 0), xs, ws)}
    for dims, x_, w_ in mapped.values():
        for run in (plain, declared):
            over = ["b"] if dims[0] == 0 else []
            cut = [*over, None, "a"] if run is declared else over
            placed = put(on, x_, *cut), put(on, w_, *(["b"] if dims[1] == 0 else []))
            name = "b" if kind == AUTO and run is declared else None  # types say it, or the compiler finds it
            for one, want in ((run, plain), (gradient(run), gradient(plain))):
                program = jax.jit(jax.vmap(one, dims, spmd_axis_name=name), compiler_options=QUICK)
                with jax.set_mesh(on):
                    compiled = program.lower(*placed).compile()
                    got = compiled(*placed)
                check(got, jax.vmap(want, dims)(x_, w_), 1e-4)
                if run is declared or kind == EXPLICIT:
                    assert set(collectives(compiled)) <= MOVES
                    first = ["b", None, "a"] if run is declared else ["b"]
                    assert jax.tree.leaves(got)[0].sharding.is_equivalent_to(NamedSharding(on, P(*first)), 6)


@pytest.mark.parametrize("entries", [(None, "a"), (None, None, "a")], ids=["batch", "depth"])
def test_a_mapped_axis_that_is_whole_leaves_what_is_cut_where_it_is(entries) -> None:
    spec, on = T(2, 2, use_bias=False), mesh(kind=EXPLICIT)
    x, w, _ = operands(spec, (8, 4, 4))
    run = jax.vmap(lambda x, w: c3t.apply({"kernel": w}, x, spec), (0, None))
    compiled = jax.jit(run).lower(put(on, jnp.stack([x, 2 * x]), *entries), put(on, w)).compile()
    assert collectives(compiled) == {}


def test_arrays_that_lie_nowhere_in_particular_are_cut_in_a_program() -> None:
    spec = T(3, 2, "same")
    x, w, b = operands(spec, (8, 4, 4))
    run = c3t.sharded(mesh(), spec, depth="a")
    found = jax.jit(run)(x, w, b)  # no mesh is set
    assert found.sharding.is_equivalent_to(run.sharding("outputs"), 5)
    check(found, call(spec, x, w, b))


@KINDS
def test_per_example_gradients_of_cut_examples(kind) -> None:
    spec, on = T(3, 2, "same", use_bias=False), mesh(kind=kind)
    x, w, _ = operands(spec, (8, 4, 4), batch=4)
    run = jax.vmap(jax.grad(lambda w, x: (c3t.apply({"kernel": w}, x, spec) ** 2).sum()), (None, 0))
    with jax.set_mesh(on):
        got = jax.jit(run)(put(on, w), put(on, x, ("a", "b")))
    check(got, run(w, x), 1e-4)


def test_symbolic_sizes_are_refused_over_a_mesh() -> None:
    spec = T(3, 2, "same")
    _, w, b = operands(spec, (8, 4, 4))
    run = c3t.sharded(mesh(), spec, depth="a")
    (batch,) = jax.export.symbolic_shape("n")
    shape = jax.ShapeDtypeStruct((batch, 8, 4, 4, 4), jnp.float32)
    with pytest.raises(ValueError, match=r"`inputs` have symbolic sizes, \(n, 8, 4, 4\); over a mesh"):
        jax.export.export(jax.jit(lambda x: run(x, w, b)))(shape)


def test_an_abstract_mesh_needs_devices() -> None:
    spec, on = T(3, 2, "same"), mesh()
    x, w, b = operands(spec, (8, 4, 4))
    run = c3t.sharded(on.abstract_mesh, spec, depth="a")
    with pytest.raises(ValueError, match="`mesh` is an AbstractMesh, which has no devices; call this under"):
        run(x, w, b)
    with jax.set_mesh(on):
        check(run(x, w, b), call(spec, x, w, b))
    check(run(put(on, x), w, b), call(spec, x, w, b))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_mesh_axes_of_one_device_cost_nothing(kind) -> None:
    spec, on = T(3, 2, "same"), mesh((1, 1, 2), kind)
    x, w, b = operands(spec, (8, 4, 4))
    run = c3t.sharded(on, spec, depth="a", channels="b", batch="c")
    placed = [jax.device_put(a, run.sharding(n)) for n, a in (("inputs", x), ("kernel", w), ("bias", b))]
    compiled = jax.jit(run).lower(*placed).compile()
    assert collectives(compiled) == {}
    check(compiled(*placed), call(spec, x, w, b))


@KINDS
@pytest.mark.parametrize("shards", [3, 5])
def test_sizes_that_do_not_divide(shards, kind) -> None:
    spec = T(3, 2, "same")
    x, w, b = operands(spec, (10, 6, 5), batch=3)
    for cut in ({"depth": "a"}, {"batch": "a"}):
        run = c3t.sharded(mesh((shards,), kind), spec, **cut)
        with jax.set_mesh(run.mesh):
            check(training(run)(x, w, b), training(functools.partial(call, spec))(x, w, b))
        check(run(x, w, b), call(spec, x, w, b))


@KINDS
def test_every_transformation(kind) -> None:
    spec = T(3, 2, "same")
    x, w, b = operands(spec, (8, 4, 4))
    down = C(3, 2, "same", use_bias=False)
    on = mesh(kind=kind)

    def tower(run, x, w):
        step = lambda carry, _: (jnp.tanh(c3t.apply({"kernel": w}, run(carry, w, b), down)), None)
        return jax.lax.scan(step, x, None, length=2)[0]

    programs = {
        "gradient of scan": lambda run, x, w: jax.grad(lambda x, w: tower(run, x, w).sum(), (0, 1))(x, w),
        "remat": lambda run, x, w: jax.grad(lambda x, w: jax.checkpoint(run)(x, w, b).sum(), (0, 1))(x, w),
        "vmap": lambda run, x, w: jax.vmap(run, (0, None, None))(jnp.stack([x, 2 * x]), w, b),
        "vmap of kernels": lambda run, x, w: jax.vmap(run, (None, 0, None))(x, jnp.stack([w, 2 * w]), b),
        "gradients of vmap": lambda run, x, w: jax.grad(
            lambda x, w: (jax.vmap(run, (None, 0, None))(x, jnp.stack([w, 2 * w]), b) ** 2).sum(), (0, 1)
        )(x, w),
        "vmap of both": lambda run, x, w: jax.vmap(run, (0, 0, None))(jnp.stack([x, x]), jnp.stack([w, 2 * w]), b),
        "jvp": lambda run, x, w: jax.jvp(run, (x, w, b), (x, w, b)),
        "hessian": lambda run, x, w: jax.jvp(
            jax.grad(lambda x, w: (run(x, w, b) ** 3).sum(), (0, 1)), (x, w), (x, w)
        ),
        "batch dimensions": lambda run, x, w: run(x[None], w, b),
    }  # fmt: skip
    plain = functools.partial(call, spec)
    for cut in ({"batch": "a", "filters": "b", "channels": "c"}, {"depth": "a", "height": "c"}):
        run = c3t.sharded(on, spec, **cut)
        placed = jax.device_put(x, run.sharding("inputs")), jax.device_put(w, NamedSharding(on, P()))
        scanned = "depth" in cut  # with cut channels the carry would change its type
        for program in [programs[name] for name in programs if scanned or "scan" not in name]:
            with jax.set_mesh(on):
                got = jax.jit(functools.partial(program, run), compiler_options=QUICK)(*placed)
            check(got, jax.jit(functools.partial(program, plain), compiler_options=QUICK)(x, w), 1e-4)
        typed = jax.jit(plain, compiler_options=QUICK)(*placed, jax.device_put(b, NamedSharding(on, P())))
        check(typed, plain(x, w, b))
