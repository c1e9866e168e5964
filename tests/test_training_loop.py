"""The demo's training loop survives: killed, damaged, stopped or diverged, it says what it does and goes on to the bit."""

import dataclasses
import filecmp
import json
import os
import pathlib
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import orbax.checkpoint as ocp
import pytest

from examples.brain_segmentation import cli, loop, report
from examples.brain_segmentation.checkpoints import Checkpoints, DamagedError
from examples.brain_segmentation.data import DataError, load_files
from examples.brain_segmentation.evaluate import Scores
from examples.brain_segmentation.logs import LOSSES, SCORES, TENSORBOARD, Table, series
from examples.brain_segmentation.patches import PatchSampler
from examples.brain_segmentation.settings import FILE, Settings
from examples.brain_segmentation.train import initial_state

pytestmark = [
    pytest.mark.lenient,  # optax and Flax promote implicitly
    pytest.mark.usefixtures("compile_once", "quick_compiles"),
]

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A bright ball in noise, and its labels."""
    folder, shape = tmp_path_factory.mktemp("data"), (24, 56, 16)
    rng = np.random.default_rng(0)
    inside = (np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")) ** 2).sum(0) < 0.8
    image = (inside * 3 + rng.normal(size=shape) * 0.3 + 2).astype(np.float32)
    paths = []
    for name, data in (("image.nii", image), ("labels.nii", inside.astype(np.uint8))):
        nib.save(nib.Nifti1Image(data, np.eye(4)), folder / name)
        paths.append(str(folder / name))
    return paths[0], paths[1]


@pytest.fixture(scope="module")
def subject(files):
    return load_files(*map(pathlib.Path, files))


class Voxelwise(nn.Module):
    """A network that compiles at once."""

    classes: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.classes)(nn.tanh(nn.Dense(4)(x)))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop with a small network, and evaluations that cost nothing: the score of a step is written down here."""
    monkeypatch.setattr(loop, "make_model", lambda classes, settings: Voxelwise(classes))

    def evaluate(model, params, subject):
        total = float(sum(jnp.abs(leaf).sum() for leaf in jax.tree.leaves(params)))
        return Scores([0.0, total % 1], [0.0, total % 0.5], total % 1)

    monkeypatch.setattr(loop, "evaluate", evaluate)


SETTINGS = Settings(data="x", steps=12, patch=8, batch=2, evaluate_every=5, checkpoint_every=3, keep=2)


def files_of(folder: pathlib.Path) -> dict[str, str]:
    return {name: (folder / name).read_text() for name in (LOSSES, SCORES)}


def same(a: loop.Trained, b: loop.Trained) -> bool:
    return a.best == b.best and jax.tree.all(jax.tree.map(np.array_equal, a.params, b.params))


class StopAt(loop.Stop):
    """Requested once a number of steps is in the log, as by Ctrl-C."""

    def __init__(self, folder: pathlib.Path, step: int) -> None:
        self._log, self._step = folder / LOSSES, step

    @property
    def requested(self) -> bool:
        return self._log.exists() and len(self._log.read_text().splitlines()) > self._step


def steps_in(folder: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())


@pytest.mark.usefixtures("quick")
def test_the_last_checkpoints_and_the_best_are_kept(subject, tmp_path) -> None:
    trained = loop.train(subject, SETTINGS, tmp_path / "run", loop.Stop())
    scores = series(tmp_path / "run" / SCORES)
    assert scores["step"] == [5, 10, 12]
    best = int(scores["step"][int(np.argmax(scores["validation label 1"]))])
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


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "flipped": lambda path: path.write_bytes(bytes(b ^ 0x10 if i == path.stat().st_size // 2 else b for i, b in enumerate(path.read_bytes()))),
    "deleted": lambda path: path.unlink(),
}  # fmt: skip


@pytest.mark.usefixtures("quick")
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_is_used(subject, tmp_path, capsys) -> None:
    loop.train(subject, SETTINGS, tmp_path / "whole", loop.Stop())
    expected, run = files_of(tmp_path / "whole"), tmp_path / "run"
    newest = tmp_path / "whole" / "checkpoints" / "12"
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    proof = newest / "proof.json"
    for file, damage in zip((largest, proof, newest / "state" / "manifest.ocdbt"), DAMAGES, strict=True):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(tmp_path / "whole", run)
        DAMAGES[damage](run / file.relative_to(tmp_path / "whole"))
        gone_on = loop.train(subject, SETTINGS, run, loop.Stop(), resume=True)
        said = capsys.readouterr().err
        assert "checkpoint 12 is damaged" in said
        assert len(re.findall("^.*", said.replace("\r", "\n"), re.MULTILINE)) < 20  # said, and not drowned
        assert f"going on from step {steps_in(tmp_path / 'whole')[-2]}" in said
        assert (run / "damaged" / "12").is_dir()
        assert gone_on.steps == 12
        assert files_of(run) == expected
        jax.tree.map(
            np.testing.assert_array_equal, *(restored(subject, folder) for folder in (tmp_path / "whole", run))
        )


def restored(subject, folder: pathlib.Path):
    model = Voxelwise(len(subject.names))
    with Checkpoints(folder, 2, initial_state(model, SETTINGS)) as checkpoints:
        return checkpoints.restore(12)


@pytest.mark.usefixtures("quick")
def test_where_every_checkpoint_is_damaged_the_run_begins_anew(subject, tmp_path, capsys) -> None:
    whole = loop.train(subject, SETTINGS, tmp_path, loop.Stop())
    expected = files_of(tmp_path)
    for step in steps_in(tmp_path):
        shutil.rmtree(tmp_path / "checkpoints" / str(step) / "state")
    assert same(whole, loop.train(subject, SETTINGS, tmp_path, loop.Stop(), resume=True))
    said = capsys.readouterr().err
    assert said.count("is damaged") >= 2
    assert "no checkpoint to go on from; beginning" in said
    assert files_of(tmp_path) == expected


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


def test_divergence_ends_the_program_in_one_line(files, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(loop, "make_model", lambda classes, settings: Voxelwise(classes))
    monkeypatch.setattr(PatchSampler, "__call__", lambda self, step: (np.full((2, 8, 8, 8, 1), np.nan, np.float32), np.zeros((2, 8, 8, 8), np.int32)))  # fmt: skip
    arguments = ["--data", *files, "--out", str(tmp_path), "--patch", "8", "--batch", "2", "--steps", "3"]
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
def test_a_log_that_was_changed_is_said_aloud_and_the_run_goes_on(subject, tmp_path, capsys) -> None:
    loop.train(subject, SETTINGS, tmp_path, loop.Stop())
    for name in (LOSSES, SCORES):
        path = tmp_path / name
        whole = path.read_bytes()
        lines = whole.splitlines(keepends=True)
        for spoilt in (None, b"", b"".join(lines[:-1]), lines[0] + b"".join(lines[2:]), whole + lines[-1],
                       whole.replace(b",0.", b",x.", 1), b"\xff" + whole, b"a" + whole):  # fmt: skip
            path.unlink() if spoilt is None else path.write_bytes(spoilt)
            assert loop.train(subject, SETTINGS, tmp_path, loop.Stop(), resume=True).steps == 12
            assert f"warning: {path} was changed" in capsys.readouterr().err
        path.write_bytes(whole)
        loop.train(subject, SETTINGS, tmp_path, loop.Stop(), resume=True)
        assert "was changed" not in capsys.readouterr().err
        assert path.read_bytes() == whole


@pytest.mark.usefixtures("quick")
def test_a_run_stopped_before_its_first_step_leaves_older_results_alone(files, tmp_path, monkeypatch) -> None:
    class Late(loop.Stop):
        """Requested while the network is made ready."""

        def __init__(self) -> None:
            self._answers = iter([False])

        @property
        def requested(self) -> bool:
            return next(self._answers, True)

    monkeypatch.setattr(cli, "Stop", Late)
    (tmp_path / report.TABLE).write_text("older")
    assert cli.main(["--data", *files, "--out", str(tmp_path), "--patch", "8", "--batch", "2", "--steps", "3"]) == 130
    assert (tmp_path / report.TABLE).read_text() == "older"
    assert not (tmp_path / report.PARAMETERS).exists()


@pytest.mark.usefixtures("quick")
def test_a_checkpoint_that_cannot_be_written_ends_the_program_in_one_line(files, tmp_path, capsys, monkeypatch) -> None:
    def full(*args, **kwargs):
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device\nmore")

    arguments = ["--data", *files, "--out", str(tmp_path), "--patch", "8", "--batch", "2", "--steps", "3"]
    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "save", full)
        assert cli.main(arguments) == 1
    last = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
    assert last.startswith(f"error: {tmp_path / 'transposed' / 'checkpoints'}: a checkpoint cannot be written")
    assert last.endswith("No space left on device")


def test_a_checkpoint_proves_its_state_and_its_score(subject, tmp_path, capsys) -> None:
    state = initial_state(Voxelwise(2), SETTINGS)
    with Checkpoints(tmp_path, 1, state) as checkpoints:
        checkpoints.save(1, state, None)
        assert checkpoints.latest() == checkpoints.best() == 1
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(1), state)
        proof = tmp_path / "checkpoints" / "1" / "proof.json"
        honest = proof.read_text()
        for spoilt in (honest.replace("null", "0.99"), honest.replace('"score"', '"other"'), "[]", "{}", honest[:-1]):
            proof.write_text(spoilt)
            with pytest.raises(DamagedError, match=r"proof\.json is not what was written"):
                checkpoints.restore(1)
        proof.unlink()
        with pytest.raises(DamagedError, match=r"it has no proof\.json"):
            checkpoints.restore(1)
    with Checkpoints(tmp_path, 1, state) as checkpoints:
        assert checkpoints.latest() is None
    assert "checkpoint 1 is damaged" in capsys.readouterr().err


def test_a_table_forgets_what_came_after(tmp_path) -> None:
    path = tmp_path / "t.csv"
    table = Table(path, ["a", "b"], 0)
    for step in (1, 2, 3):
        table.write(step, [step / 3, 1e-30])
    table.close()
    with path.open("a") as file:
        file.write("4,0.5")  # a row that was never finished
    whole = path.read_text().splitlines()
    Table(path, ["a", "b"], 3).close()
    assert path.read_text().splitlines() == whole[:4]
    Table(path, ["a", "b"], 1).close()
    assert path.read_text().splitlines() == whole[:2]
    assert series(path) == {"step": [1], "a": [1 / 3], "b": [1e-30]}
    Table(path, ["c"], 1).close()
    assert path.read_text().splitlines() == ["step,c"]


def events(folder: pathlib.Path) -> dict[tuple[str, int], float]:
    """The scalars in a folder of TensorBoard's, by name and step."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in folder.iterdir():
        data, place = path.read_bytes(), 0
        while place < len(data):  # length, its checksum, the event, its checksum
            (size,) = struct.unpack("<Q", data[place : place + 8])
            event = Event.FromString(data[place + 12 : place + 12 + size])
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
            place += size + 16
    return found


@pytest.mark.usefixtures("quick")
def test_tensorboard_has_what_the_tables_have(subject, tmp_path) -> None:
    loop.train(subject, SETTINGS, tmp_path, StopAt(tmp_path, 7))
    for path in (tmp_path / TENSORBOARD).iterdir():
        path.write_bytes(b"")  # as where the process was killed before it was written
    loop.train(subject, SETTINGS, tmp_path, loop.Stop(), resume=True)
    found = events(tmp_path / TENSORBOARD)
    losses, scores = series(tmp_path / LOSSES), series(tmp_path / SCORES)
    for step, loss in zip(losses["step"], losses["loss"], strict=True):
        assert found["loss", int(step)] == pytest.approx(loss)
        assert found["seconds_per_step", int(step)] > 0
    for step, score in zip(scores["step"], scores["held out label 1"], strict=True):
        assert found["held_out/label_1", int(step)] == pytest.approx(score)


def command(files, out: pathlib.Path, *arguments: str) -> list[str]:
    small = ["--steps", "16", "--patch", "8", "--batch", "1", "--features", "2", "--accumulate", "2"]
    often = ["--checkpoint-every", "1", "--evaluate-every", "8", "--keep", "2", "--upsampling", "transposed"]
    data = ["--data", *files, "--out", str(out)]
    return [sys.executable, "-m", "examples.brain_segmentation", *data, *small, *often, *arguments]


def kill(process: subprocess.Popen, checkpoints: pathlib.Path, after: int, *, writing: bool) -> None:
    """SIGKILL once checkpoint ``after`` is there; with ``writing``, while the next one is half written."""
    while process.poll() is None:
        names = os.listdir(checkpoints) if checkpoints.exists() else []
        if any(name.isdigit() and int(name) >= after for name in names) and (
            not writing or any("tmp" in name for name in names)
        ):
            process.kill()
        time.sleep(0.0005)
    assert process.wait() == -signal.SIGKILL


def test_a_run_killed_at_any_step_ends_with_the_same_bits(files, tmp_path) -> None:
    """Twice: at a random step, and in the middle of a write."""
    environment = {
        **os.environ,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiles in half the time
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip

    def start(out: str, *arguments: str) -> subprocess.Popen:
        return subprocess.Popen(
            command(files, tmp_path / out, *arguments), cwd=ROOT, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    with start("whole") as process:
        assert process.communicate()[1] is not None
        assert process.returncode == 0
    seed = random.SystemRandom().randrange(1000)
    for attempt, writing in enumerate((False, True)):
        after = 1 + 5 * attempt + random.Random(seed + attempt).randrange(5)
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
