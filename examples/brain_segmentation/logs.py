"""What a run writes down as it goes: CSV files, which go on to the bit where a run is resumed, and TensorBoard."""

from __future__ import annotations

import contextlib
import csv
import os
import pathlib
import shutil
import sys
from collections.abc import Sequence
from types import TracebackType

from tensorboardX import SummaryWriter

LOSSES, SCORES, TIMES, TENSORBOARD = "losses.csv", "scores.csv", "times.csv", "tensorboard"


class Table:
    """A CSV file with a row per step, the step first; opened at a step, it forgets the rows behind.

    Attributes:
      rows: those that were there already, up to the step.
    """

    def __init__(self, path: pathlib.Path, columns: Sequence[str], step: int) -> None:
        self.columns, self._path = ["step", *columns], path
        self.rows = [row for row in _rows(path, self.columns) if row[0] <= step]
        part = path.with_name(f"{path.name}.part")
        with part.open("w", newline="") as file:
            csv.writer(file).writerows([self.columns, *([int(row[0]), *map(repr, row[1:])] for row in self.rows)])
        os.replace(part, path)
        self._file = path.open("a", newline="")
        self._writer = csv.writer(self._file)

    def check(self, steps: Sequence[int]) -> None:
        """Says so where the rows are not those of the steps: a log that was changed cannot be mended."""
        if [row[0] for row in self.rows] != list(steps):
            print(f"warning: {self._path} was changed; it does not hold every step any more", file=sys.stderr)

    def write(self, step: int, values: Sequence[float]) -> None:
        """A row that outlives the process; numbers are written in full."""
        self._writer.writerow([step, *map(repr, values)])
        self._file.flush()

    def sync(self) -> None:
        """Now the rows outlive the machine as well."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _rows(path: pathlib.Path, columns: Sequence[str]) -> list[list[float]]:
    """The rows that are whole, where the file has these columns."""
    if not path.exists():
        return []
    with path.open(newline="", errors="replace") as file:
        lines = file.read().replace("\0", "").splitlines()
    header, *rows = list(csv.reader(lines)) or [[]]
    found = []
    for row in rows if header == list(columns) else []:
        with contextlib.suppress(ValueError):
            if len(row) == len(columns):
                found.append([int(row[0]), *map(float, row[1:])])
    return found


def series(path: pathlib.Path) -> dict[str, list[float]]:
    """The columns of a table by name."""
    with path.open(newline="", errors="replace") as file:
        header = next(csv.reader(file), [])
    rows = _rows(path, header)
    return {name: [row[i] for row in rows] for i, name in enumerate(header)}


class Logs:
    """The loss of every step, the scores of every evaluation: as tables, and for TensorBoard made from them.

    Nothing that depends on the machine's speed is in these tables: the same run writes the same files. The seconds that
    steps took are in one of their own.
    """

    def __init__(self, folder: pathlib.Path, classes: Sequence[str], step: int) -> None:
        self.losses = Table(folder / LOSSES, ["loss", "gradient norm", "learning rate"], step)
        columns = [f"{part} {name}" for part in ("validation", "held out") for name in classes]
        self.scores = Table(folder / SCORES, columns, step)
        self.times = Table(folder / TIMES, ["seconds per step"], step)
        # What an earlier process had not yet written for TensorBoard, or wrote past this step, is not in its way.
        shutil.rmtree(folder / TENSORBOARD, ignore_errors=True)
        self._board = SummaryWriter(str(folder / TENSORBOARD), flush_secs=10)
        for table in (self.losses, self.scores, self.times):
            for row in table.rows:
                self._scalars(table, int(row[0]), row[1:])

    def __enter__(self) -> Logs:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for table in (self.losses, self.scores, self.times):
            table.close()
        self._board.close()

    def write(self, table: Table, step: int, values: Sequence[float]) -> None:
        """A row, in its table and for TensorBoard."""
        table.write(step, values)
        self._scalars(table, step, values)

    def sync(self) -> None:
        self.losses.sync()
        self.scores.sync()

    def _scalars(self, table: Table, step: int, values: Sequence[float]) -> None:
        for name, value in zip(table.columns[1:], values, strict=True):
            name = name.replace("validation ", "validation/").replace("held out ", "held_out/")
            self._board.add_scalar(name.replace(" ", "_"), value, step)
