"""Which lowering runs, read off the lowered module; how much is compiled; and how often."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import conv3dt_jax as c3t
from conv3dt_jax import _choice, _primitives, _spec
from tests import oracle

PRIMITIVES = {"dilated": "stablehlo.convolution", "matmul": "stablehlo.dot_general", "phases": "stablehlo.dot_general"}


def module(platform="cpu", *, kernel=(3, 3, 3), channels=4, filters=4, dtype=jnp.float32, space=(4, 4, 4), **kwargs):
    """The StableHLO text of a call, lowered for one platform."""
    x = jax.ShapeDtypeStruct((1, *space, channels), dtype)
    w = jax.ShapeDtypeStruct((*kernel, filters, channels), dtype)
    run = jax.jit(functools.partial(c3t.conv3d_transpose, **kwargs))
    return export.export(run, platforms=[platform])(x, w).mlir_module()


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("implementation", list(PRIMITIVES))
def test_a_named_lowering_runs_on_every_platform(platform, implementation) -> None:
    text = module(platform, strides=2, implementation=implementation)
    assert PRIMITIVES[implementation] in text
    assert (set(PRIMITIVES.values()) - {PRIMITIVES[implementation]}).pop() not in text


@pytest.mark.parametrize(("channels", "products"), [(4, 1), (64, 4)], ids=["few", "many"])
def test_phases_multiplies_once_per_run_where_zeros_cost_more_than_gathering_again(channels, products) -> None:
    """Kernel 3, stride 2: phases with two taps and with one, in depth and in height."""
    text = module(strides=2, implementation="phases", channels=channels, filters=channels)
    assert text.count("stablehlo.dot_general") == products


def test_matmul_multiplies_once() -> None:
    assert module(strides=2, implementation="matmul").count("stablehlo.dot_general") == 1


@pytest.mark.parametrize(
    ("platform", "kwargs", "primitive"),
    [
        ("cpu", {"kernel": (2, 2, 2), "strides": 2}, "dot_general"),
        ("cuda", {"kernel": (2, 2, 2), "strides": 2}, "dot_general"),
        ("tpu", {"kernel": (2, 2, 2), "strides": 2}, "dot_general"),
        ("cpu", {"strides": 2}, "dot_general"),
        ("cuda", {"strides": 2}, "dot_general"),
        ("tpu", {"strides": 2}, "convolution"),
        ("cuda", {"strides": 2, "dtype": jnp.int32}, "dot_general"),
        ("cpu", {"kernel": (17, 17, 17), "space": (8, 8, 8)}, "dot_general"),
        ("cpu", {"kernel": (1, 1, 300), "space": (2, 2, 8)}, "dot_general"),
    ],
    ids=str,
)
def test_auto_follows_its_rule(platform, kwargs, primitive) -> None:
    text = module(platform, **kwargs)
    assert f"stablehlo.{primitive}" in text
    assert {"dot_general": "stablehlo.convolution", "convolution": "stablehlo.dot_general"}[primitive] not in text


def form(kernel, strides, channels, filters, space=(8, 8, 8), padding="valid", dtype="float32"):
    spec = _spec.Conv3DTransposeSpec(filters, kernel, strides, padding)
    dtype = jnp.dtype(dtype)
    return _primitives.Form(spec.geometry(space), channels, filters, 1, (dtype,) * 3, np.dtype("float32"), None, "auto")


def test_auto_on_cpu_writes_products_where_filters_are_few_and_gathers_patches_where_they_are_many() -> None:
    few, many = (_choice.choose("outputs", "cpu", form(3, 2, *sizes), 1) for sizes in ((64, 1), (8, 32)))
    assert (few, many) == ("matmul", "phases")


@pytest.mark.parametrize("sizes", [(64, 1), (8, 32)])
@pytest.mark.parametrize("kind", ["inputs", "kernel", "gradients"])
@pytest.mark.parametrize(("kernel", "strides"), [(2, 2), (3, 2), (5, 5)])
def test_auto_on_cpu_gathers_patches_for_the_gradients(kernel, strides, kind, sizes) -> None:
    assert _choice.choose(kind, "cpu", form(kernel, strides, *sizes), 1) == "phases"


@pytest.mark.parametrize(
    ("space", "batch", "kernel", "strides", "channels", "filters"),
    [((1, 1, 1), 16, 4, 1, 128, 256), ((2, 2, 2), 8, 3, 2, 256, 128), ((4, 64, 64), 1, 4, 1, 24, 1)],
)
def test_auto_on_cpu_does_not_multiply_padding(space, batch, kernel, strides, channels, filters) -> None:
    """Tiny volumes with many channels, and one filter: measured 3 to 30 times faster than the others."""
    assert _choice.choose("outputs", "cpu", form(kernel, strides, channels, filters, space), batch) == "matmul"


@pytest.mark.parametrize(
    ("space", "batch", "kernel", "strides", "channels", "filters", "padding", "name"),
    [
        ((4, 64, 64), 1, 7, 2, 128, 3, "same", "phases"),  # measured 4.6 times faster
        ((48, 48, 48), 4, (3, 4, 4), 1, 8, 1, "same", "matmul"),  # 7.6 times
        ((4, 4, 4), 2, 7, 1, 128, 64, "valid", "matmul"),  # 6 times
        ((1, 7, 7), 16, (1, 5, 5), (1, 2, 2), 32, 32, "same", "matmul"),  # 1.5 times: rows of a plane
        ((7, 21, 14), 1, 5, 1, 128, 64, "valid", "phases"),  # 8 times: blocks would repeat most products
    ],
)
def test_auto_on_cpu_weighs_products_against_patches(
    space, batch, kernel, strides, channels, filters, padding, name
) -> None:
    call = form(kernel, strides, channels, filters, space, padding)
    assert _choice.choose("outputs", "cpu", call, batch) == name


@pytest.mark.parametrize(
    ("kernel", "filters", "kind", "name"),
    [
        (3, 1, "outputs", "matmul"),
        (3, 1, "gradients", "matmul"),
        (2, 32, "outputs", "matmul"),
        (2, 32, "gradients", "phases"),
        (3, 32, "outputs", "phases"),
        (3, 32, "inputs", "phases"),
    ],
)
def test_auto_on_other_gpus_multiplies_and_never_convolves(kernel, filters, kind, name) -> None:
    assert _choice.choose(kind, "cuda", form(kernel, 2, 32, filters), 1) == name


@pytest.mark.parametrize(
    ("space", "batch", "kernel", "strides", "channels", "filters", "name"),
    [
        ((8, 8, 8), 1, 3, 2, 512, 256, "matmul"),  # measured 1.6 times faster
        ((4, 4, 4), 4, 4, 2, 512, 256, "matmul"),  # 1.7 times
        ((1, 3, 3), 1, (1, 4, 4), 1, 512, 512, "matmul"),  # 4 times, and 50 times faster than XLA's convolution
        ((1, 16, 16), 32, (1, 4, 4), (1, 2, 2), 128, 64, "matmul"),  # samples in blocks: 1.3 times
        ((16, 16, 16), 1, 3, 2, 256, 128, "phases"),
    ],
)
def test_auto_on_cpu_reads_large_kernels_as_they_lie(space, batch, kernel, strides, channels, filters, name) -> None:
    call = form(kernel, strides, channels, filters, space, "same")
    assert _choice.choose("outputs", "cpu", call, batch) == name


@pytest.mark.parametrize(
    ("kind", "space", "kernel", "strides", "channels", "filters", "convolves"),
    [
        ("outputs", (1, 128, 128), (1, 5, 5), 1, 32, 32, True),  # measured 3.3 times faster
        ("inputs", (1, 128, 128), (1, 5, 5), 1, 32, 32, True),  # 6 times
        ("gradients", (1, 128, 128), (1, 5, 5), 1, 32, 32, True),  # 3 times
        ("outputs", (1000, 1, 1), (31, 1, 1), 1, 32, 16, True),  # 3 times
        ("gradients", (1000, 1, 1), (31, 1, 1), 1, 32, 16, True),  # twice
        ("gradients", (64, 1, 1), (15, 1, 1), 1, 64, 64, False),  # short: 1.6 times slower
        ("outputs", (1, 128, 128), (1, 5, 5), 1, 4, 32, False),  # narrow: number by number
        ("outputs", (1, 4, 4), (1, 5, 5), 1, 128, 64, False),  # longer than the plane: 5 times slower there
        ("outputs", (2, 128, 128), (1, 5, 5), 1, 32, 32, False),  # a volume
        ("outputs", (1, 128, 128), (1, 5, 5), (1, 2, 2), 32, 32, False),
        ("outputs", (1, 10, 10), (1, 3, 3), 1, 128, 128, True),  # short: 1.5 times
        ("outputs", (1, 32, 32), (1, 5, 5), 1, 32, 16, True),  # many products for what they sum: 1.9 times
        ("outputs", (1, 14, 14), (1, 5, 5), 1, 512, 32, False),  # few filters: 1.7 times slower
        ("tangent", (1, 128, 128), (1, 5, 5), 1, 32, 32, True),  # both terms as the result: twice
    ],
)
def test_auto_on_cpu_leaves_planes_without_strides_to_the_platform(
    kind, space, kernel, strides, channels, filters, convolves
) -> None:
    chosen = _choice.choose(kind, "cpu", form(kernel, strides, channels, filters, space, "same"), 2)
    assert (chosen == "dilated") == convolves


@pytest.mark.parametrize(
    ("padding", "kernel", "convolves"), [("same", 5, True), ("same", 2, False), ("valid", 5, False)]
)
@pytest.mark.parametrize("kind", ["kernel", "gradients"])
def test_the_platform_s_gradient_of_a_kernel_is_that_of_cotangents_no_larger_than_the_inputs(
    kind, padding, kernel, convolves
) -> None:
    """XLA exchanges them where they are: measured 6 to 14 times slower than patches."""
    call = form((1, kernel, kernel), 1, 32, 32, (1, 64, 64), padding)
    assert (_choice.choose(kind, "cpu", call, 2) == "dilated") == convolves
    assert _choice.choose("inputs", "cpu", form((1, 5, 5), 1, 32, 32, (1, 64, 64), padding), 2) == "dilated"


@pytest.mark.parametrize("depth", [1, 2])
def test_gradients_by_dilated_in_planes_and_volumes(depth, x64: None) -> None:
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(2, depth, 6, 5, 9)), rng.normal(size=(1, 3, 2, 8, 9))
    run = lambda x, w: c3t.conv3d_transpose(x, w, padding="same", implementation="dilated")
    y, pull = jax.vjp(run, x, w)
    ct = rng.normal(size=y.shape)
    for got, want in zip(pull(ct), oracle.vjp(x, w, ct, padding="same"), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "kwargs", [{}, {"strides": 3}, {"dilation_rate": 2}, {"strides": 2, "dilation_rate": 3}], ids=str
)
def test_gradients_of_long_kernels_are_not_quadratic_in_their_taps(kwargs) -> None:
    x = jnp.ones((1, 1, 1, 64, 4))

    def temporaries(taps):
        w = jnp.ones((1, 1, taps, 4, 4))
        run = lambda x, w: c3t.conv3d_transpose(x, w, implementation="matmul", **kwargs).sum()
        compiled = jax.jit(jax.grad(run, (0, 1))).lower(x, w).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(80) < 4 * temporaries(40)


def test_one_module_for_several_platforms_holds_a_branch_for_each_choice() -> None:
    x, w = jnp.ones((1, 4, 4, 4, 4)), jnp.ones((3, 3, 3, 4, 4))
    run = jax.jit(functools.partial(c3t.conv3d_transpose, strides=2))
    text = export.export(run, platforms=["cpu", "cuda", "tpu"])(x, w).mlir_module()
    assert "stablehlo.case" in text
    assert "stablehlo.convolution" in text
    assert "stablehlo.dot_general" in text


@pytest.mark.parametrize("implementation", ["auto", "dilated", "matmul", "phases"])
@pytest.mark.parametrize("padding", ["valid", "same", "circular"])
def test_a_large_stride_is_not_thousands_of_operations(implementation, padding) -> None:
    """A 7x7x7 kernel with stride 16 has 4096 phases; the program stays small, forward and backward."""
    x, w = jnp.ones((1, 2, 2, 2, 3)), jnp.ones((7, 7, 7, 2, 3))
    run = lambda x, w: c3t.conv3d_transpose(x, w, strides=16, padding=padding, implementation=implementation).sum()
    lowered = jax.jit(jax.value_and_grad(run, (0, 1))).lower(x, w)
    assert len(re.findall("stablehlo[.]", lowered.as_text())) < 200
    assert jnp.isfinite(lowered.compile()(x, w)[0])


@pytest.mark.parametrize("stride", [1, (2, 2, 1)])
def test_a_large_kernel_is_neither_hundreds_of_operations_nor_a_dilated_convolution(stride) -> None:
    """XLA:CPU runs a dilated convolution as a scalar loop; slices for all 1331 taps would compile for minutes."""
    x, w = jnp.ones((1, 4, 4, 4, 3)), jnp.ones((11, 11, 11, 4, 3))
    run = lambda x, w: c3t.conv3d_transpose(x, w, strides=stride, padding="same").sum()
    text = jax.jit(jax.value_and_grad(run, (0, 1))).lower(x, w).as_text()
    assert len(re.findall("stablehlo[.]", text)) < 700
    assert "stablehlo.convolution" not in text


def test_no_lowering_stores_the_zero_stuffed_input() -> None:
    """Stride 8 stuffs 511 zeros per element: 64 MiB here; forward temporaries stay below a few inputs and outputs."""
    x, w = jnp.ones((1, 16, 16, 16, 8)), jnp.ones((3, 3, 3, 1, 8))
    stuffed = 16**3 * 8**3 * 8 * 4
    output = 16**3 * 8**3 * 4
    for implementation in ("auto", "dilated", "matmul", "phases"):
        run = jax.jit(functools.partial(c3t.conv3d_transpose, strides=8, implementation=implementation))
        temporaries = run.lower(x, w).compile().memory_analysis().temp_size_in_bytes
        assert temporaries < min(stuffed, 4 * output), implementation


def test_gathered_shifts_are_not_kept_for_the_backward_pass() -> None:
    """Between forward and backward `phases` keeps the operands, not its gathered copies (8 times the inputs here)."""
    x, w = jnp.ones((1, 4, 4, 4, 4)), jnp.ones((4, 4, 4, 2, 4))
    run = functools.partial(c3t.conv3d_transpose, strides=2, implementation="phases")
    _, pullback = jax.vjp(jax.jit(run), x, w)
    kept = sum(leaf.size for leaf in jax.tree.leaves(pullback))
    assert kept <= x.size + w.size + 8  # a few scalars


def test_equal_calls_compile_once(caplog: pytest.LogCaptureFixture) -> None:
    x, w = jnp.ones((1, 2, 2, 2, 5)), jnp.ones((2, 2, 2, 3, 5))
    c3t.conv3d_transpose(x, w, strides=2, padding="same")
    with jax.log_compiles(), caplog.at_level("WARNING"):
        c3t.conv3d_transpose(x, w, strides=(2, 2, 2), padding="SAME", groups=1, implementation="AUTO")
        assert "Compiling" not in caplog.text
        c3t.conv3d_transpose(x, w, strides=2, padding="valid", output_padding=1)
        assert "Compiling" in caplog.text


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize(("k", "stride"), [(2, 2), (3, 2), (3, 1)])
def test_one_channel_in_each_group_takes_one_pass_without_products_or_loops(k, stride, data_format) -> None:
    shape = (1, 6, 5, 4, 6) if data_format == "channels_last" else (1, 6, 6, 5, 4)
    x, w = jnp.ones(shape), jnp.ones((k, k, k, 2, 6))
    run = functools.partial(c3t.conv3d_transpose, strides=stride, groups=6, data_format=data_format)
    text = jax.jit(run).lower(x, w).as_text()
    assert "stablehlo.multiply" in text
    assert "stablehlo.dot_general" not in text
    assert "stablehlo.while" not in text


@pytest.mark.parametrize(("k", "stride", "padding"), [(2, 2, "same"), (3, 2, "same"), (3, 1, "circular")])
def test_one_channel_and_filter_in_each_group_give_the_inputs_their_gradient_in_one_pass(k, stride, padding) -> None:
    x, w = jnp.ones((1, 6, 5, 4, 6)), jnp.ones((k, k, k, 1, 6))
    run = functools.partial(c3t.conv3d_transpose, strides=stride, padding=padding, groups=6)
    y, pullback = jax.vjp(lambda x: run(x, w), x)
    text = jax.jit(pullback).lower(y).as_text()
    assert "stablehlo.multiply" in text
    assert "stablehlo.dot_general" not in text
    assert "stablehlo.while" not in text


@pytest.mark.parametrize(
    ("platform", "kwargs", "primitive"),
    [
        ("cpu", {"strides": 2}, "dot_general"),
        ("cuda", {"strides": 2}, "dot_general"),
        ("tpu", {}, "convolution"),
        ("cuda", {"strides": 3}, "dot_general"),
        ("cpu", {"strides": 2, "implementation": "dilated"}, "convolution"),
    ],
    ids=str,
)
def test_a_convolution_follows_the_same_rule(platform, kwargs, primitive) -> None:
    x, w = jax.ShapeDtypeStruct((1, 6, 6, 6, 4), jnp.float32), jax.ShapeDtypeStruct((3, 3, 3, 4, 8), jnp.float32)
    run = jax.jit(functools.partial(c3t.conv3d, **kwargs))
    text = export.export(run, platforms=[platform])(x, w).mlir_module()
    assert f"stablehlo.{primitive}" in text
    assert {"dot_general": "stablehlo.convolution", "convolution": "stablehlo.dot_general"}[primitive] not in text


def test_a_convolution_without_strides_is_its_transposed_twin() -> None:
    """The same program with the kernel turned around."""
    x, w = jax.ShapeDtypeStruct((1, 6, 6, 6, 4), jnp.float32), jax.ShapeDtypeStruct((3, 3, 3, 4, 4), jnp.float32)
    texts = [
        jax.jit(functools.partial(call, padding="same")).lower(x, w).as_text()
        for call in (c3t.conv3d, c3t.conv3d_transpose)
    ]
    counts = [{op: text.count(f"stablehlo.{op}") for op in ("dot_general", "while", "concatenate")} for text in texts]
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("space", "channels", "filters", "strides", "name"),
    [(16, 128, 256, 2, "dilated"), (32, 32, 64, 2, "phases"), (4, 128, 256, 2, "phases"), (16, 128, 256, 1, "phases")],
)
def test_strided_convolutions_of_long_patches_are_the_platform_s(space, channels, filters, strides, name) -> None:
    """Measured 1.3 times faster, where few rows fit a block."""
    spec = c3t.Conv3DSpec(filters, 3, strides, "same")
    assert c3t.explain((1, space, space, space, channels), spec, platforms=["cpu"]).forward["cpu"].lowering == name


@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(2, 16, 16), ((5, 5, 32), 16, 4)])
def test_a_large_cell_of_few_taps_is_not_thousands_of_operations(kernel, stride, dilation) -> None:
    """Its taps overlap, and most of its places are reached by none."""
    x, w = jnp.ones((2, 4, 4, 4, 3)), jnp.ones((*oracle.triple(kernel), 2, 3))
    run = functools.partial(c3t.conv3d_transpose, strides=stride, dilation_rate=dilation, implementation="matmul")
    assert jax.jit(run).lower(x, w).as_text().count("stablehlo.") < 400
