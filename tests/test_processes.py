"""Several real processes, one device each: they compute together, and do not wait for ever for one that died."""

import os
import pathlib
import socket
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def start(count, *arguments):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    command = [sys.executable, "-m", "tests.one_process", str(port), str(count)]
    return [
        subprocess.Popen(
            [*command, str(rank), *arguments],
            cwd=ROOT,
            env=environment | {"JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]


def ended(processes, timeout):
    """The exit status and the words of each; whoever is left is killed."""
    end = time.monotonic() + timeout
    try:
        return [(p.communicate(timeout=max(end - time.monotonic(), 1))[0], p.returncode) for p in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_compute_what_one_alone_does(count) -> None:
    for rank, (words, status) in enumerate(ended(start(count), timeout=200)):
        assert status == 0, words[-4000:]
        assert f"process {rank} of {count}: done" in words


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_where_one_dies_the_others_end_with_an_error(count) -> None:
    *others, (_, dead) = ended(start(count, "dies"), timeout=120)
    assert dead == 0
    for words, status in others:
        assert status != 0, words[-4000:]
        assert "done" not in words
