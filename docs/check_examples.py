"""Runs the examples of the pages: ``python docs/check_examples.py [page ...]``; exit status 1 where one fails.

The Python blocks of a page run in order, in one namespace and an empty folder. A block of ``pycon`` is compared with
the results that stand in it. What needs a package that is not installed is left out, by a comment in front of it::

    % needs: torch
"""

from __future__ import annotations

import doctest
import importlib.util
import os
import pathlib
import re
import sys
import tempfile
import time
import traceback

DOCS = pathlib.Path(__file__).parent
BLOCK = re.compile(r"(?:^% needs: (?P<needs>[\w, ]+)\n+)?^```(?P<kind>python|pycon)\n(?P<code>.*?)^```$", re.M | re.S)
OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def missing(needs: str | None) -> list[str]:
    names = [name.strip() for name in (needs or "").split(",") if name.strip()]
    return [name for name in names if importlib.util.find_spec(name) is None]


def check(page: pathlib.Path) -> tuple[int, int, int]:
    """How many blocks of the page ran, failed, and were left out."""
    text = page.read_text(encoding="utf-8")
    space: dict[str, object] = {"__name__": "__page__"}
    counts = [0, 0, 0]
    runner = doctest.DocTestRunner(optionflags=OPTIONS, verbose=False)
    for block in BLOCK.finditer(text):
        if absent := missing(block["needs"]):
            print(f"{page.name}: a block needs {', '.join(absent)}, left out")
            counts[2] += 1
            continue
        counts[0] += 1
        line = text.count("\n", 0, block.start("code"))
        if block["kind"] == "pycon":
            test = doctest.DocTestParser().get_doctest(block["code"], space, page.name, str(page), line)
            counts[1] += runner.run(test, clear_globs=False).failed > 0
            space.update(test.globs)
            continue
        try:
            exec(compile("\n" * line + block["code"], str(page), "exec"), space)
        except Exception:
            traceback.print_exc()
            counts[1] += 1
    return counts[0], counts[1], counts[2]


def main(names: list[str]) -> int:
    everything = [path for path in DOCS.rglob("*.md") if "notebooks" not in path.parts]
    pages = [path.resolve() for path in map(pathlib.Path, names)] or sorted(everything)
    failures = 0
    if len(pages) > 1:  # a process for each page: devices, and what is compiled, are its own
        for page in pages:
            failures += os.spawnv(os.P_WAIT, sys.executable, [sys.executable, __file__, str(page)]) != 0
        return int(failures > 0)
    (page,) = pages
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        here = pathlib.Path.cwd()
        os.chdir(folder)
        try:
            ran, failures, left = check(page)
        finally:
            os.chdir(here)
    if ran or left:
        seconds = time.perf_counter() - began
        print(f"{page.relative_to(DOCS.resolve())}: {ran} ran, {failures} failed, {left} left out, {seconds:.0f} s")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
