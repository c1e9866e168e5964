"""Which lowerings "auto" considers beside those that any form may have."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import conv3dt_jax as c3t
from conv3dt_jax import _choice
from conv3dt_jax.lowerings._origin import Origin
from tests.helpers import quick_jit
from tests.test_choice import form

LAST = Origin(mirrored=True, filters_last=True)
FUNCTIONS = (c3t.lax.conv_transpose, jax.lax.conv_transpose)


def chosen(
    space=(1, 8, 8), kernel=(1, 5, 5), channels=256, filters=128, batch=1, kind="outputs", dtype="float32",
    padding="same", **changes
) -> str:  # fmt: skip
    strides = tuple(min(2, k) for k in kernel)
    described = form(kernel, strides, channels, filters, space, padding, dtype)
    return _choice.choose(kind, "cpu", dataclasses.replace(described, **{"origin": LAST} | changes), batch)


def test_few_inputs_under_many_taps_are_the_platforms_in_planes_and_lines() -> None:
    assert chosen() == chosen(kind="affine") == "dilated"
    assert chosen(space=(1, 1, 127), kernel=(1, 1, 25)) == "dilated"
    assert chosen(space=(1, 7, 7)) == "dilated"
    assert chosen(space=(1, 6, 8)) != "dilated"  # 48 inputs
    assert chosen(space=(1, 1, 48), kernel=(1, 1, 25)) != "dilated"
    assert chosen(batch=2) != "dilated"  # 128 inputs
    assert chosen(kernel=(1, 4, 4)) != "dilated"
    assert chosen(kernel=(1, 9, 9), filters=64) != "dilated"  # XLA would exchange the operands
    assert chosen(space=(2, 6, 6), kernel=(2, 5, 5)) != "dilated"


def test_more_inputs_may_meet_them_where_products_are_few() -> None:
    more = {"space": (1, 14, 14), "channels": 64, "filters": 80}  # 1.495 MiB
    assert chosen(**more) == "dilated"
    assert chosen(**more | {"filters": 81}) != "dilated"
    assert chosen(**more | {"channels": 63}) != "dilated"
    assert chosen(space=(1, 16, 16), channels=64, filters=32) != "dilated"  # 256 inputs
    line = {"space": (1, 1, 128), "kernel": (1, 1, 10), "channels": 128}
    assert chosen(**line) == "dilated"
    assert chosen(**line | {"kernel": (1, 1, 9)}) != "dilated"
    assert chosen(**line | {"filters": 320}) != "dilated"
    assert chosen(space=(1, 8, 16), kernel=(1, 2, 5), channels=128) != "dilated"  # a plane


def test_nine_taps_are_the_platforms_where_the_product_is_small() -> None:
    nine = {"space": (1, 14, 14), "kernel": (1, 3, 3), "channels": 64, "filters": 64}
    assert chosen(**nine) == chosen(**nine, padding="valid") == chosen(**nine, kind="affine") == "dilated"
    assert chosen(**nine | {"filters": 63}) != "dilated"
    assert chosen(**nine | {"channels": 63, "filters": 66}) != "dilated"
    assert chosen(**nine | {"channels": 256, "filters": 255}) == "dilated"
    assert chosen(**nine | {"channels": 256, "filters": 256}) != "dilated"
    assert chosen(**nine | {"kernel": (1, 2, 5)}) != "dilated"
    assert chosen(**nine | {"kernel": (1, 4, 4), "filters": 128}) != "dilated"
    assert chosen(**nine | {"kernel": (1, 2, 4)}) != "dilated"
    assert chosen(**nine | {"space": (1, 16, 18)}) != "dilated"  # 288 inputs
    assert chosen(**nine | {"space": (1, 1, 196), "kernel": (1, 1, 9)}) != "dilated"  # a line


def test_planes_whose_last_cells_stick_out_are_the_platforms_where_products_are_few() -> None:
    ragged = {"space": (1, 32, 32), "channels": 64, "filters": 81, "padding": "valid"}  # 7.9 MiB
    assert chosen(**ragged) == "dilated"
    assert chosen(**ragged | {"filters": 82}) != "dilated"
    assert chosen(**ragged | {"channels": 63}) != "dilated"
    assert chosen(**ragged | {"padding": "same"}) != "dilated"
    assert chosen(**ragged | {"kernel": (1, 4, 4)}) != "dilated"  # no cell sticks out
    assert chosen(**ragged | {"kernel": (1, 3, 3)}) != "dilated"  # few taps


def test_the_platform_reads_small_kernels_of_vectors_as_they_lie() -> None:
    assert chosen(filters=327) == "dilated"
    assert chosen(filters=328) != "dilated"  # more than 8 MiB
    assert chosen(filters=31) != "dilated"
    assert chosen(channels=31) != "dilated"
    assert chosen(origin=Origin(mirrored=True)) != "dilated"
    assert chosen(origin=Origin(filters_last=True)) != "dilated"
    assert chosen(channels_first=True) != "dilated"
    assert chosen(dtype="bfloat16") != "dilated"
    assert chosen(groups=2) != "dilated"
    assert chosen(kind="gradients") != "dilated"


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize(("space", "kernel"), [((8, 8), (5, 5)), ((70,), (25,)), ((7, 10), (6, 5))])
def test_it_is_the_convolution_that_jax_compiles_with_its_gradients(space, kernel, padding) -> None:
    """No copy of the kernel, and the same bits."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, *space, 64)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(*kernel, 64, 32)), jnp.float32)

    def run(function, x, w):
        return function(x, w, (2,) * len(space), padding)

    compiled = [jax.jit(lambda x, w, f=f: run(f, x, w)).lower(x, w).compile() for f in FUNCTIONS]
    ours, jaxs = (program.as_text() for program in compiled)
    assert ours.count("convolution(") == jaxs.count("convolution(") == 1
    assert compiled[0].memory_analysis().temp_size_in_bytes == compiled[1].memory_analysis().temp_size_in_bytes
    np.testing.assert_array_equal(compiled[0](x, w), compiled[1](x, w))
    got, want = (quick_jit(jax.grad(lambda x, w, f=f: jnp.sin(run(f, x, w)).sum(), (0, 1)))(x, w) for f in FUNCTIONS)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-3)
