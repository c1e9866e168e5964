"""Runs the notebooks from top to bottom, each in a kernel of its own.

`python -m notebooks.run` stores them executed, with their pictures; `--check` leaves the stored ones as they are.
Either fails where a cell raises or hangs, and where anything is written to the standard error. What took too long is
not stored; `--check` only says so, since that may be the machine.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
import time

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError

FOLDER = pathlib.Path(__file__).parent
LIMIT, HANGS = 90.0, 600
"""Seconds for a notebook on two cores, and those after which a cell hangs."""


def run(path: pathlib.Path) -> tuple[nbformat.NotebookNode, float]:
    """The notebook with new outputs, and the seconds that it took; its working directory is its folder."""
    notebook = nbformat.read(path, as_version=4)
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # XLA writes to the standard error where it compiles slowly
    started = time.perf_counter()
    client = NotebookClient(
        notebook, timeout=HANGS, kernel_name="python3", record_timing=False,
        resources={"metadata": {"path": str(path.parent)}}, extra_arguments=["--IPKernelApp.log_level=ERROR"],
    )  # fmt: skip
    client.execute()
    notebook.metadata.pop("language_info", None)  # of the interpreter that ran it
    return notebook, time.perf_counter() - started


def complaints(notebook: nbformat.NotebookNode) -> list[str]:
    """What is wrong with a notebook that ran, but for its time."""
    found = []
    for number, cell in enumerate(notebook.cells, start=1):
        for output in cell.get("outputs", ()):
            if output.output_type == "stream" and output.name == "stderr":
                found.append(f"cell {number} wrote to the standard error: {output.text.strip()[:300]}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m notebooks.run", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="the beginnings of their names; all, where none is given")
    parser.add_argument("--check", action="store_true", help="store nothing")
    args = parser.parse_args()
    paths = [path for path in sorted(FOLDER.glob("*.ipynb")) if path.name.startswith(tuple(args.names) or "")]
    failed = not paths
    for path in paths:
        print(f"{path.name:40s}", end=" ", flush=True)
        try:
            notebook, seconds = run(path)
        except (CellExecutionError, CellTimeoutError) as error:
            failed = True
            print(f"failed\n{error}")
            continue
        wrong = complaints(notebook)
        late = [f"took {seconds:.0f} s, of {LIMIT:.0f}"] if seconds > LIMIT else []
        print(f"{seconds:5.1f} s", *late, *wrong, sep="\n  ")
        if not args.check:
            wrong += late
        failed |= bool(wrong)
        if not wrong and not args.check:
            nbformat.write(notebook, path)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
