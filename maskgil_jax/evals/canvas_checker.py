"""Whether canvases show what their prompts ask for, scored as GenEval scores photographs.

Digits are found by their ink, told apart by colour and by gaps, and read by an SVM; then GenEval's
rules are applied to them. Arrays and plain values in, numbers and reasons out.

Reference: Ghosh et al., GenEval (2023); `evaluate` and `relative_position` of
`evaluation/evaluate_images.py` in github.com/djghosh13/geneval.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, UInt8
from scipy import ndimage
from sklearn.svm import SVC

from maskgil_jax.evals.canvases import SIDE, cut_digit

# The columns of a report and its order; GenEval's own tags of the second and the last are
# two_object and color_attr.
KINDS = (
    "single_object",
    "two_objects",
    "counting",
    "colors",
    "position",
    "attribute_binding",
)

Box = tuple[int, int, int, int]

# Brightest channel of a pixel, 0..255. From the first on it is ink; a digit's soft edge, one pixel
# beside ink, may be as dark as the second.
_INK, _EDGE = 64, 16
_MAX_SIDE = 36  # of a digit; those drawn have 28 pixels, some models make them a little larger
_MIN_SIDE = 15  # of a digit; fragments mostly have less
_SPECK = 6  # pixels that are not even a fragment
_JOIN_PX = 6  # how far off a fragment may be from the digit of its colour that it belongs to
_WIDE = 1.05  # width to height beyond which it must be two digits; those drawn have up to 0.93
_MIN_HEIGHT = 20  # of a piece that is not as wide and may be a digit of its own
# Least share of the ink for a second colour to be that of another digit that touches.
_COLOUR_SHARE = 0.25
_OVERLAP = 0.5  # share of the smaller box beyond which two colours are not two digits
_SPLIT_LEVELS = (96, 128, 160, 192, 224)
_POSITION_MARGIN = 0.1  # GenEval's position_threshold

_EIGHT = np.ones((3, 3), bool)


@runtime_checkable
class Expectation(Protocol):
    """What a picture has to show.

    Attributes:
      kind: one of `KINDS`.
      groups: number, digit 0..9, and a colour's name or None if any will do; every digit once.
      relation: "left of" or "above", of the digits of the first group seen from those of the
        others; None for none.
    """

    @property
    def kind(self) -> str:
        """Give the column."""
        ...

    @property
    def groups(self) -> Sequence[tuple[int, int, str | None]]:
        """Give number, digit and colour."""
        ...

    @property
    def relation(self) -> str | None:
        """Give the relation."""
        ...


class FoundDigit(NamedTuple):
    """A digit found on a canvas.

    Attributes:
      digit: 0..9.
      colour: name of the nearest colour.
      box: top, left, bottom, right of its ink in pixels, half-open.
      confidence: margin of the reader; of two sevens, the one with more is the seven looked at.
    """

    digit: int
    colour: str
    box: Box
    confidence: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of one picture.

    Attributes:
      kind: column of the expectation.
      correct: whether the picture shows what is expected, by GenEval's rules.
      reason: why not, with all that was found; empty if correct.
      found: the digits on the picture, the surest first.
    """

    kind: str
    correct: bool
    reason: str
    found: tuple[FoundDigit, ...]


class CanvasChecker:
    """Find digits on canvases and hold them against what was asked for.

    Args:
      palette: RGB 0..255 of each colour's full ink, by name.
      train: crops [n 16 16 3] of `cut_digit` from canvases that are not judged, and their digits
        int [n], to fit the reader on. To judge what a tokenizer decoded, give such crops of rebuilt
        canvases too: its blurs are then read better.

    Raises:
      ValueError: the palette has no colours or not RGB, or crops and digits do not fit.
    """

    def __init__(
        self,
        *,
        palette: Mapping[str, Sequence[int]],
        train: tuple[np.ndarray | Array, np.ndarray | Array],
    ):
        self._names = tuple(palette)
        colours = np.array([tuple(colour) for colour in palette.values()], np.float64)
        if colours.ndim != 2 or colours.shape[1] != 3 or not (colours.max(1) > 0).all():
            raise ValueError(f"palette {dict(palette)}; expected names with RGB, none of it black")
        self._directions = colours / np.linalg.norm(colours, axis=-1, keepdims=True)
        crops, digits = np.asarray(train[0], np.float32), np.asarray(train[1])
        if crops.ndim != 4 or crops.shape[1:] != (SIDE, SIDE, 3) or digits.shape != crops.shape[:1]:
            raise ValueError(
                f"train: crops {crops.shape} and digits {digits.shape}; expected "
                f"[n {SIDE} {SIDE} 3], as cut_digit gives them, and [n]"
            )
        if set(np.unique(digits)) != set(range(10)):
            raise ValueError(
                f"train: digits are {np.unique(digits)}; expected each of 0..9, or the reader "
                "cannot know them"
            )
        self._reader = SVC(C=10, gamma=0.04).fit(_read_ink(crops), digits)

    def find(self, images: Iterable[np.ndarray]) -> list[tuple[FoundDigit, ...]]:
        """Find the digits of each image, uint8 [H W 3] of any size, the surest first.

        Raises:
          ValueError: an image is not uint8 [H W 3].
        """
        boxes: list[list[tuple[Box, int]]] = []
        crops = []
        for image in images:
            parts = self._segment(_check_image(image))
            boxes.append([])
            for mask, colour in parts:
                box, crop = _cut(image, mask, [other for other, _ in parts if other is not mask])
                boxes[-1].append((box, colour))
                crops.append(crop)
        if not crops:
            return [() for _ in boxes]
        margins = self._reader.decision_function(_read_ink(np.stack(crops)))
        digits, confidences = iter(margins.argmax(-1)), iter(margins.max(-1))
        found = [
            [
                FoundDigit(int(next(digits)), self._names[colour], box, float(next(confidences)))
                for box, colour in of_image
            ]
            for of_image in boxes
        ]
        return [tuple(sorted(of_image, key=lambda digit: -digit.confidence)) for of_image in found]

    def check(
        self, images: Iterable[np.ndarray], expectations: Sequence[Expectation]
    ) -> list[Verdict]:
        """Judge each image by its expectation.

        Raises:
          ValueError: not as many images as expectations, or one of either is not as it has to be.
        """
        for expectation in expectations:
            _check_expectation(expectation, self._names)
        found = self.find(images)
        if len(found) != len(expectations):
            raise ValueError(f"{len(found)} images for {len(expectations)} expectations")
        return [
            judge(digits, expectation)
            for digits, expectation in zip(found, expectations, strict=True)
        ]

    def _segment(
        self, image: UInt8[np.ndarray, "H W 3"]
    ) -> list[tuple[Bool[np.ndarray, "H W"], int]]:
        """Return the ink of each digit and the row of its colour."""
        ink = image.max(-1)
        there = ink > _INK
        # Fragments up to two pixels apart are one; two digits are drawn further apart.
        labels, count = ndimage.label(ndimage.binary_dilation(there, _EIGHT), _EIGHT)
        labels = labels * there
        nearest = self._nearest_colours(image)
        parts: list[tuple[np.ndarray, int]] = []
        for number in range(1, count + 1):
            mask = labels == number
            for one, colour in self._split_colours(mask, ink, nearest):
                parts += [(piece, colour) for piece in _split_touching(one, ink)]
        return _join_fragments(parts)

    def _nearest_colours(self, image: UInt8[np.ndarray, "H W 3"]) -> Int[np.ndarray, "H W"]:
        """Return the row of the colour nearest in direction, of every pixel's neighbourhood."""
        # Weighed by the ink: thin edges, where the least error turns the hue, count less.
        weighed = image * image.max(-1, keepdims=True).astype(np.float64)
        around = ndimage.uniform_filter(weighed, (3, 3, 0))
        return (around @ self._directions.T).argmax(-1)

    def _split_colours(
        self,
        mask: Bool[np.ndarray, "H W"],
        ink: UInt8[np.ndarray, "H W"],
        nearest: Int[np.ndarray, "H W"],
    ) -> list[tuple[np.ndarray, int]]:
        """Part digits of different colours that touch; give each part its colour."""
        colours, weights = nearest[mask], ink[mask].astype(np.float64) ** 2
        shares = np.bincount(colours, weights, minlength=len(self._names)) / weights.sum()
        several = np.flatnonzero(shares >= _COLOUR_SHARE)
        pieces = [mask & (nearest == colour) for colour in several]
        boxes = [_box(piece) for piece in pieces]
        # Two colours all over the same place are one digit, of an uncertain colour.
        if (
            len(pieces) < 2
            or min(_side(box) for box in boxes) < _MIN_SIDE
            or any(_overlap(a, b) > _OVERLAP for a, b in itertools.combinations(boxes, 2))
        ):
            return [(mask, int(shares.argmax()))]
        # What has a third colour goes to the nearest of the pieces.
        return list(zip(_share_out(mask, pieces), several.tolist(), strict=True))


def canvas_geneval_report(
    images: Iterable[np.ndarray],
    expectations: Sequence[Expectation],
    *,
    palette: Mapping[str, Sequence[int]],
    train: tuple[np.ndarray | Array, np.ndarray | Array],
) -> dict[str, float]:
    """Score canvases in the six columns of GenEval.

    Args:
      images: uint8 [H W 3] each, of any sizes.
      expectations: what each has to show; all six kinds among them.
      palette, train: see `CanvasChecker`.

    Returns:
      The share of correct images in each of `KINDS`, and `overall`, the mean of the six.

    Raises:
      ValueError: a kind is missing, or as `CanvasChecker` says.
    """
    return score(CanvasChecker(palette=palette, train=train).check(images, expectations))


def score(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Return the share of correct images of each kind, and `overall`, the mean of the six.

    Raises:
      ValueError: there is no verdict of some kind.
    """
    by_kind: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    for verdict in verdicts:
        by_kind[verdict.kind].append(verdict.correct)
    missing = [kind for kind, correct in by_kind.items() if not correct]
    if missing:
        raise ValueError(f"no images of {', '.join(missing)}; the overall score is a mean of all")
    shares = {kind: float(np.mean(correct)) for kind, correct in by_kind.items()}
    return shares | {"overall": float(np.mean(list(shares.values())))}


def judge(found: Sequence[FoundDigit], expectation: Expectation) -> Verdict:
    """Apply GenEval's rules to the digits found, the surest first.

    Of each group, at least its number of that digit must be there; colours and relation are those
    of the surest of them. Counting allows no more of that digit either. Whatever else is on the
    picture does not matter.
    """
    reasons = []
    members: list[list[FoundDigit]] = []
    for number, digit, colour in expectation.groups:
        alike = [one for one in found if one.digit == digit]
        first = alike[:number]
        complete = len(first) == number
        if not complete:
            reasons.append(f"expected {digit} >= {number} times, found {len(alike)}")
        elif expectation.kind == "counting" and len(alike) > number:
            reasons.append(f"expected {digit} < {number + 1} times, found {len(alike)}")
        if complete and colour is not None and any(one.colour != colour for one in first):
            colours = ", ".join(one.colour for one in first)
            reasons.append(f"expected {digit} in {colour}, found {colours}")
            complete = False
        members.append(first if complete else [])
    if expectation.relation is not None:
        for group, others in zip(expectation.groups[1:], members[1:], strict=True):
            if not members[0] or not others:
                reasons.append(f"no pair of which one could be {expectation.relation} the other")
                break
            relations = [find_relations(a.box, b.box) for a in members[0] for b in others]
            if any(expectation.relation not in each for each in relations):
                seen = " or ".join(
                    " and ".join(sorted(each)) or "in no relation to" for each in relations
                )
                reasons.append(
                    f"expected {expectation.groups[0][1]} {expectation.relation} {group[1]}, "
                    f"found {seen}"
                )
    if reasons:
        things = [
            f"{one.colour} {one.digit} at {one.box[0]},{one.box[1]}..{one.box[2]},{one.box[3]}"
            for one in found
        ]
        reasons.append(f"on the picture: {', '.join(things) or 'nothing'}")
    return Verdict(
        kind=expectation.kind,
        correct=not reasons,
        reason="; ".join(reasons),
        found=tuple(found),
    )


def find_relations(box: Box, other: Box) -> set[str]:
    """Return where a box is, seen from the other: "left of", "right of", "above", "below".

    As GenEval: by the way from centre to centre, less a tenth of both extents; none, one, or two
    on a diagonal.
    """
    boxes = np.array([box, other], np.float64).reshape(2, 2, 2)
    offset = np.subtract(*boxes.mean(1))
    extents = np.diff(boxes, axis=1).sum((0, 1))
    clear = np.maximum(np.abs(offset) - _POSITION_MARGIN * extents, 0) * np.sign(offset)
    if not np.any(np.abs(clear) >= 1e-3):
        return set()
    down, across = clear / np.linalg.norm(offset)
    truths = {
        "left of": across < -0.5,
        "right of": across > 0.5,
        "above": down < -0.5,
        "below": down > 0.5,
    }
    return {name for name, true in truths.items() if true}


def _split_touching(
    mask: Bool[np.ndarray, "H W"], ink: UInt8[np.ndarray, "H W"]
) -> list[Bool[np.ndarray, "H W"]]:
    """Part digits of one colour that touch, or nearly so.

    What hangs together in several pieces of a digit's height and shape is as many digits. What is
    too large or too wide for one is parted where its ink is thinnest; it stays whole if darker ink,
    or less of it, leaves no two parts as large as a digit.
    """
    pieces = _pieces(mask)
    whole = [piece for piece in pieces if _is_upright(_box(piece))]
    if len(whole) > 1:
        return [piece for part in _share_out(mask, whole) for piece in _split_touching(part, ink)]
    top, left, bottom, right = _box(mask)
    if max(bottom - top, right - left) <= _MAX_SIDE and right - left <= _WIDE * (bottom - top):
        return [mask]
    cores = [mask & (ink > level) for level in _SPLIT_LEVELS]
    cores += [ndimage.binary_erosion(mask, iterations=n) for n in (1, 2, 3)]
    for core in cores:
        large = [piece for piece in _pieces(core) if _side(_box(piece)) >= _MIN_SIDE]
        if len(large) > 1:
            return [
                piece for part in _share_out(mask, large) for piece in _split_touching(part, ink)
            ]
    return [mask]


def _pieces(mask: Bool[np.ndarray, "H W"]) -> list[Bool[np.ndarray, "H W"]]:
    labels, count = ndimage.label(mask, _EIGHT)
    return [labels == number for number in range(1, count + 1)]


def _is_upright(box: Box) -> bool:
    top, left, bottom, right = box
    return bottom - top >= _MIN_HEIGHT and right - left <= _WIDE * (bottom - top)


def _share_out(
    mask: Bool[np.ndarray, "H W"], seeds: Sequence[Bool[np.ndarray, "H W"]]
) -> list[Bool[np.ndarray, "H W"]]:
    """Give every pixel of the mask to the seed that is nearest."""
    numbers = np.zeros(mask.shape, int)
    for number, seed in enumerate(seeds, 1):
        numbers[seed] = number
    rows, columns = ndimage.distance_transform_edt(
        numbers == 0, return_distances=False, return_indices=True
    )
    nearest = numbers[rows, columns]
    return [mask & (nearest == number) for number in range(1, len(seeds) + 1)]


def _join_fragments(parts: list[tuple[np.ndarray, int]]) -> list[tuple[np.ndarray, int]]:
    """Put small pieces to the digit of their colour beside them, and leave out all others."""
    digits = [part for part in parts if _side(_box(part[0])) >= _MIN_SIDE]
    joined = [mask.copy() for mask, _ in digits]
    for fragment, colour in parts:
        if _side(_box(fragment)) >= _MIN_SIDE or fragment.sum() < _SPECK or not digits:
            continue
        away = ndimage.distance_transform_edt(~fragment)
        gaps = [away[m].min() if c == colour else np.inf for m, c in digits]
        if min(gaps) <= _JOIN_PX:
            joined[int(np.argmin(gaps))] |= fragment
    return [(mask, colour) for mask, (_, colour) in zip(joined, digits, strict=True)]


def _cut(
    image: UInt8[np.ndarray, "H W 3"],
    mask: Bool[np.ndarray, "H W"],
    others: Sequence[Bool[np.ndarray, "H W"]],
) -> tuple[Box, Float[np.ndarray, "16 16 3"]]:
    """Cut a digit out with its soft edge, and without the ink of others in its box."""
    whole = ndimage.binary_dilation(mask, _EIGHT) & (image.max(-1) > _EDGE)
    for other in others:
        whole &= ~other
    box = _box(whole)
    return box, cut_digit(image * whole[..., None], box)


def _box(mask: Bool[np.ndarray, "H W"]) -> Box:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


def _side(box: Box) -> int:
    return max(box[2] - box[0], box[3] - box[1])


def _overlap(a: Box, b: Box) -> float:
    """Return what share of the smaller box both have in common."""
    height, width = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return max(height, 0) * max(width, 0) / min(areas)


def _read_ink(crops: np.ndarray) -> Float[np.ndarray, "n 256"]:
    return crops.max(-1).reshape(len(crops), -1) / 255


def _check_image(image: np.ndarray) -> UInt8[np.ndarray, "H W 3"]:
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or not image.size:
        raise ValueError(
            f"image of {image.dtype} {list(image.shape)}; expected uint8 [H W 3], 0..255"
        )
    return image


def _check_expectation(expectation: Expectation, names: Sequence[str]) -> None:
    if expectation.kind not in KINDS:
        raise ValueError(f"kind {expectation.kind!r} of expectation; allowed: {', '.join(KINDS)}")
    groups = expectation.groups
    if not groups:
        raise ValueError(f"{expectation} expects nothing; give at least one group")
    for number, digit, colour in groups:
        if number < 1 or digit not in range(10) or colour not in (None, *names):
            raise ValueError(
                f"group {(number, digit, colour)}; allowed: 1 or more of a digit 0..9, and None or "
                f"a colour of the palette: {', '.join(names)}"
            )
    if len({digit for _, digit, _ in groups}) != len(groups):
        raise ValueError(
            f"groups {tuple(groups)} name a digit twice; GenEval cannot tell them apart"
        )
    if expectation.relation not in (None, "left of", "above") or (
        expectation.relation is not None and len(groups) < 2
    ):
        raise ValueError(
            f"relation {expectation.relation!r} of {len(groups)} groups; allowed: None, or 'left "
            "of' or 'above' between two or more"
        )
