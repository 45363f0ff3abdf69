"""Sets of images of one size, by number: generated, in an `.npz`, in a folder, of a data set.

Pixels are uint8 and stay as they are: nothing is ever stretched to an image's own range. Classes
are known or not.
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
import pathlib
import re
import weakref
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from maskgil_jax.checkpoints import file_sha256
from maskgil_jax.data.digits import digits_arrays
from maskgil_jax.data.errors import ImageReadError
from maskgil_jax.data.folder import EXTENSIONS
from maskgil_jax.data.images import decode_rgb, read_size
from maskgil_jax.data.transforms import center_crop
from maskgil_jax.evals.archives import name_damage
from maskgil_jax.generation import padded_size
from maskgil_jax.generator import ImageGenerator
from maskgil_jax.sharding import batch_shards

_THREADS = min(8, os.cpu_count() or 1)
_NAMED = 5  # pictures of many that are wrong
_LABEL = re.compile(r"_label(\d+)\.[A-Za-z]+$")


@runtime_checkable
class ImageSet(Protocol):
    """Images 0…n-1."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, c) of all of them."""
        ...

    @property
    def labels(self) -> np.ndarray | None:
        """Classes, int [n], or `None` where they are not known."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """All that the pixels depend on, for JSON."""
        ...

    def __len__(self) -> int:
        """Return n."""
        ...

    def read(self, first: int, stop: int) -> UInt8[np.ndarray, "b H W c"]:
        """Return images `first` to `stop - 1`."""
        ...


def draw_labels(how: str, count: int, num_classes: int, seed: int) -> Int[np.ndarray, " b"]:
    """Return the classes of samples: `balanced`, image i of class i mod C, or `random`.

    Balanced ones alternate, since an inception score is taken of runs of images: of images sorted
    by class it would be far too low.

    Raises:
        ValueError: if as many images of each class are asked for and the count does not divide.
    """
    if how == "random":
        rng = np.random.default_rng(seed)
        return rng.integers(num_classes, size=count, dtype=np.int32)
    if count % num_classes:
        raise ValueError(
            f"--num_images {count} is no multiple of the model's {num_classes} classes, so they "
            f"cannot be balanced; give {max(1, round(count / num_classes)) * num_classes}, or "
            "--labels random"
        )
    return (np.arange(count) % num_classes).astype(np.int32)


def describe_labels(labels: Int[np.ndarray, " b"] | None) -> str:
    """Return in words how many of each class there are, of classes that occur."""
    if labels is None:
        return "unknown"
    counts = np.unique(labels, return_counts=True)[1]
    least, most = counts.min(), counts.max()
    if least == most:
        return f"balanced ({least} of each of {len(counts)} classes)"
    return f"uneven ({least} to {most} of each of {len(counts)} classes)"


class GeneratedImages:
    """Samples of a model, made when they are read; image i depends on the seed and on i.

    Args:
        generator: of the images.
        labels: class of each.
        seed: of all.
        size: (H, W) in pixels.
        sampler: settings that differ from the run's.
    """

    def __init__(
        self,
        generator: ImageGenerator,
        labels: Int[np.ndarray, " b"],
        *,
        seed: int,
        size: tuple[int, int],
        sampler: Mapping[str, Any],
    ):
        self._generator, self._seed, self._size = generator, seed, size
        self._sampler = dict(sampler)
        vq = generator.tokenizer
        # Refuses what cannot be, before anything is made.
        share, settings = self._sampler.get("ar_share"), dict(sampler)
        settings.pop("ar_share", None)
        own, drafted = generator.split_settings(settings, share)
        self.sampler = dataclasses.asdict(generator.sampler(vq.spec.grid_size(*size), **own))
        if generator.drafter is not None:
            self.sampler |= generator.drafter.describe(drafted, share).settings
        self.labels: np.ndarray = labels
        self.image_shape = (*size, vq.spec.image_channels)
        # Batches of one size, the last filled up: the same sums whatever part is made.
        self.chunk_size = padded_size(
            min(generator.batch_size, len(labels)), batch_shards(generator.mesh)
        )

    @functools.cached_property
    def settings(self) -> Mapping[str, Any]:
        """All that the pixels depend on; for which every parameter is read."""
        vq = self._generator.tokenizer
        return {
            "kind": "generated",
            "model": self._generator.model.fingerprint,
            "tokenizer": vq.fingerprint,
            "tokenizer_dtype": vq.config.to_dict()["dtype"],
            "size": list(self._size),
            "seed": self._seed,
            "sampler": self.sampler,
            "batch_size": self.chunk_size,
        }

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, first: int, stop: int) -> UInt8[np.ndarray, "b H W c"]:
        """Generate images."""
        labels = np.pad(
            self.labels[first:stop], (0, max(0, self.chunk_size - stop + first)), "edge"
        )
        images = self._generator(
            labels, seed=self._seed, size=self._size, first_index=first, **self._sampler
        )
        return images[: stop - first]


class DigitImages:
    """One half of the embedded digits."""

    def __init__(self, split: str):
        self._images, self.labels = digits_arrays(split)
        self.image_shape = self._images.shape[1:]
        self.settings = {"kind": "digits", "split": split}

    def __len__(self) -> int:
        return len(self._images)

    def read(self, first: int, stop: int) -> UInt8[np.ndarray, "b H W c"]:
        """Return images."""
        return self._images[first:stop]


class ArrayImages:
    """`arr_0` of an `.npz`, uint8 NHWC, read piece by piece.

    Args:
        path: the file.
        labelled: whether classes are read: `labels`, as `sample.py` writes them, or else `arr_1`,
            as ADM's sampler does, or none.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no `.npz` with RGB pixels in `arr_0`, damaged, or has other classes
            than one integer for each image.
    """

    def __init__(self, path: str | os.PathLike[str], *, labelled: bool = False):
        self._path, self._next = pathlib.Path(path), 0
        self._files = contextlib.ExitStack()
        weakref.finalize(self, self._files.close)
        names = list_arrays(path)
        if "arr_0" not in names:
            raise ValueError(
                f"{path} holds {', '.join(names) or 'nothing'} and no arr_0; write the images as "
                "np.savez(FILE, images), uint8 [n H W 3]"
            )
        shape, fortran, dtype = self._open()
        _check_pixels(f"arr_0 of {path}", shape, dtype)
        if fortran:
            raise ValueError(f"arr_0 of {path} is stored column by column; save it in C order")
        self._count, height, width, channels = shape
        self.image_shape = (height, width, channels)
        self.labels: np.ndarray | None = None
        if labelled and (stored := [name for name in ("labels", "arr_1") if name in names]):
            self.labels = _read_labels(self._path, stored[0], self._count)
        self.settings = {"kind": "npz", "sha256": file_sha256(path)}

    def __len__(self) -> int:
        return self._count

    def read(self, first: int, stop: int) -> UInt8[np.ndarray, "b H W c"]:
        """Read images; backwards, the file is opened anew."""
        size = int(np.prod(self.image_shape))
        if first < self._next:
            self._open()
        with name_damage(f"{self._path} is damaged", ImageReadError):
            while self._next < first:
                self._skip(min(first - self._next, 256), size)
            data = self._member.read((stop - first) * size)
        if len(data) != (stop - first) * size:
            raise ImageReadError(
                f"{self._path} is cut short at image {first}; copy or make it anew"
            )
        self._next = stop
        return np.frombuffer(data, np.uint8).reshape(stop - first, *self.image_shape)

    def _skip(self, count: int, size: int) -> None:
        if len(self._member.read(count * size)) != count * size:
            raise EOFError("arr_0 is cut short")
        self._next += count

    def _open(self) -> tuple[tuple[int, ...], bool, np.dtype]:
        self._files.close()
        with name_damage(f"arr_0 of {self._path} cannot be read"):
            # Stays open: a member can only be read from its beginning.
            archive = self._files.enter_context(zipfile.ZipFile(self._path))
            self._member: Any = self._files.enter_context(archive.open("arr_0.npy"))
            version = np.lib.format.read_magic(self._member)
            read = {(1, 0): np.lib.format.read_array_header_1_0}.get(
                version, np.lib.format.read_array_header_2_0
            )
            header = read(self._member)
        self._next = 0
        return header


class FolderImages:
    """Image files of a folder and those below it, sorted by path.

    Classes are known where every name ends as `sample.py` writes it: `000000_label3.png`.

    Args:
        path: the folder.
        image_size: side to which images are cropped, as those of the ImageNet reference; `None`
            leaves them as they are, and they must be of one size.
        convert: whether greyscale, CMYK and transparent files become RGB, see `decode_rgb`; else
            they are refused.

    Raises:
        ValueError: if there are no images, or some are of another size or colour mode, which is
            looked up in the headers of all; from reading, an image that is damaged.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        image_size: int | None = None,
        convert: bool = False,
    ):
        self._root, self._image_size, self._convert = pathlib.Path(path), image_size, convert
        self._files = _list_images(self._root)
        found = [_LABEL.search(file) for file in self._files]
        labels = [int(match[1]) for match in found if match]
        self.labels = np.array(labels, np.int64) if len(labels) == len(found) else None
        self._check_headers()
        self.image_shape: tuple[int, int, int] = self._decode(0).shape

    @functools.cached_property
    def settings(self) -> Mapping[str, Any]:
        """All that the pixels depend on; for which every file is read."""
        return {
            "kind": "folder",
            "sha256": _hash_files(self._root, self._files),
            "crop": describe_crop(self._image_size),
            "convert_to_rgb": self._convert,
        }

    def __len__(self) -> int:
        return len(self._files)

    def read(self, first: int, stop: int) -> UInt8[np.ndarray, "b H W c"]:
        """Decode images."""
        with ThreadPoolExecutor(_THREADS) as pool:
            images = list(pool.map(self._decode, range(first, stop)))
        for index, image in enumerate(images, first):
            check_same_size(self._files[index], image, self.image_shape)
        return np.stack(images)

    def _check_headers(self) -> None:
        """Refuse, all at once, pictures of which the header tells that they are not of the set."""
        with ThreadPoolExecutor(_THREADS) as pool:
            found = list(pool.map(_read_header, (self._root / file for file in self._files)))
        first = next((header.size for header in found if header.size is not None), None)
        wrong: list[str] = []
        remedies: set[str] = set()
        for file, header in zip(self._files, found, strict=True):
            if header.size is None:
                wrong.append(f"{file} cannot be read: {header.problem}")
                remedies.add("repair or remove what cannot be read")
            elif header.problem and not self._convert:
                wrong.append(f"{file} is {header.problem}, not RGB")
                remedies.add(
                    "--convert_to_rgb repeats greyscale, converts CMYK, and lays transparency over "
                    "white"
                )
            elif header.size != first and self._image_size is None:
                assert first is not None
                wrong.append(
                    f"{file} has {header.size[0]}×{header.size[1]} pixels, the first image "
                    f"{first[0]}×{first[1]}"
                )
                remedies.add("a set is of one size: crop all of a folder with --image_size N")
        if wrong:
            lines = wrong[:_NAMED]
            if len(wrong) > _NAMED:
                lines.append(f"and {len(wrong) - _NAMED:,} more")
            raise ImageReadError(
                f"{len(wrong):,} of the {len(found):,} images in {self._root} cannot be taken:\n  "
                + "\n  ".join(lines)
                + f"\n{'; '.join(sorted(remedies))}"
            )

    def _decode(self, index: int) -> UInt8[np.ndarray, "H W 3"]:
        path = self._root / self._files[index]
        try:
            image = decode_rgb(path)
        except (ImageReadError, OSError, Image.DecompressionBombError) as error:
            raise ImageReadError(f"cannot read image {path}: {error}") from error
        return image if self._image_size is None else center_crop(image, self._image_size)


class SourceImages:
    """Images of a data set's split, cropped.

    Args:
        source: of the data room, such as `TFDSSource`; greyscale and so on have become RGB there.
        image_size: side of the crops; `None` leaves images as they are.
    """

    def __init__(self, source: Any, *, image_size: int | None = None):
        self._source, self._image_size = source, image_size
        self.labels = None
        self.image_shape: tuple[int, int, int] = self._image(0).shape

    @functools.cached_property
    def settings(self) -> Mapping[str, Any]:
        """All that the pixels depend on; for which every file of the split is read."""
        root = self._source.files[0].parent
        return {
            "kind": "source",
            "name": self._source.name,
            "images": len(self._source),
            "sha256": _hash_files(root, [file.name for file in self._source.files]),
            "crop": describe_crop(self._image_size),
            "convert_to_rgb": True,
        }

    def __len__(self) -> int:
        return len(self._source)

    def read(self, first: int, stop: int) -> UInt8[np.ndarray, "b H W c"]:
        """Read images."""
        images = [self._image(index) for index in range(first, stop)]
        for index, image in enumerate(images, first):
            check_same_size(f"image {index} of {self._source.name}", image, self.image_shape)
        return np.stack(images)

    def _image(self, index: int) -> UInt8[np.ndarray, "H W 3"]:
        image = self._source[index]["image"]
        return image if self._image_size is None else center_crop(image, self._image_size)


def open_images(
    path: str | os.PathLike[str],
    *,
    image_size: int | None = None,
    convert: bool = False,
    labelled: bool = False,
) -> ImageSet:
    """Open an `.npz` or a folder of images.

    Args:
        path: of either.
        image_size: side to which images of a folder are cropped.
        convert: whether greyscale, CMYK and transparent files of a folder become RGB.
        labelled: whether classes in an `.npz` are read, which those of a reference need not be.

    Raises:
        FileNotFoundError: if there is neither.
        ValueError: if it holds no images, or an option is given that an `.npz` has no use for.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        return FolderImages(path, image_size=image_size, convert=convert)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is neither a file nor a folder")
    if path.suffix.lower() != ".npz":
        raise ValueError(f"{path} is no FILE.npz; allowed: an .npz of images, or a folder of them")
    if image_size is not None or convert:
        raise ValueError(
            f"{path} holds pixels, which are measured as they are; --image_size and "
            "--convert_to_rgb are for folders"
        )
    return ArrayImages(path, labelled=labelled)


def list_arrays(path: str | os.PathLike[str]) -> list[str]:
    """Return the names of the arrays in an `.npz`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no `.npz`.
    """
    what = f"{path} cannot be read as an .npz of arrays; it is incomplete, or something else"
    with name_damage(what), zipfile.ZipFile(path) as archive:
        return sorted(n.removesuffix(".npy") for n in archive.namelist() if n.endswith(".npy"))


def describe_crop(image_size: int | None) -> str:
    """Return in words what happens to images before the net sees them."""
    if image_size is None:
        return "none"
    return f"shorter side to {image_size} (2×2 boxes, then bicubic), central square"


def check_same_size(name: str, image: np.ndarray, shape: tuple[int, ...]) -> None:
    """Raise a `ValueError` unless an image has the size of the first one."""
    if image.shape != shape:
        raise ValueError(
            f"{name} has {image.shape[0]}×{image.shape[1]} pixels, the first image "
            f"{shape[0]}×{shape[1]}; a set is of one size: crop all of a folder with --image_size N"
        )


def _check_pixels(name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    if dtype != np.uint8:
        hint = ""
        if dtype.kind == "f":
            hint = "; of images in [-1, 1] these are round(clip(127.5·x + 127.5, 0, 255))"
        raise ValueError(f"{name} is {dtype}; expected uint8 pixels, 0 to 255{hint}")
    if len(shape) == 4 and 0 not in shape and shape[-1] == 3:
        return
    hint = "[n H W 3]"
    if len(shape) == 4 and shape[1] == 3:
        hint += "; the channels come first: transpose(0, 2, 3, 1)"
    elif (len(shape) == 4 and shape[-1] == 1) or (len(shape) == 3 and shape[-1] != 3):
        hint += "; greyscale is not converted here: repeat the channel three times"
    elif len(shape) == 4 and shape[-1] == 4:
        hint += "; four channels are not converted here: lay alpha over white, or turn CMYK to RGB"
    raise ValueError(f"{name} has shape {shape}; expected {hint}")


def _read_labels(path: pathlib.Path, name: str, count: int) -> np.ndarray:
    what = f"{name} of {path} cannot be read"
    with name_damage(what), open(path, "rb") as file, np.load(file) as stored:
        labels = stored[name]
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{name} of {path}, the classes, has shape {labels.shape} and type {labels.dtype}; "
            f"expected one integer for each of its {count} images; save it so, or leave it out"
        )
    return labels


def _hash_files(root: pathlib.Path, files: Sequence[str]) -> str:
    """Return the SHA-256 of names and contents: sizes and times would let other pixels pass."""
    digest = hashlib.sha256()
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda file: file_sha256(root / file), files)
        for file, content in zip(files, found, strict=True):
            digest.update(os.fsencode(f"{file}\0{content}\0"))
    return digest.hexdigest()


def _list_images(root: pathlib.Path) -> list[str]:
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = pathlib.Path(folder).relative_to(root)
        found += [
            (inside / name).as_posix()
            for name in files
            if not name.startswith(".") and name.lower().endswith(EXTENSIONS)
        ]
    if not found:
        raise ValueError(f"{root} holds no images ({', '.join(EXTENSIONS)})")
    return sorted(found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Header:
    """What the beginning of a picture file says: (H, W), and why it is no plain RGB, if so."""

    size: tuple[int, int] | None
    problem: str = ""


def _read_header(path: pathlib.Path) -> _Header:
    """Read the beginning of a picture; without a size if there is none."""
    try:
        size = read_size(path)
        with Image.open(path) as image:
            transparent, mode = image.has_transparency_data, image.mode
    except (ImageReadError, OSError) as error:
        return _Header(size=None, problem=str(error))
    names = {"L": "greyscale", "1": "greyscale", "LA": "transparent"}
    if transparent:
        return _Header(size=size, problem="transparent")
    return _Header(size=size, problem="" if mode in ("RGB", "P") else names.get(mode, mode))
