"""Arguments of the demo, and the run from data to report."""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence

from examples.brain_segmentation import report
from examples.brain_segmentation.data import DataError, PatchSampler, Subject, load_files, load_mni152
from examples.brain_segmentation.evaluate import dice, segment
from examples.brain_segmentation.model import FACTOR, UNet
from examples.brain_segmentation.train import Stop, Trained, train


def positive(text: str) -> int:
    value = int(text) if text.lstrip("+-").isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive integer")
    return value


def seed_value(text: str) -> int:
    if not text.isdigit() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer from 0 to 2**32 - 1")
    return int(text)


def rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 10:
        raise argparse.ArgumentTypeError(f"{text!r} is no learning rate (a number above 0)")
    return value


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> None:  # type: ignore[override]
        self.exit(2, f"error: {message}\n")


def parser() -> argparse.ArgumentParser:
    p = OneLineParser(
        prog="python -m examples.brain_segmentation",
        description="Train a 3-D U-Net whose decoder is Conv3DTranspose to segment a brain, and report what it learnt.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="folder of the results")
    p.add_argument(
        "--data", nargs=2, type=pathlib.Path, metavar=("IMAGE", "LABELS"),
        help="NIfTI files of your own: an image, and integer labels on its grid, 0 for the background "
        "(default: the MNI152 brain of the nilearn package)",
    )  # fmt: skip
    p.add_argument("--steps", type=positive, default=100, help="training steps")
    p.add_argument("--patch", type=positive, default=32, help=f"edge of the cubic patches, a multiple of {FACTOR}")
    p.add_argument("--batch", type=positive, default=4, help="patches per step")
    p.add_argument("--features", type=positive, default=8, help="channels of the finest level")
    p.add_argument("--lr", type=rate, default=6e-3, help="highest learning rate")
    p.add_argument("--seed", type=seed_value, default=0, help="of the parameters and the patches")
    p.add_argument("--no-comparison", action="store_true", help="skip the network with trilinear upsampling")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; the exit status is 0, 2 for bad input, 130 after Ctrl-C."""
    args = parser().parse_args(argv)
    try:
        return run(args)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
    return 2


def run(args: argparse.Namespace) -> int:
    if args.patch % FACTOR:
        raise DataError(f"--patch {args.patch} must be a multiple of {FACTOR}, by which the network divides it")
    args.out.mkdir(parents=True, exist_ok=True)
    subject = load_files(*args.data) if args.data else load_mni152()
    if subject.split.test >= subject.image.shape[1]:
        raise DataError(f"the volume {subject.image.shape} is too small to hold a part of it out")
    sampler = PatchSampler(subject, args.patch, args.batch, args.seed)
    stop = Stop()
    with stop.listen():
        entries = learn(args, subject, sampler, stop)
    print(report.table(subject, entries))
    for path in report.outputs(args.out):
        print(f"wrote {path}")
    return 130 if stop.requested else 0


def learn(args: argparse.Namespace, subject: Subject, sampler: PatchSampler, stop: Stop) -> list[report.Entry]:
    """Trains and evaluates the network, then its rival; the network's results are on disk before the rival starts."""
    entries: list[report.Entry] = []
    for upsampling in ("transposed",) if args.no_comparison else ("transposed", "trilinear"):
        if stop.requested:
            break
        model = UNet(len(subject.names), args.features, upsampling)
        trained = train(model, sampler, args.steps, args.lr, stop, upsampling)
        if upsampling == "transposed":
            report.save_parameters(args.out, trained.params)
        prediction = segment(model, trained.params, subject.image)
        entries.append(_entry(subject, upsampling, trained, prediction))
        if upsampling == "transposed":
            report.save_segmentation(args.out, subject, prediction)
            report.save_figure(args.out, subject, prediction, trained.losses)
        report.save_table(args.out, subject, entries)
    return entries


def _entry(subject: Subject, upsampling: str, trained: Trained, prediction: object) -> report.Entry:
    held_out = (slice(None), slice(subject.split.test, None))
    scores = dice(prediction[held_out], subject.labels[held_out], len(subject.names))  # type: ignore[index]
    return report.Entry(
        upsampling, scores, len(trained.losses), trained.losses[-1] if trained.losses else float("nan"),
        trained.seconds_per_step, trained.compile_seconds,
    )  # fmt: skip
