"""The demo: it learns, splits without leaking, writes what it promises, and fails in one line."""

import csv
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

pytest.importorskip("nibabel")

import nibabel as nib

from examples.brain_segmentation import cli, report
from examples.brain_segmentation.data import DataError, Subject, load_files, load_mni152
from examples.brain_segmentation.devices import Devices
from examples.brain_segmentation.evaluate import dice, score
from examples.brain_segmentation.logs import LOSSES, series
from examples.brain_segmentation.loop import Stop, train
from examples.brain_segmentation.model import UNet
from examples.brain_segmentation.patches import PatchSampler
from examples.brain_segmentation.settings import Settings
from tests.training_runs import AFFINE, sphere

pytestmark = [
    pytest.mark.lenient,
    pytest.mark.usefixtures("compile_once", "quick_compiles"),
]  # optax and Flax promote implicitly

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def files(tmp_path: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    image, labels = sphere()
    paths = tmp_path / "image.nii.gz", tmp_path / "labels.nii"
    for path, data in zip(paths, (image, labels), strict=True):
        nib.save(nib.Nifti1Image(data, AFFINE), path)
    return paths


def run(files, out: pathlib.Path, *arguments: str) -> int:
    small = ("--steps", "3", "--patch", "8", "--batch", "2", "--features", "2")
    return cli.main(["--data", *map(str, files), "--out", str(out), *small, *arguments])


@pytest.fixture(scope="module")
def brain() -> Subject:
    return load_mni152()


def test_the_brain_has_its_tissues_in_place(brain: Subject) -> None:
    assert brain.image.shape == brain.labels.shape == (99, 117, 95)
    assert brain.names == ("background", "grey matter", "white matter", "other tissue")
    share = np.bincount(brain.labels.ravel()) / (brain.labels > 0).sum()
    assert 0.4 < share[1] < 0.7
    assert 0.25 < share[2] < 0.5
    means = [brain.image[brain.labels == label].mean() for label in (3, 1, 2)]
    assert means == sorted(means)  # in T1, fluid is dark and white matter bright


def test_no_patch_touches_the_gap_or_the_held_out_part(brain: Subject) -> None:
    split = brain.split
    assert split.train < split.test - 4
    poisoned = Subject(
        image=np.where(np.arange(117)[None, :, None] < split.train, brain.image, np.nan),
        labels=brain.labels, names=brain.names, values=brain.values, spacing=brain.spacing, original=brain.original,
    )  # fmt: skip
    sampler = PatchSampler(poisoned, 32, 4, seed=1)
    assert all(np.isfinite(sampler(step)[0]).all() for step in range(100))


def test_patches_are_a_function_of_seed_and_step(brain: Subject) -> None:
    first, again = PatchSampler(brain, 16, 2, seed=3), PatchSampler(brain, 16, 2, seed=3)
    again(0)
    np.testing.assert_array_equal(first(5)[0], again(5)[0])
    assert not np.array_equal(first(5)[0], first(6)[0])
    assert not np.array_equal(first(5)[0], PatchSampler(brain, 16, 2, seed=4)(5)[0])


@pytest.mark.slow
def test_a_few_steps_lower_the_loss(brain: Subject, tmp_path: pathlib.Path) -> None:
    settings = Settings(data=brain.fingerprint, steps=25, patch=16, batch=2, features=4, learning_rate=1e-2)
    trained = train(brain, settings, tmp_path / "run", Stop())
    losses = series(tmp_path / "run" / LOSSES)["loss"]
    assert trained.steps == len(losses) == 25
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_the_decoder_is_conv3d_transpose() -> None:
    params = jax.eval_shape(UNet(4, 4).init, jax.random.key(0), np.zeros((1, 8, 8, 8, 1), np.float32))["params"]
    kernels = [value["kernel"].shape for name, value in params.items() if name.startswith("Conv3DTranspose")]
    assert sorted(kernels) == [(2, 2, 2, 4, 8), (2, 2, 2, 8, 16), (2, 2, 2, 16, 32)]


def test_dice() -> None:
    a, b = np.array([0, 1, 1, 1, 2]), np.array([0, 1, 1, 2, 2])
    assert dice(a, b, 4)[:3] == pytest.approx([1, 0.8, 2 / 3])
    assert np.isnan(dice(a, b, 4)[3])


def test_scores_are_of_the_slices_that_were_not_trained_on(brain: Subject) -> None:
    split, wrong = brain.split, brain.labels.copy()
    wrong[:, : split.train] = 0
    assert score(brain, wrong).validation == score(brain, wrong).held_out == [1, 1, 1, 1]
    wrong[:, split.test :] = 0
    scores = score(brain, wrong[:, split.train - 3 :], split.train - 3)
    assert scores.validation == [1, 1, 1, 1]
    assert scores.held_out[1:] == [0, 0, 0]
    assert scores.choice == 1


@pytest.mark.slow
def test_own_files_give_every_output_on_their_own_grid(files, tmp_path, capsys) -> None:
    out = tmp_path / "results" / "deep"
    assert run(files, out) == 0
    printed = capsys.readouterr().out
    assert re.search(r"transposed +\d\.\d{3} +3 ", printed)
    assert re.search(r"trilinear +\d\.\d{3} +3 ", printed)
    segmentation = nib.load(out / report.SEGMENTATION)
    np.testing.assert_allclose(segmentation.affine, AFFINE)
    assert segmentation.shape == (56, 24, 16)
    assert segmentation.get_data_dtype() == np.int16
    assert set(np.unique(segmentation.dataobj)) <= {0, 7}
    with np.load(out / report.PARAMETERS) as parameters:
        assert parameters["Conv3DTranspose_0/kernel"].shape == (2, 2, 2, 8, 16)
    with (out / report.TABLE).open() as file:
        rows = list(csv.DictReader(file))
    assert [row["upsampling"] for row in rows] == ["transposed", "trilinear"]
    assert (out / report.FIGURE).read_bytes().startswith(b"\x89PNG")


def test_labels_return_to_the_orientation_of_the_file(files) -> None:
    subject = load_files(*files)
    assert subject.image.shape == (24, 56, 16)
    assert subject.spacing == pytest.approx((1.5, 2.0, 3.0))
    np.testing.assert_array_equal(subject.to_file_grid(subject.labels).dataobj, sphere()[1])


def spoil(kind: str, folder: pathlib.Path, files) -> list[str]:
    image, labels = sphere()
    bad = folder / f"{kind}.nii"
    replacements = {
        "short": image[:, :8], "flat": image[:, :, 0], "four": image[..., None], "nan": np.where(image > 4, np.nan, image),
        "constant": np.ones_like(image),
    }  # fmt: skip
    label_replacements = {
        "fractions": labels + np.float32(0.5), "one_class": labels * 0, "no_background": labels + 1,
        "continuous": np.round(image * 1000).astype(np.int16), "other_shape": labels[1:],
    }  # fmt: skip
    if kind in replacements:
        nib.save(nib.Nifti1Image(replacements[kind], AFFINE), bad)
        return ["--data", str(bad), str(files[1])]
    if kind in label_replacements:
        nib.save(nib.Nifti1Image(label_replacements[kind], AFFINE), bad)
        return ["--data", str(files[0]), str(bad)]
    if kind == "other_affine":
        nib.save(nib.Nifti1Image(labels, np.eye(4)), bad)
        return ["--data", str(files[0]), str(bad)]
    bad.write_bytes(files[1].read_bytes()[:1000] if kind == "truncated" else b"not an image")
    return ["--data", str(bad), str(files[1])]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("short", "has shape"), ("flat", "2-D"), ("four", "4-D"), ("nan", "NaN"), ("constant", "constant"),
        ("fractions", "fractions"), ("one_class", "1 different values"), ("no_background", "0 must be the background"),
        ("continuous", "different values"), ("other_shape", "has shape"), ("other_affine", "affine"),
        ("truncated", "cannot be read"), ("text", "cannot be read"),
    ],
)  # fmt: skip
def test_a_wrong_file_gives_one_line(kind, message, files, tmp_path, capsys) -> None:
    assert cli.main([*spoil(kind, tmp_path, files), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere.nii", "nowhere.nii"], "nowhere.nii: no such file"), (["--data", "one.nii"], "expected 2 arguments"),
        (["--patch", "12"], "--patch 12 must be a multiple of 8"), (["--patch", "96"], "--patch 96 is larger than the part"),
        (["--steps", "0"], "'0' is no positive integer"), (["--steps", "many"], "'many' is no positive integer"),
        (["--lr", "-1"], "'-1' is no learning rate"), (["--ema", "1"], "'1' is no number from 0"), (["--clip", "no"], "'no' is no norm"),
        (["--accumulate", "30"], "--steps 100 must be a multiple of --accumulate 30"), (["--steps", "1"], "nothing would be learnt"),
        (["--steps", "1" + "0" * 20], "is no positive integer below 2**31"), (["--accumulate", "100"], "nothing would be learnt"),
         (["--precision", "fp8"], "invalid choice: 'fp8'"), (["--seed", "-1"], "'-1' is no integer"),
        (["--mesh", "time=2"], "'time=2' is no mesh: write sizes of data, depth"), (["--mesh", "depth=2,depth=2"], "is no mesh"),
        (["--mesh", "data=3"], "--mesh data=3 cannot cut --batch 4 into 3 equal parts"),
        (["--mesh", "width=3"], "--mesh width=3 cannot cut --patch 32"),
        (["--colour", "red"], "unrecognized arguments"), (["--out", "/dev/null/x"], "/dev/null"),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_argument_gives_one_line(arguments, message, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status = cli.main(arguments)
    except SystemExit as exit_:
        status = exit_.code
    error = capsys.readouterr().err
    assert status == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_a_mesh_needs_devices() -> None:
    count = len(jax.devices())
    settings = Settings(data="", batch=2 * count, mesh=f"data={2 * count}")
    with pytest.raises(DataError, match=f"--mesh data={2 * count} needs {2 * count} devices, and there are {count}"):
        Devices(settings)


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_learnt(files, tmp_path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "examples.brain_segmentation", "--data", *map(str, files), "--out", str(out)]
    command += ["--steps", "100000", "--patch", "8", "--batch", "1", "--features", "2"]
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # compiles in half the time
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        seen = ""
        while not re.search(r"[1-9]\d*/100000", seen):
            seen += process.stderr.read(1)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in seen + stderr
    assert "keeping what was learnt" in stderr
    assert "trilinear" not in stdout
    assert {path.name for path in report.outputs(out, ['transposed', 'trilinear'])} == {
        report.TABLE, report.SEGMENTATION, report.FIGURE, report.PARAMETERS, "transposed",
    }  # fmt: skip
