"""The demo, killed by the system's own signal in the midst of its work, ends as if it had not been."""

import filecmp
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

pytest.importorskip("nibabel")

from examples.brain_segmentation import report
from examples.brain_segmentation.logs import LOSSES, SCORES

# optax and Flax promote implicitly
pytestmark = [pytest.mark.lenient, pytest.mark.usefixtures("compile_once", "quick_compiles")]

ROOT = pathlib.Path(__file__).parents[1]


def command(ball, out: pathlib.Path, *arguments: str) -> list[str]:
    small = ["--steps", "16", "--patch", "8", "--batch", "1", "--features", "2", "--accumulate", "2"]
    often = ["--checkpoint-every", "1", "--evaluate-every", "8", "--keep", "2", "--upsampling", "transposed"]
    data = ["--data", *ball, "--out", str(out)]
    return [sys.executable, "-m", "examples.brain_segmentation", *data, *small, *often, *arguments]


def numbers(checkpoints: pathlib.Path) -> list[int]:
    names = os.listdir(checkpoints) if checkpoints.exists() else []
    return sorted(int(name) for name in names if name.isdigit())


def kill(process: subprocess.Popen, checkpoints: pathlib.Path, after: int, *, writing: bool) -> None:
    """SIGKILL once ``after`` more checkpoints are there; with ``writing``, while the next one is half written."""
    wanted = max(numbers(checkpoints), default=0) + after
    while process.poll() is None:
        if max(numbers(checkpoints), default=0) >= wanted and (
            not writing or any("tmp" in name for name in os.listdir(checkpoints))
        ):
            process.kill()
        time.sleep(0.0005)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_a_run_killed_at_any_step_ends_with_the_same_bits(ball, tmp_path) -> None:
    """Twice: at a random step, and in the middle of a write."""
    environment = {
        **os.environ,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiles in half the time
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip

    def start(out: str, *arguments: str) -> subprocess.Popen:
        return subprocess.Popen(
            command(ball, tmp_path / out, *arguments), cwd=ROOT, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    with start("whole") as process:
        assert process.communicate()[1] is not None
        assert process.returncode == 0
    seed = random.SystemRandom().randrange(1000)
    for attempt, writing in enumerate((False, True)):
        after = 1 + random.Random(seed + attempt).randrange(5)
        with start("killed", "--resume") as process:
            kill(process, tmp_path / "killed" / "transposed" / "checkpoints", after, writing=writing)
    with start("killed", "--resume") as process:
        said = process.communicate()[1]
        assert process.returncode == 0, f"seed {seed}: {said[-2000:]}"
    assert "going on from step" in said, f"seed {seed}"
    for name in (LOSSES, SCORES):
        same_file = filecmp.cmp(*(tmp_path / out / "transposed" / name for out in ("whole", "killed")), shallow=False)
        assert same_file, f"seed {seed}: {name}"
    with (
        np.load(tmp_path / "whole" / report.PARAMETERS) as whole,
        np.load(tmp_path / "killed" / report.PARAMETERS) as got,
    ):
        for name, value in whole.items():
            np.testing.assert_array_equal(value, got[name], err_msg=f"seed {seed}: {name}")
    states = [
        folder / "transposed" / "checkpoints" / "16" / "state" for folder in (tmp_path / "whole", tmp_path / "killed")
    ]
    with (
        ocp.StandardCheckpointer() as reader
    ):  # parameters, averages, the optimizer's state, half-accumulated gradients
        jax.tree.map(np.testing.assert_array_equal, *(reader.restore(state) for state in states))
