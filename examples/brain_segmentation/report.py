"""What the run leaves: a table of Dice scores, the segmented volume, the parameters, a picture."""

from __future__ import annotations

import csv
import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import flax.traverse_util
import nibabel as nib
import numpy as np

from examples.brain_segmentation.data import Subject
from examples.brain_segmentation.figure import draw
from examples.brain_segmentation.logs import LOSSES, SCORES, series
from examples.brain_segmentation.loop import Trained

TABLE, SEGMENTATION, PARAMETERS, FIGURE = "dice.csv", "segmentation.nii.gz", "parameters.npz", "segmentation.png"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One trained network: its held-out Dice per class, and the run that led there."""

    upsampling: str
    dice: Sequence[float]
    run: Trained


def outputs(out: pathlib.Path, upsamplings: Sequence[str]) -> Iterator[pathlib.Path]:
    """What a run has written."""
    for name in (TABLE, SEGMENTATION, FIGURE, PARAMETERS, *upsamplings):
        if (out / name).exists():
            yield out / name


def _header(subject: Subject) -> list[str]:
    return ["upsampling", *subject.names[1:], "steps", "best", "loss", "s/step", "compile s"]


def _row(entry: Entry) -> list[str]:
    run, scores = entry.run, [f"{score:.3f}" for score in entry.dice[1:]]
    numbers = [f"{run.loss:.3f}", f"{run.seconds_per_step:.3f}", f"{run.compile_seconds:.1f}"]  # nan, 0: not this time
    return [entry.upsampling, *scores, str(run.steps), str(run.best), *numbers]


def table(subject: Subject, entries: Sequence[Entry]) -> str:
    """The held-out Dice scores as text."""
    rows = [_header(subject), *map(_row, entries)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    split, length = subject.split, subject.image.shape[1]
    title = (
        f"Dice on the held-out front (slices {split.test} to {length - 1}; learnt from slices 0 to {split.train - 1})"
    )
    return "\n".join(["", title, lines[0], "-" * len(lines[0]), *lines[1:], ""])


def save_table(out: pathlib.Path, subject: Subject, entries: Sequence[Entry]) -> None:
    with (out / TABLE).open("w", newline="") as file:
        csv.writer(file).writerows([_header(subject), *map(_row, entries)])


def save_parameters(out: pathlib.Path, params: Any) -> None:
    """One array per parameter, named by its path in the tree."""
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    arrays: dict[str, Any] = {name: np.asarray(value) for name, value in flat.items()}
    np.savez(out / PARAMETERS, **arrays)


def save_segmentation(out: pathlib.Path, subject: Subject, prediction: np.ndarray) -> None:
    nib.save(subject.to_file_grid(prediction), out / SEGMENTATION)


def save_figure(out: pathlib.Path, subject: Subject, prediction: np.ndarray, runs: Sequence[pathlib.Path]) -> None:
    """The first network's picture, with the curves of all."""
    draw(out / FIGURE, subject, prediction, {run.name: (series(run / LOSSES), series(run / SCORES)) for run in runs})
