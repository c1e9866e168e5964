"""The table of cases sees the usual mistakes: each one, put into the code, makes it fail."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from conv3dt_jax import _operation
from conv3dt_jax.lowerings import LOWERINGS
from tests.cases import CASES
from tests.test_lowerings import check


def flip_kernel(inputs, kernel, geometry, groups):
    return inputs, jnp.flip(kernel, (0, 1, 2)), geometry, groups


def flip_one_axis(inputs, kernel, geometry, groups):
    return inputs, jnp.flip(kernel, 2), geometry, groups


def shift_the_window(inputs, kernel, geometry, groups):
    return inputs, kernel, tuple(dataclasses.replace(axis, lo=axis.lo + 1) for axis in geometry), groups


def swap_groups(inputs, kernel, geometry, groups):
    return jnp.roll(inputs, inputs.shape[-1] // groups, -1) if groups > 1 else inputs, kernel, geometry, groups


def unwrap(inputs, kernel, geometry, groups):
    return inputs, kernel, tuple(dataclasses.replace(axis, wraps=False) for axis in geometry), groups


MUTATIONS = {
    flip_kernel: "stride_below_kernel", flip_one_axis: "same_even", shift_the_window: "explicit",
    swap_groups: "groups", unwrap: "circular",
}  # fmt: skip


@pytest.mark.parametrize("mutation", list(MUTATIONS), ids=lambda m: m.__name__)
@pytest.mark.parametrize("implementation", [name for name in LOWERINGS if name not in ("winograd", "pallas")])
def test_the_suite_fails_with(mutation, implementation, monkeypatch) -> None:
    case = next(case for case in CASES if case.name == MUTATIONS[mutation])
    original = LOWERINGS[implementation].outputs

    def mutated(inputs, kernel, geometry, *, groups, **kwargs):
        inputs, kernel, geometry, groups = mutation(inputs, kernel, geometry, groups)
        return original(inputs, kernel, geometry, groups=groups, **kwargs)

    check(case, implementation)
    monkeypatch.setattr(LOWERINGS[implementation], "outputs", mutated)
    _operation._compute.clear_cache()
    try:
        with pytest.raises(AssertionError):
            check(case, implementation)
    finally:
        jax.clear_caches()
