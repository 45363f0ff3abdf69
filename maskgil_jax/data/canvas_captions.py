"""Captioned canvases: what is on the pictures of `canvases`, said in varied English.

A caption says nothing that is false of its canvas and leaves no digit on it out. What it says is a
`Statement`, from which the wording follows; some statements are never made in training, so that
prompts of these (`heldout_prompts`) ask for combinations that were never told.
"""

import collections
import dataclasses
import functools
import hashlib
import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
from jaxtyping import UInt8

from maskgil_jax.data.canvases import (
    CELL_PX,
    COLOURS,
    MAX_DIGITS,
    NUM_CANVASES,
    SIZES,
    CanvasSource,
    Scene,
    SceneObject,
    Size,
    draw_digits,
)
from maskgil_jax.data.digits import SPLITS

MAX_BYTES = 64

# The columns of GenEval. Its own names for the second and the last are two_object and color_attr.
KINDS = (
    "single_object",
    "two_objects",
    "counting",
    "colors",
    "position",
    "attribute_binding",
)

LEFT, ABOVE = "left of", "above"
RELATIONS = (LEFT, ABOVE)

_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_COUNTS = {1: "one", 2: "two", 3: "three"}
_PREFIXES = ("a picture of ", "an image of ", "a photo of ", "a drawing of ")
_SUFFIXES = (" on black", ", on black", " on a black canvas")
_SAYINGS = {
    LEFT: ("left of", "to the left of", "on the left of"),
    ABOVE: ("above", "over"),
}
_CONVERSE_SAYINGS = {
    LEFT: ("right of", "to the right of", "on the right of"),
    ABOVE: ("below", "under"),
}

# How many digits a canvas has, and how often several are all the same digit, then how often those
# are all of one colour: drawn freely, "three blue twos" would be on no canvas in thousands.
_COUNT_SHARES = (0.3, 0.5, 0.2)
_SAME_DIGIT_SHARES = {2: 0.25, 3: 0.6}
_SAME_COLOUR_SHARE = 0.5
_COLOURS_SHARE = 0.6  # of captions that name the colours
# Of captions of several digits that say where they are, if one can; and how often they are put
# somewhere else until one can.
_RELATION_SHARE, _PLACINGS = 0.8, 8
# Of what is said of two groups in training. Were both ways as frequent, neither the order in which
# digits are named nor the words between them would tell anything by itself, to be learnt first.
_FORWARD_SHARE = 0.8
_PREFIX_SHARE, _SUFFIX_SHARE, _ONE_SHARE, _IN_COLOUR_SHARE, _WITH_SHARE = 0.3, 0.15, 0.1, 0.1, 0.2

# How much further apart, centre to centre, two digits are along the axis of a relation that is told
# than across it.
_DOMINANCE = 1.25

# Combinations of just two attributes are few, 135 in all; a tenth would leave too few to ask for.
_SMALL_SHARE, _SHARE = 0.2, 0.1
# Under this salt all digits are among the held-out pairs, all digits and colours among the coloured
# ones, and two digits each are never told to be two, or to be three.
_SALT = "canvas captions 1004"


class Group(NamedTuple):
    """Digits that are alike: how many, which, in which colour (None if that is not told)."""

    number: int
    digit: int
    colour: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statement:
    """What a caption says: all that is on the canvas.

    Attributes:
      groups: one to three digits, put together where they are alike. Either all colours are told
        or none. With a relation the first is the one that it is said of; else they are named in
        this order.
      relation: "left of" or "above": where every digit of the first group is, seen from every one
        of the others; None if nothing is said of it.
    """

    groups: tuple[Group, ...]
    relation: str | None = None

    def __post_init__(self) -> None:
        count = sum(group.number for group in self.groups)
        if not 1 <= count <= MAX_DIGITS or any(group.number < 1 for group in self.groups):
            raise ValueError(f"{self.groups} are {count} digits; allowed: 1 to {MAX_DIGITS}")
        for group in self.groups:
            if group.digit not in range(10) or group.colour not in (None, *COLOURS):
                raise ValueError(
                    f"{group}; allowed: digits 0..9, and no colour (None) or one of "
                    f"{', '.join(COLOURS)}"
                )
        if len({group.colour is None for group in self.groups}) != 1:
            raise ValueError(f"{self.groups} tell some colours; allowed: all of them or none")
        if len({group[1:] for group in self.groups}) != len(self.groups):
            raise ValueError(f"{self.groups} has digits apart that are alike; put them together")
        if self.relation is not None and (self.relation not in RELATIONS or len(self.groups) == 1):
            raise ValueError(
                f"relation {self.relation!r} of {len(self.groups)} groups; allowed: None, or one "
                f"of {RELATIONS} between two or more"
            )

    @property
    def combination(self) -> str:
        """Name what is said, the same whatever the order and the wording."""
        names = [f"{g.number} {g.colour or 'any'} {g.digit}" for g in self.groups]
        if self.relation is None:
            return ", ".join(sorted(names))
        return f"{names[0]} {self.relation} {', '.join(sorted(names[1:]))}"

    @property
    def is_held_out(self) -> bool:
        """Tell whether this, or something that follows from it, is never said in training."""
        return any(_is_chosen(each.combination, each._attributes) for each in self._implied())

    @property
    def _attributes(self) -> int:
        """Count digits (a number of the same is two), colours and the relation."""
        alike = sum(1 + (g.number > 1) + (g.colour is not None) for g in self.groups)
        return alike + (self.relation is not None)

    def _implied(self) -> Iterator["Statement"]:
        """Give what is left when colours or the relation are not told, and itself."""
        yield self
        if self.relation is not None:
            yield from dataclasses.replace(self, relation=None)._implied()
        if self.groups[0].colour is not None:
            plain = _put_together((g.digit, None) for g in self.groups for _ in range(g.number))
            if len(plain) == len(self.groups):  # else nobody could say what is left of what
                plain = tuple(g._replace(colour=None) for g in self.groups)
                yield Statement(groups=plain, relation=self.relation)
            else:
                yield Statement(groups=plain)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expectation:
    """What a picture made from a prompt has to show, as the checker of canvases takes it.

    Attributes:
      kind: one of `KINDS`, which says what is looked at.
      groups: number, digit, and colour or None if any will do.
      relation: "left of" or "above" (the first group is so, seen from the second), or None.
    """

    kind: str
    groups: tuple[Group, ...]
    relation: str | None


class CaptionedCanvasSource:
    """Give canvases as `{"image": uint8 [H W 3], "caption": str}`.

    Captions are ASCII in lower case, at most 64 bytes. They name digits in the order of reading,
    line by line, unless they say where one is, seen from the others: of two, the left or the upper
    one is named first in five of six captions.
    Record i is a function of (seed, split, i, size) alone; the digits are those of the split.
    Pictures look as those of `CanvasSource`, but other things are on them: single digits, digits
    that are alike, and alike in colour, are more frequent.

    What is said in one split is not said in the other. A combination is what a caption says beside
    its wording: digits, how many of each, their colours and their relation, as far as told. A fixed
    part of them is held out: a fifth of those of two attributes ("a seven and a three", "two
    sevens", "a red seven") and a tenth of the richer ones. A caption is held out with them if what
    it says is among these, or is so without its colours, its relation or both: where "a seven and
    a three" is held out, "a red seven left of a blue three" is too. No training caption is held
    out, and all test captions are, but for those of a single digit without a colour: there are ten
    of these, and both splits have them (of different scans). Only what is *said* is disjoint: a
    training canvas can show what its caption does not tell, such as a colour.

    Args:
      split: "train" or "test".
      size: height and width of all canvases; None draws one of `SIZES` for each.
      seed: 0 or more; another one gives other canvases.

    Raises:
      ValueError: unknown split, a size that is not allowed, or a negative seed.
    """

    def __init__(self, split: str = "train", size: Size | None = None, *, seed: int = 0):
        plain = CanvasSource(split, size, seed=seed)  # which checks them
        self.split, self.size, self.seed = split, size, seed
        self.name = f"captioned {plain.name}"

    def __len__(self) -> int:
        return NUM_CANVASES[self.split]

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        image, _, caption = self.draw(index)
        return {"image": image, "caption": caption}

    def draw(self, index: SupportsIndex) -> tuple[UInt8[np.ndarray, "H W 3"], Scene, str]:
        """Return the picture of record `index`, what is on it, and the caption.

        Raises:
          IndexError: there is no such record.
        """
        image, scene, statement, rng = self._draw(index)
        caption = word_statement(rng, statement, forward_share=_FORWARD_SHARE)
        return image, scene, caption

    def _draw(
        self, index: SupportsIndex
    ) -> tuple[UInt8[np.ndarray, "H W 3"], Scene, Statement, np.random.Generator]:
        row = operator.index(index)
        if not 0 <= row < len(self):
            raise IndexError(f"canvas {row} of {self.name}; allowed 0..{len(self) - 1}")
        # A fourth number, so that these are not the canvases of `CanvasSource`.
        rng = np.random.default_rng((self.seed, SPLITS.index(self.split), row, 1))
        size = SIZES[rng.integers(len(SIZES))] if self.size is None else self.size
        return *_draw_told(rng, self.split, size), rng

    def __repr__(self) -> str:
        return f"CaptionedCanvasSource(split={self.split!r}, size={self.size}, seed={self.seed})"


def _draw_told(
    rng: np.random.Generator, split: str, size: Size
) -> tuple[UInt8[np.ndarray, "H W 3"], Scene, Statement]:
    """Draw what is to be said, and a canvas of which it is true."""
    while True:
        digits, colours = _draw_content(rng)
        told = colours if rng.random() < _COLOURS_SHARE else [None] * len(colours)
        groups = _put_together(zip(digits, told, strict=True))
        relate = len(groups) > 1 and rng.random() < _RELATION_SHARE
        statement = Statement(groups=groups)
        # What needs no look at the picture is settled before it is drawn.
        if not relate and not _belongs(statement, split):
            continue
        if relate and split == "train" and statement.is_held_out:
            continue
        for _ in range(_PLACINGS if relate else 1):
            image, scene = draw_digits(rng, split, size, digits, colours)
            groups = _in_reading_order(scene, groups)
            related = [s for s in _relate(scene, groups) if _belongs(s, split)] if relate else []
            if related:
                return image, scene, related[rng.integers(len(related))]
        if _belongs(statement, split):
            return image, scene, Statement(groups=groups)


def _draw_content(rng: np.random.Generator) -> tuple[list[int], list[str]]:
    """Draw one to three digits and their colours."""
    count = 1 + int(np.searchsorted(np.cumsum(_COUNT_SHARES), rng.random()))
    count = min(count, len(_COUNT_SHARES))
    digits = rng.integers(10, size=count)
    colours = rng.integers(len(COLOURS), size=count)
    if count > 1 and rng.random() < _SAME_DIGIT_SHARES[count]:
        digits[:] = digits[0]
        if rng.random() < _SAME_COLOUR_SHARE:
            colours[:] = colours[0]
    return digits.tolist(), [tuple(COLOURS)[colour] for colour in colours]


def _put_together(digits: Iterable[tuple[int, str | None]]) -> tuple[Group, ...]:
    counts = collections.Counter(digits)
    return tuple(Group(count, digit, colour) for (digit, colour), count in counts.items())


def _belongs(statement: Statement, split: str) -> bool:
    if split == "train":
        return not statement.is_held_out
    return statement.is_held_out or statement._attributes == 1


def _members(scene: Scene, group: Group) -> list[SceneObject]:
    """Return the digits of a canvas that a group is."""
    return [o for o in scene.objects if o.digit == group.digit and group.colour in (None, o.colour)]


def _in_reading_order(scene: Scene, groups: tuple[Group, ...]) -> tuple[Group, ...]:
    """Sort groups by the first of their cells, line by line."""

    def first_cell(group: Group) -> tuple[int, int]:
        boxes = [o.box for o in _members(scene, group)]
        return min((top // CELL_PX, left // CELL_PX) for top, left, _, _ in boxes)

    return tuple(sorted(groups, key=first_cell))


def _relate(scene: Scene, groups: tuple[Group, ...]) -> list[Statement]:
    """Give what is true of where the groups are: one of them seen from all others.

    With two groups this says the same from either side, so one of both is enough.
    """
    true = []
    for first in groups:
        rest = tuple(group for group in groups if group is not first)
        pairs = list(
            itertools.product(
                _members(scene, first), [o for group in rest for o in _members(scene, group)]
            )
        )
        for relation in RELATIONS:
            if all(holds(relation, a, b) for a, b in pairs):
                true.append(Statement(groups=(first, *rest), relation=relation))
    return true


def holds(relation: str, a: SceneObject, b: SceneObject) -> bool:
    """Tell whether nobody would doubt that a is "left of", or "above", b.

    All of it is, and the centres are further apart that way than the other way.
    """
    down, across = (y - x for x, y in zip(a.position, b.position, strict=True))
    if relation == LEFT:
        return a.is_left_of(b) and across >= _DOMINANCE * abs(down)
    return a.is_above(b) and down >= _DOMINANCE * abs(across)


@functools.lru_cache(maxsize=1 << 16)
def _is_chosen(combination: str, attributes: int) -> bool:
    """Tell whether a combination is among the held-out: a matter of its name alone."""
    if attributes < 2:
        return False
    number = int.from_bytes(hashlib.sha256(f"{_SALT}: {combination}".encode()).digest()[:8], "big")
    return number < (_SMALL_SHARE if attributes == 2 else _SHARE) * 2**64


def word_statement(
    rng: np.random.Generator, statement: Statement, *, forward_share: float = 0.5
) -> str:
    """Say it in one of many ways, in at most 64 bytes of lower-case ASCII.

    Args:
      rng: which of them.
      statement: what to say.
      forward_share: how often a relation of two groups is said of the first, "left of" and "above"
        and their like, and not of the other.
    """
    text = _word(rng, statement, forward_share)
    while len(text) > MAX_BYTES:  # there is a wording of 58 even for the longest
        text = _word(rng, statement, forward_share)
    if rng.random() < _PREFIX_SHARE:
        text = _fitting(_PREFIXES[rng.integers(len(_PREFIXES))] + text, text)
    if rng.random() < _SUFFIX_SHARE:
        text = _fitting(text + _SUFFIXES[rng.integers(len(_SUFFIXES))], text)
    return text


def _fitting(longer: str, text: str) -> str:
    return longer if len(longer) <= MAX_BYTES else text


def _word(rng: np.random.Generator, statement: Statement, forward_share: float) -> str:
    in_colour = rng.random() < _IN_COLOUR_SHARE
    names = [_name_group(rng, group, in_colour) for group in statement.groups]
    if statement.relation is None:
        return _enumerate(names)
    forward = len(names) > 2 or rng.random() < forward_share
    return _word_relation(rng, statement, names, forward)


def _name_group(rng: np.random.Generator, group: Group, in_colour: bool) -> str:
    """Say "a red seven", "two sevens in red" and so on."""
    word = _WORDS[group.digit]
    if group.number > 1:
        word += "es" if word.endswith("x") else "s"
    if group.colour is not None:
        word = f"{word} in {group.colour}" if in_colour else f"{group.colour} {word}"
    if group.number > 1 or rng.random() < _ONE_SHARE:
        return f"{_COUNTS[group.number]} {word}"
    return f"{'an' if word.startswith('eight') else 'a'} {word}"


def _enumerate(names: Sequence[str]) -> str:
    if len(names) < 3:
        return " and ".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _word_relation(
    rng: np.random.Generator, statement: Statement, names: list[str], forward: bool
) -> str:
    """Say where the first is, or where the other is.

    "Left of a seven and a three" is left of both, which is true; turned round, with two others, it
    would be unclear of which it is said.
    """
    relation, first = statement.relation or "", names[0]
    if not forward and rng.random() < _WITH_SHARE:
        one = statement.groups[0].number == 1
        if relation == LEFT:
            return f"{first} with {names[1]} to {'its' if one else 'their'} right"
        return f"{first} with {names[1]} below {'it' if one else 'them'}"
    ways = _SAYINGS[relation] if forward else _CONVERSE_SAYINGS[relation]
    # The plain word at least as often as all others together.
    saying = ways[0] if rng.random() < 0.5 else ways[rng.integers(len(ways))]
    if forward:
        return f"{first} {saying} {_enumerate(names[1:])}"
    return f"{names[1]} {saying} {first}"


def heldout_prompts(kind: str, count: int, seed: int = 0) -> list[tuple[str, Expectation]]:
    """Return prompts for one column of GenEval, with what their pictures have to show.

    All say what is held out from training (see `CaptionedCanvasSource`), but those of a single
    digit without a colour, of which there are ten. Every combination comes once before any comes
    again, in other words; a smaller count gives the beginning of a larger one.

      single_object: "a seven"
      two_objects: "a seven and a three", never the same digit
      counting: "three sevens", or "two"
      colors: "a red seven"
      position: "a seven left of a three"
      attribute_binding: "a red seven and a blue three", digits and colours different

    Raises:
      ValueError: there is no such kind, or count or seed is negative.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r} of prompts; allowed: {', '.join(KINDS)}")
    if count < 0 or seed < 0:
        raise ValueError(f"count = {count}, seed = {seed}; give 0 or more for both")
    statements = _heldout_statements(kind)
    prompts = []
    for index in range(count):
        turn, place = divmod(index, len(statements))
        order = np.random.default_rng((seed, KINDS.index(kind), turn)).permutation(len(statements))
        statement = statements[order[place]]
        rng = np.random.default_rng((seed, KINDS.index(kind), turn, place))
        if statement.relation is None:
            turned = rng.permutation(len(statement.groups))
            statement = Statement(groups=tuple(statement.groups[i] for i in turned))
        expectation = Expectation(kind=kind, groups=statement.groups, relation=statement.relation)
        prompts.append((word_statement(rng, statement), expectation))
    return prompts


@functools.cache
def _heldout_statements(kind: str) -> tuple[Statement, ...]:
    """Return all statements of a kind that are not made in training, each once."""
    digits = range(len(_WORDS))
    groups: list[tuple[Group, ...]]
    relations: tuple[str | None, ...] = (None,)
    if kind == "single_object":
        return tuple(Statement(groups=(Group(1, digit, None),)) for digit in digits)
    if kind == "counting":
        groups = [(Group(n, digit, None),) for n in (2, 3) for digit in digits]
    elif kind == "colors":
        groups = [(Group(1, digit, colour),) for digit in digits for colour in COLOURS]
    elif kind == "attribute_binding":
        groups = [
            (Group(1, a, one), Group(1, b, other))
            for a, b in itertools.combinations(digits, 2)
            for one, other in itertools.permutations(COLOURS, 2)
        ]
    else:
        pairs = itertools.permutations(digits, 2)
        groups = [(Group(1, a, None), Group(1, b, None)) for a, b in pairs]
        if kind == "position":
            relations = RELATIONS
        else:
            groups = [(a, b) for a, b in groups if a.digit < b.digit]
    every = [Statement(groups=g, relation=relation) for g in groups for relation in relations]
    return tuple(statement for statement in every if statement.is_held_out)
