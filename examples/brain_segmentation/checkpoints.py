"""Checkpoints by orbax: written beside the training, the best and the last few kept, each proved when it is read."""

from __future__ import annotations

import hashlib
import logging
import pathlib
import shutil
import sys
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from examples.brain_segmentation.train import State

STATE, PROOF, SCORE = "state", "proof", "score"
FOLDER, DAMAGED = "checkpoints", "damaged"

# Orbax tells of every step of a save, and of every array that it cannot read; what matters is said here.
logging.getLogger("absl").setLevel(logging.ERROR)
logging.getLogger("asyncio").setLevel(logging.CRITICAL)


class DamagedError(Exception):
    """A checkpoint that does not hold what was written."""


class Checkpoints:
    """The checkpoints of one run, in a folder of their own; a number names each: the steps done.

    Args:
      folder: of the run.
      keep: how many of the latest are kept, beside the best.
      like: a state of the same shapes.

    Those that are there already are proved, and damaged ones moved aside, said aloud.
    """

    def __init__(self, folder: pathlib.Path, keep: int, like: State) -> None:
        self._folder = folder.absolute() / FOLDER
        self._like = like
        self._set_damaged_aside(folder.absolute() / DAMAGED)
        policy = ocp.checkpoint_managers.AnyPreservationPolicy(
            [
                ocp.checkpoint_managers.LatestN(keep),
                ocp.checkpoint_managers.BestN(
                    get_metric_fn=lambda metrics: metrics[SCORE], n=1, keep_checkpoints_without_metrics=False
                ),
            ]
        )
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(preservation_policy=policy, cleanup_tmp_directories=True),
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._manager.close()  # waits for what is being written

    def save(self, step: int, state: State, score: float | None) -> None:
        """Begins to write; the training goes on meanwhile. ``score`` None: not evaluated, so never the best."""
        proof = {"sha256": digest(state), SCORE: score}
        items = {STATE: ocp.args.StandardSave(state), PROOF: ocp.args.JsonSave(proof)}
        self._manager.save(
            step, args=ocp.args.Composite(**items), metrics=None if score is None else {SCORE: score}, force=True
        )

    def path(self, step: int) -> pathlib.Path:
        return self._folder / str(step)

    def wait(self) -> None:
        """Until what was begun is written."""
        self._manager.wait_until_finished()

    def latest(self) -> int | None:
        """Of those that are written."""
        self.wait()
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The one with the highest score; the latest where none has one."""
        self.wait()
        scores = {step: _proof(self.path(step))[SCORE] for step in self._manager.all_steps()}
        scored = [(score, step) for step, score in scores.items() if score is not None]
        return max(scored)[1] if scored else self._manager.latest_step()

    def restore(self, step: int) -> State:
        """The state after a step; raises `DamagedError` where it is not what was written."""
        return read(self.path(step), self._like)

    def _set_damaged_aside(self, shelf: pathlib.Path) -> None:
        for path in sorted(self._folder.glob("[0-9]*"), key=lambda path: path.name):
            if not path.name.isdigit():
                continue
            try:
                read(path, self._like)
            except DamagedError as damage:
                shelf.mkdir(exist_ok=True)
                shutil.rmtree(shelf / path.name, ignore_errors=True)
                path.rename(shelf / path.name)
                print(
                    f"warning: checkpoint {path.name} is damaged ({damage}); it is not used, and lies in {shelf}",
                    file=sys.stderr,
                )


def read(path: pathlib.Path, like: State) -> State:
    """The state in a checkpoint's folder, proved against its digest; on the devices of ``like``."""
    try:
        with ocp.StandardCheckpointer() as states:
            state = states.restore(path / STATE, jax.tree.map(ocp.utils.to_shape_dtype_struct, like))
        expected = _proof(path)["sha256"]
    except Exception as error:  # every layer below has errors of its own for what it cannot read
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DamagedError(f"it cannot be read: {reason[:160]}") from error
    if digest(state) != expected:
        raise DamagedError("its values are not those that were written")
    return state


def _proof(path: pathlib.Path) -> dict[str, Any]:
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as texts:
        return texts.restore(path / PROOF)


def digest(state: State) -> str:
    """A hash of every value, by name."""
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        array: Any = np.asarray(leaf)
        total.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode() + array.tobytes())
    return total.hexdigest()
