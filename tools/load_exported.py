"""Generate images from a file that `tools/export_model.py` wrote.

    python load_exported.py digits.mgx --labels 3,1,4 --seed 0 --out images.npy

This module stands alone, to be copied: it needs JAX, NumPy and flatbuffers, which `jax.export`
reads with, and nothing of maskgil_jax. From Python:

    generator = ExportedGenerator("digits.mgx")
    images = generator([3, 1, 4], seed=0)  # uint8 [b H W c]

The file is a ZIP archive without compression: `header.json`, the program (StableHLO) and every
array of the weights as an `.npy` file. All are checked against the SHA-256 sums in the header.
"""

import argparse
import hashlib
import io
import json
import operator
import os
import pathlib
import sys
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import export

FORMAT = "maskgil_jax.exported"
VERSION = 1
HEADER = "header.json"
PROGRAM = "program.stablehlo"
WEIGHTS, NPY = "weights/", ".npy"
# What this loader reads of a header; the rest of it is for people.
FIELDS = {
    "jax": str,
    "platforms": list,
    "image_size": list,
    "image_channels": int,
    "num_classes": int,
    "batch_size": int,
    "sha256": dict,
}


class ExportedGenerator:
    """A model, its sampler and its tokenizer, as one program with its weights.

    Attributes:
        header: what the file says of itself: sizes, classes, sampler settings, platforms, versions.
        image_size: (H, W) in pixels.
        num_classes: C; labels are 0…C-1, and C for "no condition".
        batch_size: images at a time, rounded up to a power of two.
    """

    def __init__(self, path: os.PathLike | str):
        """Load a file and put its weights on the default device.

        Raises:
            FileNotFoundError: if there is no such file.
            ImportError: if flatbuffers is missing.
            ValueError: if the file is damaged, of another format or version, not for this platform,
                or of a JAX that this one cannot read.
        """
        self.header, program, weights = read_file(path)
        self.image_size: tuple[int, int] = tuple(self.header["image_size"])
        self.num_classes: int = self.header["num_classes"]
        self.batch_size: int = self.header["batch_size"]
        platform = export.default_export_platform()
        if platform not in self.header["platforms"]:
            raise ValueError(
                f"{path} was exported for {', '.join(self.header['platforms'])}, but JAX runs on "
                f"{platform}; export it with --platforms {platform}, or choose another with the "
                "environment variable JAX_PLATFORMS"
            )
        try:
            exported = export.deserialize(bytearray(program))
        except ImportError as error:
            raise ImportError(f"to read {path}: pip install flatbuffers") from error
        except Exception as error:
            # The bytes are those that were written, so it is the reader that does not know them.
            raise ValueError(
                f"{path} was exported with JAX {self.header['jax']}, and JAX {jax.__version__} "
                f"cannot read it ({error}); use that version, or export it again with this one"
            ) from error
        self._run = jax.jit(exported.call)
        self._weights = jax.device_put(weights)

    def __call__(
        self, labels: Sequence[int] | np.ndarray, *, seed: int = 0, batch_size: int | None = None
    ) -> np.ndarray:
        """Generate one image per label.

        The random numbers of image i depend on the seed and on i alone. Another batch size rounds
        differently, which now and then decides between two nearly equal codes. Every size of batch
        is compiled when it first occurs; batches are padded to powers of two, so that few sizes do.

        Args:
            labels: classes 0…C-1; C means "no condition".
            seed: seed of all images, 0…2³²-1.
            batch_size: images at a time, rounded up to a power of two; that of the file if `None`.

        Returns:
            uint8 images [b H W c].

        Raises:
            ValueError: if a label, the seed or the batch size is not allowed, or pixels are not
                finite.
        """
        labels = self._check_labels(labels)
        if not 0 <= operator.index(seed) < 2**32:
            raise ValueError(f"seed {seed} is out of range; allowed: 0 to {2**32 - 1}")
        batch_size = self.batch_size if batch_size is None else operator.index(batch_size)
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size} must be at least 1")
        size = 1 << (max(1, min(batch_size, len(labels))) - 1).bit_length()
        parts = [np.zeros((0, *self.image_size, self.header["image_channels"]), np.uint8)]
        for first in range(0, len(labels), size):
            part = labels[first : first + size]
            images, finite = self._run(
                self._weights,
                np.pad(part, (0, size - len(part)), "edge"),
                np.uint32(seed),
                np.arange(first, first + size, dtype=np.uint32),
            )
            if not np.all(finite[: len(part)]):
                index = first + int(np.argmin(finite[: len(part)]))
                raise ValueError(f"image {index} has pixel values that are NaN or infinite")
            parts.append(np.asarray(images)[: len(part)])
        return np.concatenate(parts)

    def _check_labels(self, labels: Sequence[int] | np.ndarray) -> np.ndarray:
        labels = np.asarray(labels)
        if labels.ndim != 1:
            raise ValueError(f"labels have shape {labels.shape}; give one class per image, [b]")
        if labels.size:
            if not np.issubdtype(labels.dtype, np.integer):
                raise ValueError(
                    f"labels have type {labels.dtype}; give integers 0 to {self.num_classes}"
                )
            wrong = labels[(labels < 0) | (labels > self.num_classes)]
            if wrong.size:
                raise ValueError(
                    f"label {wrong[0]} is out of range; allowed: 0 to {self.num_classes - 1}, and "
                    f"{self.num_classes} for none"
                )
        return labels.astype(np.int32)


def read_file(path: os.PathLike | str) -> tuple[dict[str, Any], bytes, dict[str, np.ndarray]]:
    """Return the header, the serialised program and the weights by name, all of them verified.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, or of another format or version.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            header = _read_header(path, archive)
            sums = header["sha256"]
            if PROGRAM not in sums or sorted(archive.namelist()) != sorted([HEADER, *sums]):
                raise ValueError(f"{path} is damaged: its parts are not those its header lists")
            parts = {name: _read_part(path, archive, name, sums[name]) for name in sums}
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        # What `zipfile` raises where bytes are missing, or say something that cannot be.
        raise ValueError(
            f"{path} is damaged, or no exported model: {error}; copy or export it again"
        ) from error
    program = parts.pop(PROGRAM)
    weights = {
        name.removeprefix(WEIGHTS).removesuffix(NPY): np.load(io.BytesIO(part), allow_pickle=False)
        for name, part in parts.items()
    }
    return header, program, weights


def _read_header(path: os.PathLike | str, archive: zipfile.ZipFile) -> dict[str, Any]:
    try:
        header = json.loads(archive.read(HEADER))
        known = header["format"] == FORMAT
    except (KeyError, TypeError, ValueError):
        known = False
    if not known:
        raise ValueError(f"{path} is no exported model: write one with tools/export_model.py")
    if header.get("version") != VERSION:
        raise ValueError(
            f"{path} has version {header.get('version')!r} of the format; this loader reads "
            f"{VERSION}: take the loader of the program that exported it, or export it again"
        )
    if lacking := [name for name, kind in FIELDS.items() if not isinstance(header.get(name), kind)]:
        raise ValueError(
            f"{path} is damaged: its header lacks {', '.join(lacking)}; copy or export it again"
        )
    return header


def _read_part(path: os.PathLike | str, archive: zipfile.ZipFile, name: str, sha256: str) -> bytes:
    part = archive.read(name)
    if hashlib.sha256(part).hexdigest() != sha256:
        raise ValueError(
            f"{path} is damaged: {name} does not match its SHA-256; copy or export it again"
        )
    return part


def write_array(path: pathlib.Path, array: np.ndarray) -> None:
    """Write an `.npy` file; it appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            np.save(file, array)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def parse_labels(text: str) -> list[int]:
    """Read classes separated by commas.

    Raises:
        ValueError: if one of them is not a whole number.
    """
    items = [item.strip() for item in text.split(",")]
    for item in items:
        if not item.isdecimal():
            raise ValueError(f"--labels {text!r}: {item!r} is no class; write numbers: 3,1,4")
    return [int(item) for item in items]


def main(arguments: list[str] | None = None) -> int:
    """Generate; return the exit status, 1 after a refusal with its reason on stderr."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", help="file that tools/export_model.py wrote")
    parser.add_argument("--labels", required=True, help="classes, such as 3,1,4")
    parser.add_argument("--seed", type=int, default=0, help="of all images, 0 to 2^32-1")
    parser.add_argument("--batch_size", type=int, help="images at a time (default: the file's)")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="FILE.npy to write")
    args = parser.parse_args(arguments)
    try:
        if args.out.suffix != NPY:
            raise ValueError(f"--out {args.out} does not end in {NPY}")
        labels = parse_labels(args.labels)
        generator = ExportedGenerator(args.path)
        images = generator(labels, seed=args.seed, batch_size=args.batch_size)
        write_array(args.out, images)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: uint8 {list(images.shape)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
