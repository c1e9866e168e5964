"""The demo's training over a mesh, on eight virtual devices.

Run by `test_sharding.py` in a process of its own, which has the devices.
"""

import dataclasses

import jax
import numpy as np
import pytest

pytest.importorskip("nibabel")

from examples.brain_segmentation import loop
from examples.brain_segmentation.devices import Devices
from examples.brain_segmentation.patches import PatchSampler
from examples.brain_segmentation.train import initial_state, make_model, make_step
from tests.eight_devices import QUICK, collectives
from tests.training_runs import SETTINGS, StopAt, files_of, same

pytestmark = pytest.mark.lenient  # optax and Flax promote implicitly


def test_the_losses_are_those_of_one_device_and_only_halos_and_sums_travel(subject) -> None:
    settings = dataclasses.replace(SETTINGS, patch=16, features=4, steps=4)
    model, found = make_model(len(subject.names), settings), {}
    for mesh in ("", "data=2,depth=2"):
        devices = Devices(dataclasses.replace(settings, mesh=mesh))
        sampler = PatchSampler(subject, settings.patch, settings.batch, settings.seed)
        state = devices.everywhere(initial_state(model, settings))
        step = jax.jit(make_step(model, settings), compiler_options=QUICK)
        compiled = step.lower(state, *devices.cut(*sampler(0))).compile()
        losses = []
        for index in range(settings.steps):
            state, metrics = compiled(state, *devices.cut(*sampler(index)))
            losses.append(float(metrics.loss))
        found[mesh] = losses
    np.testing.assert_allclose(found["data=2,depth=2"], found[""], rtol=1e-5)
    assert found[""][-1] != found[""][0]
    activations = settings.batch * settings.patch**3 // 4
    for kind, shapes in collectives(compiled).items():
        largest = max(int(np.prod(shape)) for shape in shapes)
        if kind != "collective-permute":
            assert kind == "all-reduce"
            assert largest <= max(parameter.size for parameter in jax.tree.leaves(state.params))
        else:
            assert largest <= activations  # a flipped patch; halos are smaller


@pytest.mark.usefixtures("quick")
def test_a_run_over_a_mesh_goes_on_to_the_bit(subject, tmp_path) -> None:
    settings = dataclasses.replace(SETTINGS, mesh="data=2,height=2")
    whole = loop.train(subject, settings, tmp_path / "whole", loop.Stop())
    stopped = loop.train(subject, settings, tmp_path / "run", StopAt(tmp_path / "run", 7))
    assert stopped.steps == 7
    gone_on = loop.train(subject, settings, tmp_path / "run", loop.Stop(), resume=True)
    assert same(whole, gone_on)
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "run")
