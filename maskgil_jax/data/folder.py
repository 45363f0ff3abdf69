"""An image folder, `root/split/<class>/<image>`, as a source; ImageNet's layout with its wnids."""

import bisect
import functools
import hashlib
import itertools
import os
import pathlib
from typing import SupportsIndex

import numpy as np

from maskgil_jax.data.errors import DatasetError
from maskgil_jax.data.images import Record, TolerantReader, decode_rgb

EXTENSIONS = (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_LAYOUT = "expected ROOT/SPLIT/CLASS/IMAGE, for example imagenet/train/n01440764/x.JPEG"


class ImageFolderSource:
    """Give the images of a folder as `{"image": uint8 [H W 3], "label": int32 []}`.

    Sub-folders sorted by name are the classes 0, 1, …; inside each, files sorted by name. The
    folder is scanned once. Names that begin with a dot and other kinds of files are passed over.

    Args:
      root: folder that holds the splits.
      split: name of the split's folder, such as "train" or "val".
      max_bad_images: how many unreadable images may be replaced by the next readable one, each
        with a warning; one more is an error.
      class_names: the classes in order, where a split must agree with another (the training
        split's `class_names`); by default the sub-folders themselves.

    Raises:
      DatasetError: the folder is missing, unreadable or without classes, a class is without images,
        or the classes are not `class_names`.
      ImageReadError: from indexing, at one unreadable image more than allowed; names the file.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        split: str,
        *,
        max_bad_images: int = 0,
        class_names: tuple[str, ...] | None = None,
    ):
        self._folder = pathlib.Path(root).expanduser() / split
        self.class_names = _list_classes(self._folder)
        _check_classes(self._folder, self.class_names, class_names)
        files = [_list_images(self._folder / name) for name in self.class_names]
        self._files = list(itertools.chain.from_iterable(files))
        self._class_ends = list(itertools.accumulate(map(len, files)))
        self._reader = TolerantReader(
            self._read, lambda index: str(self.path(index)), len(self._files), max_bad_images
        )
        self.name = f"{self._folder.parent.name}/{split}"

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def bad_images(self) -> tuple[str, ...]:
        """Paths of the unreadable images met so far."""
        return self._reader.bad_images

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the names of classes and files: another where records would be others."""
        digest = hashlib.sha256()
        starts = (0, *self._class_ends)
        for name, start, end in zip(self.class_names, starts, self._class_ends, strict=False):
            # No name has a slash or a zero byte in it.
            digest.update(os.fsencode("\0".join([f"{name}/", *self._files[start:end], ""])))
        return digest.hexdigest()

    def path(self, index: int) -> pathlib.Path:
        """Return the file of record `index`."""
        return self._folder / self.class_names[self._label(index)] / self._files[index]

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: SupportsIndex) -> Record:
        return self._reader[index]

    def __repr__(self) -> str:
        return f"ImageFolderSource({str(self._folder)!r}, {len(self)} images)"

    def _read(self, index: int) -> Record:
        image = decode_rgb(self.path(index))
        return {"image": image, "label": np.asarray(self._label(index), np.int32)}

    def _label(self, index: int) -> int:
        return bisect.bisect_right(self._class_ends, index)


def _scan(folder: pathlib.Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        raise DatasetError(
            f"cannot read the image folder {folder}: {error.strerror}; {_LAYOUT}"
        ) from error


def _list_classes(folder: pathlib.Path) -> tuple[str, ...]:
    classes = tuple(entry.name for entry in _scan(folder) if entry.is_dir())
    if not classes:
        raise DatasetError(f"no class folders in {folder}; {_LAYOUT}")
    return classes


def _list_images(folder: pathlib.Path) -> list[str]:
    names = [entry.name for entry in _scan(folder)]
    names = [name for name in names if name.lower().endswith(EXTENSIONS)]
    if not names:
        raise DatasetError(
            f"no images ({', '.join(EXTENSIONS)}) directly in the class folder {folder}; "
            f"fill or remove it; {_LAYOUT}"
        )
    return names


def _check_classes(
    folder: pathlib.Path, found: tuple[str, ...], expected: tuple[str, ...] | None
) -> None:
    if expected is None or found == tuple(expected):
        return
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    raise DatasetError(
        f"{folder} holds other classes: {len(missing)} missing {missing[:5]}, {len(extra)} extra "
        f"{extra[:5]}; labels would not mean the same (classes are folders sorted by name)"
    )
