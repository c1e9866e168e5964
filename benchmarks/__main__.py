"""Times every contestant on every case, each in its own process: `python -m benchmarks --help`."""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Sequence

from benchmarks import report, suites
from benchmarks.cases import CASES, CONVOLUTIONS, GPU_CASES, KINDS
from benchmarks.contestants import NETWORKS, contestants, gpu_contestants
from benchmarks.pool import ALLOCATORS, DEVICES


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--all", action="store_true", help="the cases with either allocator, and all the rest")
    what.add_argument("--network", action="store_true", help="a training step of the demo's U-Net instead of the cases")
    what.add_argument("--convolutions", action="store_true", help="ordinary convolutions instead of transposed ones")
    what.add_argument("--volume", action="store_true", help="time against volume instead of the cases")
    what.add_argument("--report", nargs="+", type=pathlib.Path, metavar="JSON", help="tables and plots of stored runs")
    parser.add_argument(
        "--cases", nargs="+", choices=[case.name for case in (*CASES, *CONVOLUTIONS, *GPU_CASES)], metavar="CASE"
    )
    parser.add_argument(
        "--platform", choices=list(DEVICES), default="cpu", help="gpu: cases that fill one, in under 8 minutes"
    )
    parser.add_argument("--seconds", type=float, help="after which no case is begun; on a GPU 420")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--contestants", nargs="+", metavar="NAME", help="ours is always among them")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--sizes", nargs="+", type=int, metavar="N", help="N^3 outputs of --volume, inputs of --network"
    )
    parser.add_argument("--allocator", choices=list(ALLOCATORS), default="default", help="keep: the heap keeps pages")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/bench"))
    parser.add_argument("--list", action="store_true", help="name cases and contestants, and end")
    args = parser.parse_args(arguments)
    if args.seconds is None:
        args.seconds = 420.0 if args.platform == "gpu" else float("inf")
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    if not args.report:
        known = NETWORKS if args.network else gpu_contestants() if args.platform == "gpu" else contestants()
        unknown = set(args.contestants or ()) - set(known)
        if unknown:
            parser.error(f"unknown --contestants {' '.join(sorted(unknown))}; there are {' '.join(known)}")
    return args


def main() -> None:
    args = parse()
    if args.list:
        print("cases:", *(case.name for case in CASES))
        print("convolutions:", *(case.name for case in CONVOLUTIONS))
        print("cases of a GPU:", *(case.name for case in GPU_CASES))
        print("contestants:", *contestants())
        return
    files = args.report or suites.run(args)
    print(report.write(files, args.out))


if __name__ == "__main__":
    main()
