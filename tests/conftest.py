"""Settings of the whole suite: Keras on JAX with a home of its own, and JAX at its strictest."""

import os
import tempfile

os.environ["KERAS_BACKEND"] = "jax"
os.environ["KERAS_HOME"] = tempfile.mkdtemp(prefix="keras-home-")
os.environ["MPLBACKEND"] = "Agg"

import importlib.util
import shutil
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache


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


@pytest.fixture
def quick_compiles() -> Iterator[None]:
    """The same programs, compiled in half the time: where what is held is not how XLA optimizes them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def compile_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For modules that train the same networks again and again: their programs are kept."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("programs")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Path]]:
    """A trained Keras model, and its files by their kind."""
    from tests import keras_models

    original = keras_models.model()
    original.compile("adam", "mse")
    shape = (2, 16, 16, 16, 3)
    original.train_on_batch(keras_models.X, np.zeros(shape, np.float32))  # the optimizer has slots of the same shapes
    folder = tmp_path_factory.mktemp("keras")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("absl.logging.warning", lambda *args: None)
        return original, {kind: keras_models.save(original, folder, kind) for kind in keras_models.KINDS}


@pytest.fixture(scope="session")
def ball(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The NIfTI files of a small image and its labels."""
    from tests import training_runs

    return training_runs.ball(tmp_path_factory.mktemp("ball"))


@pytest.fixture
def subject(ball: tuple[str, str]) -> Any:
    """What the demo makes of them."""
    from examples.brain_segmentation.data import load_files

    return load_files(*map(Path, ball))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's loop with a network that compiles at once, and evaluations that cost nothing."""
    from tests import training_runs

    training_runs.make_quick(monkeypatch)


# What tests come upon as they run and only the extras install. Modules that need one as a whole say so at their top.
EXTRAS = ("equinox", "flatbuffers", "h5py", "haiku", "keras", "matplotlib", "safetensors", "torch", "zarr")
MISSING = {name for name in EXTRAS if importlib.util.find_spec(name) is None}


def skip_without_extras() -> Generator[None, Any, Any]:
    """A test, or a fixture, that an extra is missing for is skipped; every other failed import fails."""
    try:
        return (yield)
    except ImportError as error:
        cause = error
        while isinstance(cause.__cause__ or cause.__context__, ImportError):
            cause = cause.__cause__ or cause.__context__
        name = (cause.name or "").partition(".")[0]
        if name in MISSING:
            pytest.skip(f"{name} is not installed")
        raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None, Any, Any]:
    return (yield from skip_without_extras())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, Any, Any]:
    return (yield from skip_without_extras())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of many cases of one behaviour, marked `thinned`, half are among the slow tests: the same ones everywhere."""
    for item in items:
        if "thinned" in item.keywords and zlib.crc32(item.name.encode()) % 2:
            item.add_marker(pytest.mark.slow)


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(os.environ["KERAS_HOME"], ignore_errors=True)
