"""The demo's training loop: stopped or diverged, it says what it does, and goes on to the bit."""

import dataclasses
import json
import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("nibabel")

from examples.brain_segmentation import cli, loop, report
from examples.brain_segmentation.data import DataError
from examples.brain_segmentation.evaluate import Scores
from examples.brain_segmentation.logs import LOSSES, SCORES, series
from examples.brain_segmentation.patches import PatchSampler
from examples.brain_segmentation.settings import FILE
from tests.training_runs import SETTINGS, StopAt, Voxelwise, files_of, same, steps_in

# optax and Flax promote implicitly
pytestmark = [pytest.mark.lenient, pytest.mark.usefixtures("compile_once", "quick_compiles")]


@pytest.mark.usefixtures("quick")
def test_the_last_checkpoints_and_the_best_are_kept(subject, tmp_path) -> None:
    trained = loop.train(subject, SETTINGS, tmp_path / "run", loop.Stop())
    scores = series(tmp_path / "run" / SCORES)
    assert scores["step"] == [5, 10, 12]
    best = int(scores["step"][int(np.argmax(scores["validation label 7"]))])
    assert trained.best == best
    assert steps_in(tmp_path / "run") == sorted({10, 12, best})
    assert series(tmp_path / "run" / LOSSES)["step"] == list(range(1, 13))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_that_is_stopped_goes_on_to_the_bit(subject, tmp_path, capsys, accumulate) -> None:
    settings = dataclasses.replace(SETTINGS, accumulate=accumulate)
    whole = loop.train(subject, settings, tmp_path / "whole", loop.Stop(), resume=True)
    assert "no checkpoint to go on from; beginning" in capsys.readouterr().err
    stopped = loop.train(subject, settings, tmp_path / "run", StopAt(tmp_path / "run", 7))
    assert stopped.steps == 7
    gone_on = loop.train(subject, settings, tmp_path / "run", loop.Stop(), resume=True)
    assert "going on from step 7" in capsys.readouterr().err
    assert same(whole, gone_on)
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "run")
    finished = loop.train(subject, settings, tmp_path / "run", loop.Stop(), resume=True)  # nothing is left to do
    assert same(whole, finished)
    assert np.isnan(finished.seconds_per_step)
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "run")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_loss_that_is_no_number_stops_the_run_and_says_where(subject, tmp_path, monkeypatch, value) -> None:
    sample = PatchSampler.__call__

    def poisoned(self, step):
        images, labels = sample(self, step)
        return (images * value if step == 7 else images), labels

    with monkeypatch.context() as patch:
        patch.setattr(PatchSampler, "__call__", poisoned)
        with pytest.raises(loop.TrainingError) as error:
            loop.train(subject, SETTINGS, tmp_path, loop.Stop())
    message = str(error.value)
    assert re.search(
        r"step 8: the (loss|gradient norm) is (nan|inf), on batch 7 of seed 0: patches of 8 voxels at", message
    )
    corners = PatchSampler(subject, 8, 2, 0).corners(7)
    assert str(tuple(map(int, corners[1]))) in message
    assert f"the last good checkpoint is {tmp_path / 'checkpoints' / '6'}" in message
    assert len(message.splitlines()) == 1
    assert series(tmp_path / LOSSES)["step"] == list(range(1, 8))
    loop.train(subject, SETTINGS, tmp_path, loop.Stop(), resume=True)  # from there it goes on, once the data are mended
    assert np.isfinite(series(tmp_path / LOSSES)["loss"]).all()


@pytest.mark.usefixtures("quick")
def test_float16_that_overflows_at_any_scale_stops_the_run(subject, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(loop, "make_model", lambda classes, settings: Overflowing(classes))
    settings = dataclasses.replace(SETTINGS, precision="float16", steps=40)
    with pytest.raises(
        loop.TrainingError, match="step 17: the gradient overflows float16 at any loss scale, on batch 16"
    ):
        loop.train(subject, settings, tmp_path, loop.Stop())


@jax.custom_vjp
def steep(x):
    return x


steep.defvjp(lambda x: (x, None), lambda _, g: (g * jnp.float16(6e4) * jnp.float16(6e4),))


class Overflowing(nn.Module):
    """A finite loss whose gradient is infinite in float16."""

    classes: int

    @nn.compact
    def __call__(self, x):
        weight = self.param("weight", nn.initializers.ones, (self.classes,))
        return x * 0 + steep(weight.astype(jnp.float16)).astype(jnp.float32)


def test_divergence_ends_the_program_in_one_line(ball, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(loop, "make_model", lambda classes, settings: Voxelwise(classes))
    monkeypatch.setattr(PatchSampler, "__call__", lambda self, step: (np.full((2, 8, 8, 8, 1), np.nan, np.float32), np.zeros((2, 8, 8, 8), np.int32)))  # fmt: skip
    arguments = ["--data", *ball, "--out", str(tmp_path), "--patch", "8", "--batch", "2", "--steps", "3"]
    assert cli.main(arguments) == 1
    last = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
    assert last.startswith("error: step 1: the loss is nan")
    assert last.endswith("the last good checkpoint is none")


@pytest.mark.usefixtures("quick")
def test_an_earlier_run_is_moved_aside_not_lost(subject, tmp_path, capsys) -> None:
    run = tmp_path / "run"
    loop.train(subject, SETTINGS, run, loop.Stop())
    before = files_of(run)
    loop.train(subject, dataclasses.replace(SETTINGS, seed=1), run, loop.Stop())
    assert "the earlier run" in capsys.readouterr().err
    assert files_of(tmp_path / "run.earlier-1") == before
    assert files_of(run) != before
    assert steps_in(tmp_path / "run.earlier-1")
    with pytest.raises(DataError, match="--patch 96 is larger"):  # before anything is moved
        loop.train(subject, dataclasses.replace(SETTINGS, patch=96), run, loop.Stop(), resume=True)
    assert json.loads((run / FILE).read_text())["patch"] == 8
    loop.train(subject, SETTINGS, run, loop.Stop())
    assert files_of(tmp_path / "run.earlier-1") == files_of(run) == before
    assert (tmp_path / "run.earlier-2").is_dir()


@pytest.mark.usefixtures("quick")
def test_the_best_checkpoint_outlives_the_process(subject, tmp_path, monkeypatch) -> None:
    settings = dataclasses.replace(SETTINGS, keep=1, evaluate_every=4)

    def scored(folder: pathlib.Path, *stops: loop.Stop) -> loop.Trained:
        scores = iter([0.5, 0.9, 0.3])
        monkeypatch.setattr(loop, "evaluate", lambda *_: Scores([0.0, (value := next(scores))], [0.0, value], value))
        for stop in stops:
            trained = loop.train(subject, settings, folder, stop, resume=True)
        return trained

    whole = scored(tmp_path / "whole", loop.Stop())
    gone_on = scored(tmp_path / "run", StopAt(tmp_path / "run", 5), StopAt(tmp_path / "run", 9), loop.Stop())
    assert whole.best == 8
    assert same(whole, gone_on)
    assert steps_in(tmp_path / "whole") == steps_in(tmp_path / "run") == [8, 12]


@pytest.mark.usefixtures("quick")
def test_settings_that_shape_a_checkpoint_cannot_change_and_others_are_said_aloud(subject, tmp_path, capsys) -> None:
    loop.train(subject, SETTINGS, tmp_path, loop.Stop())
    for change in ({"features": 16}, {"precision": "bfloat16"}, {"accumulate": 2}, {"data": "y"}):
        (name, value), before = next(iter(change.items())), dataclasses.asdict(SETTINGS)
        with pytest.raises(DataError, match=f"was begun with {name} {before[name]!r}, not {value!r}"):
            loop.train(subject, dataclasses.replace(SETTINGS, **change), tmp_path, loop.Stop(), resume=True)
    longer = loop.train(subject, dataclasses.replace(SETTINGS, steps=15), tmp_path, loop.Stop(), resume=True)
    assert longer.steps == 15
    assert "goes on with steps 15, was 12" in capsys.readouterr().err
    for spoil in (lambda: (tmp_path / FILE).write_text("{"), lambda: (tmp_path / FILE).unlink()):
        spoil()
        with pytest.raises(DataError, match=r"settings\.json cannot be read"):
            loop.train(subject, SETTINGS, tmp_path, loop.Stop(), resume=True)


@pytest.mark.usefixtures("quick")
def test_a_run_stopped_before_its_first_step_leaves_older_results_alone(ball, tmp_path, monkeypatch) -> None:
    class Late(loop.Stop):
        """Requested while the network is made ready."""

        def __init__(self) -> None:
            self._answers = iter([False])

        @property
        def requested(self) -> bool:
            return next(self._answers, True)

    monkeypatch.setattr(cli, "Stop", Late)
    (tmp_path / report.TABLE).write_text("older")
    assert cli.main(["--data", *ball, "--out", str(tmp_path), "--patch", "8", "--batch", "2", "--steps", "3"]) == 130
    assert (tmp_path / report.TABLE).read_text() == "older"
    assert not (tmp_path / report.PARAMETERS).exists()
