"""The training loop: it logs, evaluates, keeps checkpoints, stops when asked, and goes on where it stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import pathlib
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import jax
from tqdm import tqdm

from examples.brain_segmentation.checkpoints import FOLDER, Checkpoints
from examples.brain_segmentation.data import Subject
from examples.brain_segmentation.devices import Devices
from examples.brain_segmentation.evaluate import evaluate
from examples.brain_segmentation.logs import LOSSES, Logs, series
from examples.brain_segmentation.model import UNet
from examples.brain_segmentation.patches import PatchSampler
from examples.brain_segmentation.settings import FILE, Settings
from examples.brain_segmentation.train import Metrics, Params, State, initial_state, make_model, make_step


class TrainingError(Exception):
    """The training cannot go on; the message is one line."""


class Stop:
    """Whether Ctrl-C was pressed, or the process told to end. The second signal interrupts at once."""

    def __init__(self) -> None:
        self.requested = False

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("\nstopping after this step and keeping what was learnt; Ctrl-C again quits at once", file=sys.stderr)

    @contextlib.contextmanager
    def listen(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@dataclasses.dataclass(frozen=True)
class Trained:
    """The outcome of a run: the averaged parameters of its best checkpoint, and what it took.

    ``seconds_per_step`` is of the steps that this process did, NaN for none; evaluations and saves are apart.
    """

    model: UNet
    params: Params
    best: int
    steps: int
    loss: float
    seconds_per_step: float
    compile_seconds: float


def train(subject: Subject, settings: Settings, folder: pathlib.Path, stop: Stop, resume: bool = False) -> Trained:
    """Trains in a folder until ``settings.steps`` batches are seen or ``stop`` is requested.

    Args:
      subject: what is learnt.
      settings: all that decides the outcome.
      folder: of this run: its settings, checkpoints, logs. What an earlier run left there is moved to a folder beside
        it, or gone on from with ``resume``, from its latest checkpoint: to the bit as if it had never stopped.
      stop: looked at between two steps.
      resume: see ``folder``; where there is nothing to go on from, the run begins.

    Raises:
      TrainingError: a loss or gradient that is not a number, or infinite.
      DataError: settings that a run cannot go on with.
      CheckpointError: a checkpoint that cannot be written, on a full disk for instance.
    """
    sampler = PatchSampler(subject, settings.patch, settings.batch, settings.seed)  # before anything is moved
    devices = Devices(settings)
    _prepare(folder, settings, resume)
    model = make_model(len(subject.names), settings)
    state = devices.everywhere(initial_state(model, settings))
    with Checkpoints(folder, settings.keep, state) as checkpoints:
        done = checkpoints.latest() or 0
        state = checkpoints.restore(done) if done else state
        if resume:
            said = f"going on from step {done}" if done else "no checkpoint to go on from; beginning"
            print(f"{folder}: {said}", file=sys.stderr)
        with Logs(folder, subject.names[1:], done) as logs:
            every = range(settings.evaluate_every, done + 1, settings.evaluate_every)
            logs.losses.check(range(1, done + 1))
            logs.scores.check(sorted({*every, *([done] if done == settings.steps else [])}))
            run = _Run(subject, settings, devices, sampler, model, checkpoints, logs, stop)
            if done < settings.steps:
                state = run.go_on(state)
        best = checkpoints.best()
        params = jax.device_get(state.average if best is None else checkpoints.restore(best).average)
    losses = series(folder / LOSSES)["loss"]
    per_step = statistics.median(run.seconds) if run.seconds else math.nan
    return Trained(
        model, params, best or 0, int(state.step), losses[-1] if losses else math.nan, per_step, run.compile_seconds
    )


def _prepare(folder: pathlib.Path, settings: Settings, resume: bool) -> None:
    """The folder as the run needs it: with what there is to go on from, or new."""
    if resume and ((folder / FILE).exists() or any((folder / FOLDER).glob("[0-9]*"))):
        for change in settings.changes(folder):
            print(f"warning: {folder} goes on with {change}", file=sys.stderr)
    elif folder.exists() and any(folder.iterdir()):
        number = next(i for i in itertools.count(1) if not folder.with_name(f"{folder.name}.earlier-{i}").exists())
        aside = folder.with_name(f"{folder.name}.earlier-{number}")
        folder.rename(aside)
        print(f"the earlier run in {folder} is now {aside}", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    settings.save(folder)


@dataclasses.dataclass
class _Run:
    """What the steps of a run share."""

    subject: Subject
    settings: Settings
    devices: Devices
    sampler: PatchSampler
    model: UNet
    checkpoints: Checkpoints
    logs: Logs
    stop: Stop
    seconds: list[float] = dataclasses.field(default_factory=list)
    compile_seconds: float = 0.0
    dice: float = math.nan  # the mean of the latest validation

    def go_on(self, state: State) -> State:
        """The steps that are left; the state after them, which is saved."""
        settings, saved, done = self.settings, True, int(state.step)
        started = time.perf_counter()
        step = jax.jit(make_step(self.model, settings)).lower(state, *self._batch(done)).compile()
        self.compile_seconds = time.perf_counter() - started
        with tqdm(
            desc=settings.upsampling, total=settings.steps, initial=done, unit="step", dynamic_ncols=True
        ) as progress:
            while done < settings.steps and not self.stop.requested:
                started = time.perf_counter()
                new, metrics = step(state, *self._batch(done))
                loss = float(metrics.loss)
                self.seconds.append(time.perf_counter() - started)
                self._check(new, metrics, done)
                state, done = new, done + 1
                saved = self._write(state, metrics, done)
                progress.set_postfix(loss=f"{loss:.3f}", dice=f"{self.dice:.3f}", refresh=False)
                progress.update()
        if not saved:  # stopped
            self._save(state, done, None)
        return state

    def _batch(self, index: int) -> tuple[Any, ...]:
        return self.devices.cut(*self.sampler(index))

    def _check(self, state: State, metrics: Metrics, index: int) -> None:
        """A loss that is no number ends the run before it is in anything that is kept.

        In float16 a gradient may overflow: the step was skipped and the loss scale lowered, which must end somewhere.
        """
        values = {"loss": float(metrics.loss)}
        if state.scale is None:
            values["gradient norm"] = float(metrics.gradient_norm)
        wrong = [f"the {name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        if state.scale is not None and state.scale.scale < 1:
            wrong.append("the gradient overflows float16 at any loss scale")
        if wrong:
            last = self.checkpoints.latest()
            raise TrainingError(
                f"step {index + 1}: {wrong[0]}, on {self.sampler.describe(index)}; "
                f"the last good checkpoint is {self.checkpoints.path(last) if last else 'none'}"
            )

    def _write(self, state: State, metrics: Metrics, done: int) -> bool:
        """Logs the step; evaluates and saves where it is time to. Whether it was saved."""
        settings, logs, score = self.settings, self.logs, None
        values = (metrics.loss, metrics.gradient_norm, metrics.learning_rate)
        logs.write(logs.losses, done, [float(value) for value in values])
        logs.write(logs.times, done, [self.seconds[-1]])
        if done % settings.evaluate_every == 0 or done == settings.steps:
            scores = evaluate(self.model, jax.device_get(state.average), self.subject)  # on one device
            logs.write(logs.scores, done, [*scores.validation[1:], *scores.held_out[1:]])
            score = self.dice = scores.choice
        if score is None and done % settings.checkpoint_every != 0:
            return False
        self._save(state, done, score)
        return True

    def _save(self, state: State, done: int, score: float | None) -> None:
        self.logs.sync()  # the tables reach as far as the checkpoint does
        self.checkpoints.save(done, state, score)
