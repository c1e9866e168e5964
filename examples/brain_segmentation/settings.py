"""What a run does, all of it: the same settings, data and machine give the same bits.

Another mesh of devices gives the same numbers to rounding.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib

from examples.brain_segmentation.data import DataError

PRECISIONS = ("float32", "bfloat16", "float16")
SCHEDULES = ("cosine", "linear", "constant")

# They shape what a checkpoint holds; the others may change when a run goes on.
FIXED = ("data", "upsampling", "features", "accumulate", "precision")
FILE = "settings.json"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Attributes are the arguments of the command line, and ``data``, the fingerprint of the volume."""

    data: str
    upsampling: str = "transposed"
    steps: int = 100
    patch: int = 32
    batch: int = 4
    features: int = 8
    learning_rate: float = 6e-3
    schedule: str = "cosine"
    clip: float = 1.0
    accumulate: int = 1
    ema: float = 0.99
    precision: str = "float32"
    augment: bool = True
    seed: int = 0
    mesh: str = ""
    evaluate_every: int = 50
    checkpoint_every: int = 50
    keep: int = 3

    def save(self, folder: pathlib.Path) -> None:
        """Writes the file as a whole or not at all."""
        part = folder / f"{FILE}.part"
        part.write_text(json.dumps(dataclasses.asdict(self), indent=1))
        os.replace(part, folder / FILE)

    def changes(self, folder: pathlib.Path) -> list[str]:
        """How a run in a folder was set otherwise, in words; `DataError` where it cannot go on with these settings."""
        try:
            before = dict(json.loads((folder / FILE).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{folder / FILE} cannot be read; without it the run cannot go on") from error
        now = dataclasses.asdict(self)
        changed = {name: before.get(name) for name in now if before.get(name) != now[name]}
        for name in FIXED:
            if name in changed:
                raise DataError(
                    f"{folder} was begun with {name} {changed[name]!r}, not {now[name]!r}; go on as it was begun, or "
                    "leave out --resume to begin anew"
                )
        return [f"{name} {now[name]}, was {value}" for name, value in changed.items()]
