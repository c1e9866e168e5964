"""The volume to learn from: the MNI152 brain, or a user's own NIfTI files; and its split."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes

MAX_CLASSES = 64


class DataError(Exception):
    """Something is wrong with the user's files or sizes; the message is one line."""


@dataclasses.dataclass(frozen=True)
class Split:
    """Slices along the anterior-posterior axis: ``[0, train)`` to learn from, ``[test, length)`` held out.

    The brain is cut into a back and a front. The slices between them are never trained on: they keep the two apart, and
    choose among checkpoints, so that the held-out part has no say in anything. Left against right would leak: the
    MNI152 template is symmetric by construction, each half the mirror image of the other.
    """

    train: int
    test: int


@dataclasses.dataclass(frozen=True)
class Subject:
    """One image with labels, in the orientation right-anterior-superior.

    Attributes:
      image: ``(D, H, W)`` float32, zero mean and unit deviation within the head; the axes are left-right,
        posterior-anterior, inferior-superior.
      labels: ``(D, H, W)`` int32 class indices.
      names: the classes; the first is the background.
      values: the label value of each class in files.
      spacing: voxel size in mm.
      original: the image as it was on disk, for its grid and orientation.
    """

    image: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]
    values: tuple[int, ...]
    spacing: tuple[float, float, float]
    original: nib.Nifti1Image

    @property
    def fingerprint(self) -> str:
        """A hash of image and labels: the identity of the data that a run learns from."""
        what = f"{self.image.shape} {self.values}".encode() + self.image.tobytes() + self.labels.tobytes()
        return hashlib.sha256(what).hexdigest()[:16]

    @property
    def split(self) -> Split:
        """About 60% of the labelled extent to learn from, a gap of a tenth, the front 30% held out."""
        slices = np.flatnonzero((self.labels > 0).any((0, 2)))
        first, extent = int(slices[0]), int(slices[-1]) + 1 - int(slices[0])
        return Split(train=first + round(0.6 * extent), test=first + round(0.7 * extent))

    def to_file_grid(self, labels: np.ndarray) -> nib.Nifti1Image:
        """Class indices as a NIfTI image of label values, on the grid and with the affine of the file."""
        values = np.asarray(self.values, np.int16)[labels]
        to_ras = nib.orientations.io_orientation(self.original.affine)
        back = nib.orientations.ornt_transform(nib.orientations.io_orientation(np.eye(4)), to_ras)
        volume = nib.orientations.apply_orientation(values, back)
        image = nib.Nifti1Image(volume, self.original.affine)
        image.set_data_dtype(np.int16)
        return image


def load_mni152() -> Subject:
    """The MNI152 T1 template at 2 mm from the nilearn wheel, labelled by its tissue probability maps."""
    from nilearn import datasets

    template = datasets.load_mni152_template(resolution=2)
    grey = datasets.load_mni152_gm_template(resolution=2).get_fdata()
    white = datasets.load_mni152_wm_template(resolution=2).get_fdata()
    mask = datasets.load_mni152_brain_mask(resolution=2).get_fdata() > 0.5
    other = np.where(mask, 1 - grey - white, 0)
    background = np.where(mask, 0, 1)
    labels = np.argmax([background, grey * mask, white * mask, other], axis=0)
    names = ("background", "grey matter", "white matter", "other tissue")
    return _subject(template, labels, names, (0, 1, 2, 3))


def load_files(image_path: pathlib.Path, labels_path: pathlib.Path) -> Subject:
    """A user's image and its integer label volume, 0 for the background."""
    image, labels_image = _load(image_path), _load(labels_path)
    if image.shape != labels_image.shape:
        raise DataError(f"{labels_path} has shape {labels_image.shape}, but {image_path} has {image.shape}")
    if not np.allclose(image.affine, labels_image.affine, atol=1e-3):
        raise DataError(f"{labels_path} and {image_path} have different affines: they are not on the same grid")
    labels = np.asarray(labels_image.dataobj)
    if not np.array_equal(labels, np.round(labels)):
        raise DataError(f"{labels_path} holds fractions; labels must be integers, 0 for the background")
    values, indices = np.unique(labels.astype(np.int64), return_inverse=True)
    if not 2 <= len(values) <= MAX_CLASSES:
        raise DataError(f"{labels_path} holds {len(values)} different values; 2 to {MAX_CLASSES} classes can be learnt")
    if values[0] != 0:
        raise DataError(f"{labels_path} holds no 0, or values below it; 0 must be the background")
    names = ("background", *(f"label {value}" for value in values[1:]))
    return _subject(image, indices.reshape(labels.shape), names, tuple(map(int, values)))


def _load(path: pathlib.Path) -> nib.Nifti1Image:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        image = nib.load(path)
        data = np.asarray(image.dataobj)
    except Exception as error:  # nibabel, gzip and numpy each have errors of their own for a damaged file
        raise DataError(f"{path} cannot be read as NIfTI: {str(error).splitlines()[0]}") from error
    if data.ndim != 3 or not np.issubdtype(data.dtype, np.number):
        raise DataError(f"{path} holds a {data.ndim}-D volume of {data.dtype}; a 3-D volume of numbers is needed")
    if not np.isfinite(data).all():
        raise DataError(f"{path} holds NaN or infinite values")
    return image


def _subject(image: nib.Nifti1Image, labels: np.ndarray, names: tuple[str, ...], values: tuple[int, ...]) -> Subject:
    ornt = nib.orientations.io_orientation(image.affine)
    volume = nib.orientations.apply_orientation(np.asarray(image.dataobj, np.float32), ornt)
    head = volume[volume > volume.mean() / 2]
    if head.size < 2 or head.std() == 0:
        raise DataError("the image is constant; there is nothing to learn from")
    spacing = voxel_sizes(image.affine)[np.argsort(ornt[:, 0])]
    return Subject(
        image=(volume - head.mean()) / head.std(),
        labels=nib.orientations.apply_orientation(labels, ornt).astype(np.int32),
        names=names,
        values=values,
        spacing=(float(spacing[0]), float(spacing[1]), float(spacing[2])),
        original=image,
    )
