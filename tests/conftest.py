"""Settings of the whole suite: Keras on JAX with a home of its own, and JAX at its strictest."""

import os
import tempfile

os.environ["KERAS_BACKEND"] = "jax"
os.environ["KERAS_HOME"] = tempfile.mkdtemp(prefix="keras-home-")
os.environ["MPLBACKEND"] = "Agg"

import shutil
from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def strict_promotion(request: pytest.FixtureRequest) -> Iterator[None]:
    """Implicit promotion of dtypes or ranks is an error; `lenient` is for peers that rely on it."""
    if "lenient" in request.keywords:
        yield
        return
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(os.environ["KERAS_HOME"], ignore_errors=True)
