"""What a run writes down as it goes: CSV files, which go on to the bit where a run is resumed, and TensorBoard."""

from __future__ import annotations

import csv
import os
import pathlib
from collections.abc import Mapping, Sequence
from types import TracebackType

from tensorboardX import SummaryWriter

LOSSES, SCORES, TENSORBOARD = "losses.csv", "scores.csv", "tensorboard"


class Table:
    """A CSV file with a row per step, the step first; opened at a step, it forgets the rows behind."""

    def __init__(self, path: pathlib.Path, columns: Sequence[str], step: int) -> None:
        header, *rows = read(path) if path.exists() else [[]]
        kept = [row for row in rows if len(row) == len(columns) + 1 and row[0].isdigit() and int(row[0]) <= step]
        part = path.with_name(f"{path.name}.part")
        with part.open("w", newline="") as file:
            csv.writer(file).writerows([["step", *columns], *(kept if header == ["step", *columns] else [])])
        os.replace(part, path)
        self._file = path.open("a", newline="")
        self._writer = csv.writer(self._file)

    def write(self, step: int, values: Sequence[float]) -> None:
        """A row that outlives the process; numbers are written in full."""
        self._writer.writerow([step, *map(repr, values)])
        self._file.flush()

    def sync(self) -> None:
        """Now the rows outlive the machine as well."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read(path: pathlib.Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file)) or [[]]


def series(path: pathlib.Path) -> dict[str, list[float]]:
    """The columns of a table by name."""
    header, *rows = read(path)
    return {name: [float(row[i]) for row in rows if len(row) == len(header)] for i, name in enumerate(header)}


class Logs:
    """The loss of every step, the scores of every evaluation: as tables and in TensorBoard.

    Nothing that depends on the machine's speed is in the tables: the same run writes the same files.
    """

    def __init__(self, folder: pathlib.Path, classes: Sequence[str], step: int) -> None:
        self._classes = classes
        self.losses = Table(folder / LOSSES, ["loss", "gradient norm", "learning rate"], step)
        columns = [f"{part} {name}" for part in ("validation", "held out") for name in classes]
        self.scores = Table(folder / SCORES, columns, step)
        # TensorBoard itself leaves out what an earlier process wrote past this step.
        self._board = SummaryWriter(str(folder / TENSORBOARD), purge_step=step + 1)

    def __enter__(self) -> Logs:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.losses.close()
        self.scores.close()
        self._board.close()

    def step(self, step: int, loss: float, gradient_norm: float, learning_rate: float, seconds: float) -> None:
        self.losses.write(step, [loss, gradient_norm, learning_rate])
        self._scalars(step, {"loss": loss, "gradient norm": gradient_norm, "learning rate": learning_rate})
        self._scalars(step, {"seconds per step": seconds})

    def evaluation(self, step: int, validation: Sequence[float], held_out: Sequence[float]) -> None:
        """Dice per class, without the background."""
        self.scores.write(step, [*validation, *held_out])
        for part, values in (("validation", validation), ("held out", held_out)):
            self._scalars(step, {f"{part}/{name}": v for name, v in zip(self._classes, values, strict=True)})

    def sync(self) -> None:
        self.losses.sync()
        self.scores.sync()

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(name.replace(" ", "_"), value, step)
