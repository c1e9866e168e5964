"""Checkpoints by orbax: written beside the training, the best and the last few kept, each proved when it is read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import pathlib
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp

from examples.brain_segmentation.train import State

STATE, PROOF = "state", "proof.json"
SCORE, FILES, SUM = "score", "files", "sha256"
FOLDER, DAMAGED = "checkpoints", "damaged"

logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax tells of every step of a save; what matters is said here


class DamagedError(Exception):
    """A checkpoint that does not hold what was written."""


class CheckpointError(Exception):
    """A checkpoint that cannot be written or read; the message is one line."""


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
        self._scores: dict[int, float | None] = {}
        self._writing = 0
        self._prove(folder.absolute() / DAMAGED)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_LatestAndBest(keep, self._scores),
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_proof),
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.wait()
        with contextlib.suppress(Exception):  # what it could not write was said by `wait`, or comes after an error
            self._manager.close()

    def save(self, step: int, state: State, score: float | None) -> None:
        """Begins to write; the training goes on meanwhile. ``score`` None: not evaluated, so never the best."""
        self.wait()
        self._scores[step], self._writing = score, step
        with _named_errors(self._folder):
            self._manager.save(step, args=ocp.args.Composite(**{STATE: ocp.args.StandardSave(state)}), force=True)

    def _write_proof(self) -> None:
        """Called when all is written, but not yet under its name: what is proved is committed with its proof."""
        (folder,) = self._folder.glob(f"{self._writing}.*tmp*")
        proof = {SCORE: self._scores[self._writing], FILES: _digests(folder)}
        (folder / PROOF).write_text(json.dumps({**proof, SUM: _digest(json.dumps(proof).encode())}))

    def path(self, step: int) -> pathlib.Path:
        return self._folder / str(step)

    def wait(self) -> None:
        """Until what was begun is written."""
        with _named_errors(self._folder):
            self._manager.wait_until_finished()

    def latest(self) -> int | None:
        """Of those that are written."""
        self.wait()
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The one with the highest score; the latest where none has one."""
        self.wait()
        return _best(self._manager.all_steps(), self._scores) or self._manager.latest_step()

    def restore(self, step: int) -> State:
        """The state after a step; raises `DamagedError` where it is not what was written."""
        prove(self.path(step))
        with _named_errors(self.path(step)), ocp.StandardCheckpointer() as states:
            return states.restore(self.path(step) / STATE, jax.tree.map(ocp.utils.to_shape_dtype_struct, self._like))

    def _prove(self, shelf: pathlib.Path) -> None:
        """Notes the scores of those that are whole, and takes the others out of the way."""
        for path in sorted(self._folder.glob("[0-9]*"), key=lambda path: path.name):
            if not path.name.isdigit() or not path.is_dir():
                continue
            try:
                self._scores[int(path.name)] = prove(path)
            except DamagedError as damage:
                shelf.mkdir(exist_ok=True)
                shutil.rmtree(shelf / path.name, ignore_errors=True)
                path.rename(shelf / path.name)
                print(
                    f"warning: checkpoint {path.name} is damaged ({damage}); it is not used, and lies in {shelf}",
                    file=sys.stderr,
                )


class _LatestAndBest(ocp.checkpoint_managers.PreservationPolicy):
    """Orbax's own `BestN` forgets the scores when the process ends; here they are those of the proofs."""

    def __init__(self, keep: int, scores: Mapping[int, float | None]) -> None:
        self._keep, self._scores = keep, scores

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*steps[-self._keep :], _best(steps, self._scores)}
        return [step in kept for step in steps]


def _best(steps: Iterable[int], scores: Mapping[int, float | None]) -> int | None:
    """The step with the highest score, the latest of equals."""
    scored = [(score, step) for step in steps if (score := scores.get(step)) is not None]
    return max(scored)[1] if scored else None


@contextlib.contextmanager
def _named_errors(path: pathlib.Path) -> Iterator[None]:
    """What the layers below raise where a disk is full, or a file cannot be opened."""
    try:
        yield
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: a checkpoint cannot be written or read: {reason[:200]}") from error


def prove(path: pathlib.Path) -> float | None:
    """The score of a checkpoint, whose files are those that were written; else `DamagedError`."""
    try:
        proof = json.loads((path / PROOF).read_text())
        total, files = proof.pop(SUM), proof[FILES]
        if _digest(json.dumps(proof).encode()) != total:
            raise DamagedError(f"{PROOF} is not what was written")
        found = _digests(path)
    except FileNotFoundError as error:
        raise DamagedError(f"it has no {pathlib.Path(error.filename).name}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{PROOF} is not what was written") from error
    for name, digest in files.items():
        if found.get(name) != digest:
            raise DamagedError(f"{name} is {'not what was written' if name in found else 'missing'}")
    return proof[SCORE]


def _digests(folder: pathlib.Path) -> dict[str, str]:
    """By name, the files that hold the state."""
    files = sorted(path for path in (folder / STATE).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): _digest(path.read_bytes()) for path in files}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
