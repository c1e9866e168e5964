"""`tiled` from host to host: the same result, from and to whatever takes slices, and never a whole volume in memory."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given

import conv3dt_jax as c3t
from tests import oracle
from tests.test_tiled import SETTINGS, back, close, layout, operands, problems


@SETTINGS
@given(problem=problems())
def test_from_host_to_host_it_is_the_definition_too(problem) -> None:
    spec, (x, w, b), _, (want, *_), slabs = problem
    move = functools.partial(layout, data_format=spec.data_format)
    out = np.full(move(want).shape, np.nan)
    with jax.enable_x64(True):
        found = c3t.tiled(move(x), w, b, spec=spec, slabs=slabs, out=out, progress=False)
    assert found is out
    close(back(out, spec.data_format), want)


@pytest.mark.parametrize("padding", ["valid", "same", 0, ((1, 0), (0, 2), (1, 1)), "circular"], ids=str)
@pytest.mark.parametrize("strides", [1, (1, 2, 1)], ids=str)
def test_ordinary_convolutions_from_host_to_host_have_fewer_outputs_than_inputs(strides, padding, x64) -> None:
    spec = c3t.Conv3DSpec(2, (1, 2, 3), strides, padding)
    rng = np.random.default_rng(0)
    x, w, b = (rng.normal(size=size) for size in ((1, 5, 6, 7, 2), spec.kernel_shape(2), 2))
    want = oracle.conv3d(x, w, b, strides=strides, padding=padding)
    for slabs in ((1, 1, 1), (2, 3, 2)):
        out = np.full(want.shape, np.nan)
        c3t.tiled(x, w, b, spec=spec, slabs=slabs, out=out, progress=False)
        close(out, want)


def test_volumes_from_every_store_to_every_store(tmp_path) -> None:
    h5py, zarr, tensorstore = (pytest.importorskip(name) for name in ("h5py", "zarr", "tensorstore"))
    nibabel = pytest.importorskip("nibabel")
    rng = np.random.default_rng(0)
    volume = rng.normal(size=(9, 8, 7)).astype(np.float32)
    w, b = rng.normal(size=(3, 3, 3, 1, 1)).astype(np.float32), np.ones(1, np.float32)
    want = c3t.conv3d_transpose(volume[None, ..., None], w, b, strides=2, padding="same")[0, ..., 0]
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / "volume.nii.gz")
    memory = np.lib.format.open_memmap(tmp_path / "in.npy", "w+", np.float32, volume.shape)
    memory[:] = volume
    sources = [memory, nibabel.load(tmp_path / "volume.nii.gz").dataobj]
    with h5py.File(tmp_path / "x.h5", "w") as file:
        sources.append(file.create_dataset("volume", data=volume, chunks=(4, 4, 4)))
        targets = [
            np.lib.format.open_memmap(tmp_path / "out.npy", "w+", np.float32, want.shape),
            file.create_dataset("out", want.shape, np.float64, chunks=(8, 8, 8)),
            zarr.create_array(str(tmp_path / "out.zarr"), shape=want.shape, dtype="float32", chunks=(8, 8, 8)),
            tensorstore.open(
                {"driver": "zarr", "kvstore": f"file://{tmp_path}/ts", "create": True},
                dtype=np.float32, shape=list(want.shape),
            ).result(),
        ]  # fmt: skip
        for i, target in enumerate(targets):
            source = sources[i % len(sources)]
            c3t.tiled(
                source, w, b, strides=2, padding="same", slabs=(4, 2, 1), out=target, dtype=np.float32, progress=False
            )  # fmt: skip
            np.testing.assert_allclose(np.asarray(target[...]), want, rtol=1e-5, atol=1e-5)


def test_stored_integers_are_cast_when_asked_and_refused_otherwise() -> None:
    stored = np.arange(5 * 6 * 7, dtype=np.int16).reshape(5, 6, 7)
    w = np.ones((2, 2, 2, 1, 1), np.float32)
    out = np.zeros((10, 12, 14), np.float32)
    with pytest.raises(TypeError, match="`inputs` have dtype int16 and `kernel` has dtype float32"):
        c3t.tiled(stored, w, strides=2, out=out, progress=False)
    c3t.tiled(stored, w, strides=2, out=out, dtype=np.float32, slabs=2, progress=False)
    np.testing.assert_array_equal(out, np.kron(stored, np.ones((2, 2, 2))))


def test_neither_volume_is_ever_read_or_written_as_a_whole() -> None:
    class Watched(np.ndarray):
        most = 0

        def __getitem__(self, key):
            found = super().__getitem__(key)
            Watched.most = max(Watched.most, found.size)
            return found

        def __setitem__(self, key, value):
            Watched.most = max(Watched.most, np.size(value))
            super().__setitem__(key, value)

    x = np.ones((2, 32, 8, 8, 2), np.float32).view(Watched)
    out = np.zeros((2, 64, 16, 16, 2), np.float32).view(Watched)
    c3t.tiled(x, np.ones((3, 3, 3, 2, 2), np.float32), strides=2, padding="same", slabs=16, out=out, progress=False)
    assert 0 < Watched.most <= 4 * 16 * 16 * 2
    np.testing.assert_array_equal(out[:, -1, -1, -1], 2)


def test_progress_goes_to_standard_error_where_it_is_wanted(capfd) -> None:
    x, w, _ = operands()
    out = np.zeros(c3t.output_shape(x.shape, w.shape, strides=2), np.float32)
    c3t.tiled(np.asarray(x), w, strides=2, slabs=3, out=out, progress=False)
    assert capfd.readouterr() == ("", "")
    c3t.tiled(np.asarray(x), w, strides=2, slabs=3, out=out)
    printed, shown = capfd.readouterr()
    assert printed == ""
    assert "3/3" in shown
