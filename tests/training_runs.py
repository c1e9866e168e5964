"""What the tests of the demo's training share: small data, a small network, runs that stop, and what they leave."""

import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("nibabel")

import nibabel as nib

from examples.brain_segmentation import loop
from examples.brain_segmentation.evaluate import Scores
from examples.brain_segmentation.logs import LOSSES, SCORES
from examples.brain_segmentation.settings import Settings

AFFINE = np.array([[0, -1.5, 0, 7], [2.0, 0, 0, -3], [0, 0, 3.0, 5], [0, 0, 0, 1]])  # axes: anterior, left, superior
SETTINGS = Settings(data="x", steps=12, patch=8, batch=2, evaluate_every=5, checkpoint_every=3, keep=2)


def sphere(shape=(56, 24, 16)):
    """A bright ball in noise, with its labels (values 0 and 7)."""
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, size) for size in shape), indexing="ij"))
    inside = (grid**2).sum(0) < 0.8
    return (inside * 3 + rng.normal(size=shape) * 0.3 + 2).astype(np.float32), (inside * 7).astype(np.uint8)


def ball(folder: pathlib.Path) -> tuple[str, str]:
    """Its files."""
    paths = folder / "image.nii", folder / "labels.nii"
    for path, data in zip(paths, sphere(), strict=True):
        nib.save(nib.Nifti1Image(data, AFFINE), path)
    return str(paths[0]), str(paths[1])


class Voxelwise(nn.Module):
    """A network that compiles at once."""

    classes: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.classes)(nn.tanh(nn.Dense(4)(x)))


def make_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop with a small network, and evaluations that cost nothing: the score of a step is written down here."""
    monkeypatch.setattr(loop, "make_model", lambda classes, settings: Voxelwise(classes))

    def evaluate(model, params, subject):
        total = float(sum(jnp.abs(leaf).sum() for leaf in jax.tree.leaves(params)))
        return Scores([0.0, total % 1], [0.0, total % 0.5], total % 1)

    monkeypatch.setattr(loop, "evaluate", evaluate)


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
