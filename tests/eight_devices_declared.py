"""`sharded`, layers with `mesh_axes` and arrays whose types say how they are cut, on eight virtual devices.

Run by `test_sharding.py` in a process of its own, which has the devices.
"""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import conv3dt_jax as c3t
from tests.eight_devices import CASES, QUICK, C, T, call, collectives, operands
from tests.test_tiled import back, layout, problems

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
BEYOND = {"windows beyond the neighbours", "dilation with strides"}
NAMES = [name for name in CASES if name not in BEYOND]


def mesh(sizes=(2, 2, 2), kind=AUTO):
    devices = jax.devices()[: int(np.prod(sizes))]
    return jax.make_mesh(sizes, tuple("abc"[: len(sizes)]), axis_types=(kind,) * len(sizes), devices=devices)


def dimensions(spec, where, kernel_where):
    """Names for `sharded` that mean the same as the specs of inputs and kernel."""
    space = ("depth", "height", "width")
    of_inputs = ("batch", "channels", *space) if spec.data_format == "channels_first" else ("batch", *space, "channels")
    of_kernel = ("channels", "filters") if isinstance(spec, c3t.Conv3DSpec) else ("filters", "channels")
    found = dict(zip(of_inputs, where, strict=False)) | dict(zip(of_kernel, tuple(kernel_where)[3:], strict=False))
    if spec.groups > 1 and "channels" in found:
        found["groups"] = found.pop("channels")
    return {name: value for name, value in found.items() if value}


def training(run):
    """The result, and the gradients of a loss of it."""

    def loss(x, w, b):
        y = run(x, w, b)
        return jnp.sum(jnp.sin(y)), y

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True), compiler_options=QUICK)


def check(got, want, tolerance=1e-5) -> None:
    for mine, expected in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        scale = max(1.0, float(jnp.abs(expected).max(initial=0)))
        np.testing.assert_allclose(mine, expected, rtol=tolerance, atol=tolerance * scale)


def check_training(got, want) -> None:
    """The loss is a sum of terms of either sign: its rounding is that of the terms, not of what is left of them."""
    ((loss, y), gradients), ((wanted, y_wanted), gradients_wanted) = got, want
    check((loss / y.size, y, gradients), (wanted / y.size, y_wanted, gradients_wanted))


@pytest.mark.parametrize(("name", "kind"), [(name, (AUTO, EXPLICIT)[i % 2]) for i, name in enumerate(NAMES[::2])])
def test_declared_results_and_gradients_are_those_of_one_device(name, kind) -> None:
    spec, space, sizes, where, kernel_where, *channels = CASES[name]
    x, w, b = operands(spec, space, *channels)
    on = mesh(sizes, kind)
    run = c3t.sharded(on, spec, **dimensions(spec, where, kernel_where))
    declared = run.sharding("outputs")
    shape = spec.output_shape(x.shape)
    even = all(size % run._placement.over(entry) == 0 for size, entry in zip(shape, declared.spec, strict=True))
    placed = [jax.device_put(a, run.sharding(n)) for n, a in (("inputs", x), ("kernel", w), ("bias", b))]
    with jax.set_mesh(on):
        compiled = training(run).lower(*placed).compile()
        (loss, y), gradients = compiled(*placed)
    check_training(((loss, y), gradients), training(functools.partial(call, spec))(x, w, b))
    if even:  # JAX puts others together where a program ends
        assert y.sharding.is_equivalent_to(declared, 5)
        check_plan(c3t.explain(x.shape, spec, platforms=["cpu"], mesh=on, mesh_axes=run.mesh_axes).mesh, compiled, b)


def check_plan(plan, compiled, b) -> None:
    """`explain` says what the compiled program sends, to the byte, and about what it holds."""
    found = {"collective-permute": 0, "all-reduce": 0}
    for kind, shapes in collectives(compiled).items():
        found[kind] += sum(4 * int(np.prod(shape)) for shape in shapes if shape)  # float32; a loss is no array
    said = dict.fromkeys(found, 0)
    for exchange in (*plan.result_exchanges, *plan.gradient_exchanges):
        said[exchange.kind] += exchange.bytes
    assert found["collective-permute"] == said["collective-permute"]
    more = found["all-reduce"] - said["all-reduce"]  # XLA may sum a bias up along one axis of the mesh after the other
    assert more in (0, b.nbytes, 2 * b.nbytes)
    memory = compiled.memory_analysis()
    held = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    assert 0.4 < held / (plan.gradients["cpu"].peak_bytes + 4 * np.prod(plan.output_shape)) < 1.6


@pytest.mark.parametrize("name", NAMES[1::2])
def test_arrays_whose_types_say_how_they_are_cut(name) -> None:
    spec, space, sizes, where, kernel_where, *channels = CASES[name]
    x, w, b = operands(spec, space, *channels)
    on = mesh(sizes, EXPLICIT)
    placed = [jax.device_put(a, NamedSharding(on, p)) for a, p in ((x, where), (w, kernel_where), (b, P()))]
    got = training(functools.partial(call, spec))(*placed)
    check_training(got, training(functools.partial(call, spec))(x, w, b))
    (_, y), (dx, dw, _) = got
    run = c3t.sharded(on, spec, **dimensions(spec, where, kernel_where))
    typed = run.sharding("outputs").spec
    whole = [None if size % run._placement.over(e) else e for size, e in zip(y.shape, typed, strict=True)]
    assert jax.typeof(y).sharding.spec == P(*whole)
    for gradient, operand in ((dx, placed[0]), (dw, placed[1])):
        assert jax.typeof(gradient).sharding == jax.typeof(operand).sharding


def is_refused(run, *operands):
    """Whether a kernel reaches too far, or an axis is too short."""
    try:
        jax.eval_shape(run, *operands)
    except ValueError as error:
        return "reaches" in str(error) or "give it at most" in str(error)
    return False


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(problem=problems(), axes=st.permutations("abc"), dims=st.permutations(["batch", "depth", "height", "width"]))
def test_any_operation_may_be_cut_anywhere(problem, axes, dims) -> None:
    spec, (x, w, b), ct, (want, want_dx, want_dw), _ = problem
    move = functools.partial(layout, data_format=spec.data_format)
    run = c3t.sharded(mesh((2, 4)), spec, **{dims[0]: "a", dims[1]: "b"})

    def train(run, x, w, b, ct):
        y, pullback = jax.vjp(run, x, w, b)
        return y, *pullback(ct)

    with jax.enable_x64(True):
        compiled = jax.jit(train, static_argnums=0, compiler_options=QUICK)
        if is_refused(run, move(x), w, b):
            run = c3t.sharded(run.mesh, spec, batch=("a", "b"))
        y, dx, dw, db = compiled(run, move(x), w, b, move(ct))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10)
    close(back(y, spec.data_format), want)
    close(back(dx, spec.data_format), want_dx)
    close(dw, want_dw)
    close(db, ct.reshape(-1, ct.shape[-1]).sum(0))


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
@pytest.mark.parametrize("spec", [T(3, 2, "same"), T(5, 1, "circular"), C(3, 2, "same")], ids=["up", "around", "down"])
def test_only_halos_travel_in_training(spec, kind) -> None:
    x, w, b = operands(spec, (16, 8, 8))
    run = c3t.sharded(mesh(kind=kind), spec, depth=("a", "b"), height="c")

    def loss(x, w, b):
        return jnp.sum(run(x, w, b) ** 2)

    x = jax.device_put(x, run.sharding("inputs"))
    with jax.set_mesh(run.mesh):
        compiled = jax.jit(jax.grad(loss, (0, 1, 2)), compiler_options=QUICK).lower(x, w, b).compile()
    found = collectives(compiled)
    assert set(found) == {"collective-permute", "all-reduce"}
    assert {int(np.prod(shape)) for shape in found["all-reduce"]} == {w.size, b.size}  # the gradients alone
    check_plan(c3t.explain(x.shape, spec, platforms=["cpu"], mesh=run.mesh, mesh_axes=run.mesh_axes).mesh, compiled, b)
    assert compiled.output_shardings[0].is_equivalent_to(run.sharding("inputs"), 5)


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
def test_layers_take_the_axes_of_the_mesh_that_is_set(kind) -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 4, 4, 3)), jnp.float32)
    on, axes = mesh(kind=kind), {"batch": "a", "depth": ("b", "c")}
    cut = NamedSharding(on, P("a", ("b", "c")))
    layer = c3t.Conv3DTranspose(4, 3, 2, "same", activation="relu", mesh_axes=axes)
    variables = layer.init(jax.random.key(0), x[:, :1])
    want = layer.apply(variables, x)
    logical = layer.clone(mesh_axes={"batch": "samples", "depth": "slices", "filters": "features"})
    rules = [("samples", "a"), ("slices", ("b", "c")), ("features", None)]
    object_layer = c3t.nnx.Conv3DTranspose(3, 4, 3, 2, "same", activation="relu", mesh_axes=axes, rngs=nnx.Rngs(0))
    expected = object_layer(x)
    with jax.set_mesh(on):
        again = layer.init(jax.random.key(0), x[:, :1])  # smaller than the mesh
        check(again, variables)
        found = jax.jit(layer.apply)(variables, x)
        check(found, want)
        assert found.sharding.is_equivalent_to(cut, 5)
        with nn.logical_axis_rules(rules):
            assert jax.jit(logical.apply)(variables, x).sharding.is_equivalent_to(cut, 5)
        with pytest.raises(ValueError, match=r"`batch='samples'` is no axis of the mesh, which has 'a' \(2\)"):
            logical.apply(variables, x)
        found = nnx.jit(lambda layer, x: layer(x))(object_layer, x)
        check(found, expected)
        assert found.sharding.is_equivalent_to(cut, 5)
        for convolution in (c3t.Conv3D(4, 3, mesh_axes=axes), c3t.Conv3D(4, 3, 2, "same", mesh_axes=axes)):
            variables = convolution.init(jax.random.key(0), x)
            check(jax.jit(convolution.apply)(variables, x), convolution.clone(mesh_axes=None).apply(variables, x))


def test_a_config_has_the_axes() -> None:
    layer = c3t.Conv3DTranspose(4, 3, mesh_axes={"batch": "a", "depth": ["b", "c"]})
    assert layer.mesh_axes == c3t.MeshAxes(batch="a", depth=("b", "c"))
    config = json.loads(json.dumps(layer.get_config()))
    assert config["mesh_axes"] == {"batch": "a", "depth": ["b", "c"]}
    assert c3t.Conv3DTranspose.from_config(config) == layer
    assert "mesh_axes" not in c3t.Conv3DTranspose(4, 3).get_config()


ERRORS = {
    "unknown axis": ({"depth": "z"}, ValueError, r"`depth='z'` is no axis of the mesh, which has 'a' \(2\), 'b' \(2\)"),
    "used twice": ({"depth": "a", "height": ("b", "a")}, ValueError, "'a' is given for `depth` and `height`"),
    "no name": ({"depth": 2}, TypeError, "`depth=2` must be the name of a mesh axis"),
    "channels": ({"channels": ("a", "b", "c")}, ValueError, "cuts 4 channels over 8 devices, which do not divide them"),
    "filters": ({"filters": ("a", "b", "c")}, ValueError, "cuts 4 filters over 8 devices"),
    "groups": ({"groups": "a"}, ValueError, "cuts 1 groups over 2 devices"),
    "halo": ({"depth": ("a", "b", "c")}, ValueError,
        "cuts 8 elements of the inputs' depth over 8 devices, 1 each, but the kernel reaches 2 into the neighbours'; "
        "cut it over 4 at most"),
}  # fmt: skip


def test_more_devices_than_elements_are_refused() -> None:
    x, w, b = operands(T(3, 1, "same"), (4, 4, 4))
    with pytest.raises(ValueError, match="cuts 4 elements of the inputs' width over 8 devices; give it at most 4"):
        c3t.sharded(mesh((8,)), T(3, 1, "same"), width="a")(x, w, b)


@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_be_cut_is_refused_when_it_is_traced(name) -> None:
    keywords, error, message = ERRORS[name]
    spec = T(5, 1, "same")
    x, w, b = operands(spec, (8, 4, 4))
    with pytest.raises(error, match=message):
        jax.eval_shape(c3t.sharded(mesh(), spec, **keywords), x, w, b)


def test_other_refusals() -> None:
    spec = T(3, 2, "same", groups=2)
    x, w, b = operands(spec, (4, 4, 4))
    with pytest.raises(ValueError, match="cuts one of 2 groups; give `groups` instead"):
        c3t.sharded(mesh(), spec, filters="a")(x, w, b)
    with pytest.raises(TypeError, match=r"`mesh` must be a jax\.sharding.Mesh, not tuple"):
        c3t.sharded((2, 4), spec)
    with pytest.raises(ValueError, match="`mesh_axes` has no dimension 'time'; it has batch, depth"):
        c3t.Conv3DTranspose(4, 3, mesh_axes={"time": "a"})
    with pytest.raises(TypeError, match="`mesh_axes='a'` must be a MeshAxes, or a mapping from dimensions"):
        c3t.Conv3DTranspose(4, 3, mesh_axes="a")
    with pytest.raises(ValueError, match=r"`spec.use_bias=True`, but a bias is missing"):
        c3t.sharded(mesh(), spec)(x, w)
    mixed = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AUTO, EXPLICIT))
    with pytest.raises(ValueError, match="`depth='a'` is an axis of type Auto in a mesh that has Explicit ones too"):
        c3t.sharded(mixed, spec, depth="a")
    with pytest.raises(ValueError, match=r"`name='output'` must be one of 'inputs', 'kernel', 'bias', 'outputs'"):
        c3t.sharded(mesh(), spec).sharding("output")

    def inside(x):
        return c3t.sharded(jax.sharding.get_abstract_mesh(), spec, batch="a")(x, w, b)

    with pytest.raises(ValueError, match=r"`batch='a'` is a manual axis here, inside of jax\.shard_map"):
        jax.shard_map(inside, mesh=mesh(), in_specs=P("a"), out_specs=P("a"))(x)


def test_exported_with_its_halos() -> None:
    spec = T(3, 2, "same")
    x, w, b = operands(spec, (8, 4, 4))
    run = c3t.sharded(mesh(), spec, depth="a", height="b")
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=run.sharding("inputs"))
    exported = jax.export.deserialize(jax.export.export(jax.jit(lambda x: run(x, w, b)))(shape).serialize())
    assert exported.nr_devices == 8
    check(jax.jit(exported.call)(jax.device_put(x, run.sharding("inputs"))), call(spec, x, w, b))
