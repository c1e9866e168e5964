"""Several devices: what each needs of its neighbours, and the tests that need eight, in a process that has them."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conv3dt_jax import _halos

ROOT = pathlib.Path(__file__).parents[1]


LONG = [pytest.param(part, marks=pytest.mark.slow) for part in ("eight_devices_corners", "eight_devices_training")]


@pytest.mark.parametrize("part", ["eight_devices", "eight_devices_declared", *LONG])
def test_on_eight_devices(part) -> None:
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"  # compiled in half the time
    environment = {**os.environ, "XLA_FLAGS": flags}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/{part}.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    length=st.integers(1, 17),
    shards=st.integers(1, 6),
    starts=st.lists(st.integers(-9, 20), min_size=6, max_size=6),
    size=st.integers(1, 12),
    wraps=st.booleans(),
)
def test_every_device_gets_its_window(length, shards, starts, size, wraps) -> None:
    exchange = _halos.plan(length, shards, starts[:shards], size, wraps)
    piece = -(-length // shards)
    axis = np.arange(1, length + 1)
    pieces = [np.zeros(piece, int) - 1 for _ in range(shards)]  # -1: what lies behind the axis is anything
    for device in range(shards):
        own = axis[device * piece : (device + 1) * piece]
        pieces[device][: len(own)] = own

    def received(each, device):
        sent = {to: pieces[by][each.starts[by] : each.starts[by] + each.size] for by, to in each.pairs}
        return sent.get(device, np.zeros(each.size, int))

    for device in range(shards):
        parts = [received(each, device) for each in exchange.before] + [pieces[device]]
        parts += [received(each, device) for each in exchange.after]
        together = np.concatenate([*parts, [0]])
        wanted = [starts[device] + i for i in range(size)]
        wanted = [
            axis[i % length] if wraps else axis[i] if 0 <= i < length else 0 for i in wanted
        ]  # fmt: skip
        np.testing.assert_array_equal(together[list(exchange.places[device])], wanted)
        run = _halos._run(exchange)
        if run is not None:
            first, lead, trail = run
            padded = np.concatenate([np.zeros(lead, int), *parts, np.zeros(trail, int)])
            np.testing.assert_array_equal(padded[first[device] :][:size], wanted)


def test_a_halo_is_all_that_travels() -> None:
    even = _halos.plan(32, 4, [8 * device - 1 for device in range(4)], 10)
    assert [(each.distance, each.size) for each in (*even.before, *even.after)] == [(-1, 1), (1, 1)]
    assert _halos._run(even) == ([0] * 4, 0, 0)
    wide = _halos.plan(32, 8, [4 * device - 6 for device in range(8)], 10)
    assert [(each.distance, each.size) for each in (*wide.before, *wide.after)] == [(-2, 2), (-1, 4)]
