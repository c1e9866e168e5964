"""How well a segmentation agrees with the truth: Dice per class, between the parts that were not trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from examples.brain_segmentation.data import Subject
from examples.brain_segmentation.inference import WINDOW, probabilities
from examples.brain_segmentation.model import UNet


@dataclasses.dataclass(frozen=True)
class Scores:
    """Dice per class, background first: of the slices that choose among checkpoints, and of those held out."""

    validation: Sequence[float]
    held_out: Sequence[float]
    choice: float
    """What checkpoints are compared by: the mean over the classes that the validation has, without the background."""


def evaluate(model: UNet, params: Any, subject: Subject) -> Scores:
    """Scores of the slices in front of those that are trained on, which are computed alone: a sketch of `segment`'s."""
    start = max(0, subject.split.train - WINDOW // 4)
    return score(subject, segment(model, params, subject.image[:, start:]), start)


def segment(model: UNet, params: Any, image: np.ndarray) -> np.ndarray:
    """``(D, H, W)`` image to ``(D, H, W)`` class indices."""
    return probabilities(model, params, image).argmax(-1).astype(np.int32)


def score(subject: Subject, prediction: np.ndarray, start: int = 0) -> Scores:
    """Scores of a prediction whose slices begin at ``start``."""
    split, classes = subject.split, len(subject.names)

    def part(begin: int, end: int) -> list[float]:
        return dice(prediction[:, begin - start : end - start], subject.labels[:, begin:end], classes)

    validation = part(split.train, split.test)
    there = [label for label in np.unique(subject.labels[:, split.train : split.test]) if label > 0]
    choice = float(np.mean([validation[label] for label in there])) if there else 0.0
    return Scores(validation, part(split.test, subject.image.shape[1]), choice)


def dice(prediction: np.ndarray, truth: np.ndarray, classes: int) -> list[float]:
    """Per class, twice the overlap over the sum of the sizes; 1 is perfect, NaN where a class is in neither."""
    scores = []
    for label in range(classes):
        a, b = prediction == label, truth == label
        total = int(a.sum()) + int(b.sum())
        scores.append(2 * int((a & b).sum()) / total if total else float("nan"))
    return scores
