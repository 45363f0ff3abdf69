"""Views of an image that are encoded in place of random crops, when tokens are stored.

The tokens of a data set are extracted once, so that augmentation has to be chosen beforehand: the
central window of the size asked for, with its mirror image, or ten crops of a slightly larger
central square.

Reference: `autoregressive/train/extract_codes_c2i.py` of FoundationVision/LlamaGen; `TenCrop` of
torchvision, whose places and order the ten crops have.
"""

import dataclasses

import numpy as np
from jaxtyping import UInt8

from maskgil_jax.data.transforms import center_crop

KINDS = ("center", "center_flip", "ten_crop")
SCALES = (1.1, 1.05)
_PLACES = ("top_left", "top_right", "bottom_left", "bottom_right", "center")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Crops:
    """Cut the views of an image that are encoded.

    Attributes:
      kind: `center`; `center_flip`, which adds its mirror image; or `ten_crop`: the four corners
        and the centre of a larger central square, and the same of its mirror image.
      size: side of a square view in pixels; or height and width, but not of `ten_crop`.
      scales: of `ten_crop`: sides of the larger square over `size`, ten views each; rounded down
        to pixels.

    Raises:
      ValueError: an unknown kind, a size below 1, `ten_crop` of another shape than a square, scales
        without it, or a scale that gives no larger square or the same one as another.
    """

    kind: str
    size: int | tuple[int, int]
    scales: tuple[float, ...] = ()

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"crops {self.kind!r} are unknown; allowed: {', '.join(KINDS)}")
        if min(self._shape) < 1:
            raise ValueError(f"size = {self.size}; give at least 1 pixel")
        if self.kind == "ten_crop" and len(set(self._shape)) > 1:
            raise ValueError(f"crops 'ten_crop' are squares, not {self.size}; use 'center'")
        if bool(self.scales) != (self.kind == "ten_crop"):
            raise ValueError(
                f"crop scales {list(self.scales)} with crops {self.kind!r}; ten_crop needs at "
                "least one, such as 1.1, and the others have none"
            )
        if not all(1 < scale <= 16 for scale in self.scales):
            raise ValueError(f"crop scales {list(self.scales)} must be more than 1, at most 16")
        sides = [self._side(scale) for scale in self.scales]
        if self._shape[0] in sides or len(set(sides)) < len(sides):
            raise ValueError(
                f"crop scales {list(self.scales)} of {self.size} pixels give squares of {sides}; "
                f"all must differ and be larger than {self.size}: their crops would be the same"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Return the name of every view, in order; `top_left_flip` is mirrored first."""
        if self.kind != "ten_crop":
            return ("center", "center_flip")[: 1 + (self.kind == "center_flip")]
        return tuple(
            f"{place}{flip}@{scale}"
            for scale in self.scales
            for flip in ("", "_flip")
            for place in _PLACES
        )

    def __call__(self, image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "n h w 3"]:
        """Return the views in the order of `names`."""
        if self.kind == "ten_crop":
            squares = [center_crop(image, self._side(scale)) for scale in self.scales]
            views = [self._five(side) for square in squares for side in (square, square[:, ::-1])]
            return np.stack([view for five in views for view in five])
        view = center_crop(image, self.size)
        return np.stack([view, view[:, ::-1]] if self.kind == "center_flip" else [view])

    @property
    def _shape(self) -> tuple[int, int]:
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    def _side(self, scale: float) -> int:
        return int(self._shape[0] * scale)

    def _five(self, square: UInt8[np.ndarray, "H W 3"]) -> list[np.ndarray]:
        size, _ = self._shape
        far = len(square) - size
        middle = round(far / 2)  # half to even, as torchvision does
        corners = [(0, 0), (0, far), (far, 0), (far, far), (middle, middle)]
        return [square[y : y + size, x : x + size] for y, x in corners]
