"""Arguments of the demo, and the run from data to report."""

from __future__ import annotations

import argparse
import dataclasses
import math
import pathlib
import sys
from collections.abc import Callable, Sequence

from examples.brain_segmentation import devices, report
from examples.brain_segmentation.checkpoints import CheckpointError, DamagedError
from examples.brain_segmentation.data import DataError, Subject, load_files, load_mni152
from examples.brain_segmentation.evaluate import score, segment
from examples.brain_segmentation.loop import Stop, TrainingError, train
from examples.brain_segmentation.model import FACTOR, UPSAMPLINGS
from examples.brain_segmentation.settings import PRECISIONS, SCHEDULES, Settings


def positive(text: str) -> int:
    value = int(text) if text.lstrip("+-").isdigit() else 0
    if not 0 < value < 2**31:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no positive integer below 2**31")
    return value


def seed_value(text: str) -> int:
    if not text.isdigit() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer from 0 to 2**32 - 1")
    return int(text)


def norm(text: str) -> float:
    return _number(text, lambda value: 0 < value < 1e9, "norm (a number above 0)")


def rate(text: str) -> float:
    return _number(text, lambda value: 0 < value < 10, "learning rate (a number above 0)")


def fraction(text: str) -> float:
    return _number(text, lambda value: 0 <= value < 1, "number from 0 to below 1")


def _number(text: str, fits: Callable[[float], bool], what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not fits(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no {what}")
    return value


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> None:  # type: ignore[override]
        self.exit(2, f"error: {message}\n")


def parser() -> argparse.ArgumentParser:
    p = OneLineParser(
        prog="python -m examples.brain_segmentation",
        description="Train a 3-D U-Net of Conv3D and Conv3DTranspose to segment a brain, and report what it learnt.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="folder of the results")
    p.add_argument(
        "--data", nargs=2, type=pathlib.Path, metavar=("IMAGE", "LABELS"),
        help="NIfTI files of your own: an image, and integer labels on its grid, 0 for the background "
        "(default: the MNI152 brain of the nilearn package)",
    )  # fmt: skip
    p.add_argument(
        "--upsampling", nargs="+", choices=list(UPSAMPLINGS), default=["transposed", "trilinear"],
        help="the networks to train, one after the other; the first one's segmentation is written",
    )  # fmt: skip
    p.add_argument("--resume", action="store_true", help="go on from the latest checkpoint in --out")
    _training_arguments(p.add_argument_group("training"))
    _keeping_arguments(p.add_argument_group("evaluation and checkpoints"))
    return p


def _training_arguments(p: argparse._ArgumentGroup) -> None:
    default = Settings(data="")
    p.add_argument("--steps", type=positive, default=default.steps, help="batches to see")
    p.add_argument(
        "--patch", type=positive, default=default.patch, help=f"edge of the cubic patches, a multiple of {FACTOR}"
    )
    p.add_argument("--batch", type=positive, default=default.batch, help="patches per step")
    p.add_argument("--accumulate", type=positive, default=default.accumulate, help="steps per update of the parameters")
    p.add_argument("--features", type=positive, default=default.features, help="channels of the finest level")
    p.add_argument("--lr", type=rate, default=default.learning_rate, help="highest learning rate")
    p.add_argument("--schedule", choices=SCHEDULES, default=default.schedule, help="of the learning rate")
    p.add_argument("--clip", type=norm, default=default.clip, help="highest norm of the gradient")
    p.add_argument("--ema", type=fraction, default=default.ema, help="decay of the averaged parameters; 0: no average")
    p.add_argument(
        "--precision", choices=PRECISIONS, default=default.precision, help="of the computation; parameters are float32"
    )
    p.add_argument("--no-augmentation", action="store_true", help="learn from the patches as they are")
    p.add_argument(
        "--mesh", type=devices.mesh_value, default=default.mesh, metavar="NAME=SIZE,...",
        help=f"devices to train on, by {', '.join(devices.AXES)}: data=2,depth=2, say, cuts batches and patches in "
        "two; a CPU stands for as many as are asked for",
    )  # fmt: skip
    p.add_argument("--seed", type=seed_value, default=default.seed, help="of parameters, patches and augmentation")


def _keeping_arguments(p: argparse._ArgumentGroup) -> None:
    default = Settings(data="")
    p.add_argument("--evaluate-every", type=positive, default=default.evaluate_every, help="steps")
    p.add_argument("--checkpoint-every", type=positive, default=default.checkpoint_every, help="steps")
    p.add_argument("--keep", type=positive, default=default.keep, help="latest checkpoints to keep, beside the best")


def settings_of(args: argparse.Namespace, data: str, upsampling: str) -> Settings:
    taken = {field.name for field in dataclasses.fields(Settings)} & set(vars(args)) - {"data", "upsampling"}
    return Settings(
        data=data, upsampling=upsampling, learning_rate=args.lr, augment=not args.no_augmentation,
        **{name: getattr(args, name) for name in taken},
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; the exit status is 0, 1 where training fails, 2 for bad input, 130 after Ctrl-C."""
    args = parser().parse_args(argv)
    try:
        return run(args)
    except (TrainingError, CheckpointError, DamagedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error.filename or args.out}: {error.strerror}", file=sys.stderr)
    except MemoryError as error:
        print(f"error: out of memory: {error}", file=sys.stderr)
    return 2


def run(args: argparse.Namespace) -> int:
    if args.patch % FACTOR:
        raise DataError(f"--patch {args.patch} must be a multiple of {FACTOR}, by which the network divides it")
    if args.steps % args.accumulate:
        raise DataError(
            f"--steps {args.steps} must be a multiple of --accumulate {args.accumulate}; the rest would be lost"
        )
    if args.steps < 2 * args.accumulate:
        raise DataError(
            f"--steps {args.steps} with --accumulate {args.accumulate} makes one update, at the learning rate 0 that "
            "the warm-up begins with: nothing would be learnt"
        )
    devices.check(args.mesh, args.batch, args.patch)
    devices.ask_for(args.mesh)
    args.out.mkdir(parents=True, exist_ok=True)
    subject = load_files(*args.data) if args.data else load_mni152()
    if subject.split.test >= subject.image.shape[1]:
        raise DataError(f"the volume {subject.image.shape} is too small to hold a part of it out")
    stop = Stop()
    with stop.listen():
        entries = learn(args, subject, stop)
    print(report.table(subject, entries))
    for path in report.outputs(args.out, args.upsampling):
        print(f"wrote {path}")
    return 130 if stop.requested else 0


def learn(args: argparse.Namespace, subject: Subject, stop: Stop) -> list[report.Entry]:
    """Trains and evaluates each network; the results of one are on disk before the next one starts."""
    entries: list[report.Entry] = []
    for upsampling in dict.fromkeys(args.upsampling):
        if stop.requested:
            break
        folder = args.out / upsampling
        trained = train(subject, settings_of(args, subject.fingerprint, upsampling), folder, stop, args.resume)
        if trained.steps == 0:  # stopped before it began: older results are better than none
            break
        prediction = segment(trained.model, trained.params, subject.image)
        entries.append(report.Entry(upsampling, score(subject, prediction).held_out, trained))
        if len(entries) == 1:
            shown = prediction
            report.save_parameters(args.out, trained.params)
            report.save_segmentation(args.out, subject, shown)
        report.save_table(args.out, subject, entries)
        report.save_figure(args.out, subject, shown, [args.out / entry.upsampling for entry in entries])
    return entries
