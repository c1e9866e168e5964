"""What a run leaves: checkpoints that prove themselves, tables, TensorBoard; damaged, they are noticed."""

import pathlib
import re
import shutil
import struct

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

pytest.importorskip("nibabel")

from examples.brain_segmentation import cli, loop
from examples.brain_segmentation.checkpoints import Checkpoints, DamagedError
from examples.brain_segmentation.logs import LOSSES, SCORES, TENSORBOARD, Table, series
from examples.brain_segmentation.train import initial_state
from tests.training_runs import SETTINGS, StopAt, Voxelwise, files_of, same, steps_in

# optax and Flax promote implicitly
pytestmark = [pytest.mark.lenient, pytest.mark.usefixtures("compile_once", "quick_compiles")]


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
def test_a_checkpoint_that_cannot_be_written_ends_the_program_in_one_line(ball, tmp_path, capsys, monkeypatch) -> None:
    def full(*args, **kwargs):
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device\nmore")

    arguments = ["--data", *ball, "--out", str(tmp_path), "--patch", "8", "--batch", "2", "--steps", "3"]
    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "save", full)
        assert cli.main(arguments) == 1
    last = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
    assert last.startswith(f"error: {tmp_path / 'transposed' / 'checkpoints'}: a checkpoint cannot be written")
    assert last.endswith("No space left on device")


def test_a_checkpoint_proves_its_state_and_its_score(tmp_path, capsys) -> None:
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
    for step, score in zip(scores["step"], scores["held out label 7"], strict=True):
        assert found["held_out/label_7", int(step)] == pytest.approx(score)
