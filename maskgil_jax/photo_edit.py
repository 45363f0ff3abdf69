"""Edits of a picture file as the command line asks for them: read, checked, carried out.

Files are read upright (EXIF), greyscale repeated, 16-bit greyscale scaled down, CMYK converted,
transparency laid over white. Of a mask, grey of 128 or more is generated.
"""

import dataclasses
import hashlib
import os
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8

from maskgil_jax.data import images
from maskgil_jax.data.errors import ImageReadError
from maskgil_jax.generator import Generation, ImageGenerator


@dataclasses.dataclass(frozen=True, kw_only=True)
class Edit:
    """What is to be done to a picture: exactly one of `mask`, `outpaint` and `vary` is set.

    Attributes:
        photo: the original.
        mask: true where to generate.
        outpaint: pixels to add at the top, bottom, left and right.
        vary: share of the tokens to keep, in [0, 1).
        grow: cells by which the generated part of the token grid is widened.
        feather: pixels of transition around the mask.
    """

    photo: UInt8[np.ndarray, "H W 3"]
    mask: Bool[np.ndarray, "_ _"] | None = None
    outpaint: tuple[int, int, int, int] | None = None
    vary: float | None = None
    grow: int | None = None
    feather: float | None = None

    def __post_init__(self) -> None:
        tasks = [self.mask is not None, self.outpaint is not None, self.vary is not None]
        if sum(tasks) != 1:
            raise ValueError(
                f"--edit has {sum(tasks) or 'none'} of --mask, --outpaint and --vary; give one"
            )
        if self.mask is not None and self.mask.shape != self.photo.shape[:2]:
            (mask_h, mask_w), (height, width) = self.mask.shape, self.photo.shape[:2]
            raise ValueError(
                f"--mask has {mask_h}×{mask_w} pixels, but --edit {height}×{width}; give a mask of "
                "the picture's size"
            )
        if self.vary is not None and (self.grow is not None or self.feather is not None):
            raise ValueError("--grow and --feather need a mask or --outpaint, not --vary")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the results, in pixels."""
        top, bottom, left, right = self.outpaint or (0, 0, 0, 0)
        height, width = self.photo.shape[:2]
        return height + top + bottom, width + left + right

    @property
    def settings(self) -> dict[str, Any]:
        """All that the results depend on, for JSON; pictures by their SHA-256."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            name: _digest(value) if isinstance(value, np.ndarray) else value
            for name, value in fields.items()
        }

    def apply(self, generator: ImageGenerator, count: int, **options: Any) -> Generation:
        """Make some results.

        Args:
            generator: the model and its tokenizer.
            count: how many.
            **options: labels or prompts, as many; seed, first_index and sampler settings, as
                `ImageGenerator.edit` takes them.

        Raises:
            ValueError: if the picture, the mask or a setting does not fit.
        """
        photos = np.repeat(self.photo[None], count, axis=0)
        if self.vary is not None:
            return generator.vary(photos, keep=self.vary, **options)
        options |= {"grow": self.grow or 0, "feather": self.feather or 0.0}
        if self.outpaint is not None:
            return generator.outpaint(photos, self.outpaint, **options)
        assert self.mask is not None
        masks = np.repeat(self.mask[None], count, axis=0)
        return generator.edit(photos, masks, **options)


def read_edit(
    photo: os.PathLike | str | None, mask: os.PathLike | str | None = None, **fields: Any
) -> Edit | None:
    """Read the pictures of an edit; `None` if there is no photo.

    Args:
        photo: file to edit.
        mask: black and white file of the same size.
        **fields: further fields of `Edit`; `None` means not given.

    Raises:
        ValueError: if a file cannot be read, the mask has another size, or the settings do not go
            together.
    """
    if photo is None:
        for name, value in {"mask": mask, **fields}.items():
            if value is not None:
                raise ValueError(f"--{name} {value} needs a picture; name it with --edit")
        return None
    marked = None if mask is None else _read("--mask", images.decode_mask, mask)
    pixels = _read("--edit", images.decode_rgb, photo, upright=True)
    return Edit(photo=pixels, mask=marked, **fields)


def _read(flag: str, decode: Any, path: os.PathLike | str, **options: Any) -> np.ndarray:
    try:
        return decode(os.fspath(path), **options)
    except ImageReadError as error:
        raise ImageReadError(f"{flag} {path}: {error}") from error


def _digest(pixels: np.ndarray) -> str:
    return hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()
