"""The README's Python blocks run, and what it says of commands is so."""

import pathlib
import re

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.lenient
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.strip().splitlines()[-1][:40])
def test_python_blocks_run(block, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # some write files
    jax.clear_caches()
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_there_are_blocks_for_the_function_and_the_layer() -> None:
    assert sum("conv3d_transpose(" in block for block in BLOCKS) >= 1
    assert sum("Conv3DTranspose(" in block and "optax" in block for block in BLOCKS) >= 1


def test_make_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set()
    for name in ("README.md", "CONTRIBUTING.md"):
        named |= set(re.findall(r"`make ([a-z-]+)`", (ROOT / name).read_text()))
        named |= {
            word
            for line in re.findall(r"^make ([a-z -]+)", (ROOT / name).read_text(), re.MULTILINE)
            for word in line.split()
        }
    assert named
    assert named <= targets
