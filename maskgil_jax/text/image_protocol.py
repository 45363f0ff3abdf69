"""How Chameleon and Lumina-mGPT spell an image in the ids of their vocabulary.

An image is its start, height and width in units of 32 pixels, its codes row by row, each row closed
by a new line, and its end. Ids are looked up by name in the model's `tokenizer.json`, never known
beforehand. A code's name is `IMGIMG…Z`, its decimal digits written with the letters A to J.

Reference: Lumina-mGPT `data/item_processor.py` and `inference_solver.py`; Chameleon
`chameleon/inference/vocab.py`.
"""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int, Integer

START, END, NEW_LINE = "<racm3:break>", "<eoss>", "<reserved08799>"
BEGIN_TEXT, END_TURN = "<s>", "<reserved08706>"
# Codes per side of a unit of the size: 32 pixels, 16 a code.
UNIT = 2
# Ids before the first code: start, height and width.
HEAD_LENGTH = 3
_SIZE_BASE = 8800
_CODE_PREFIX = "IMGIMG"
_CODE_NAME = re.compile(rf"{_CODE_PREFIX}([A-J]{{1,7}})Z")
_DIGITS = str.maketrans("ABCDEFGHIJ", "0123456789")
_MOST_BYTES = 256 << 20


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ImageProtocol:
    """The ids of a vocabulary that spell images; made by `from_file` or `from_vocabulary`.

    Attributes:
        start: before an image.
        end: behind it.
        new_line: behind every row of codes.
        begin_text: before every prompt.
        end_turn: behind it.
        sizes: id of every number of units, 1, 2, ….
        codes: int32 [k], id of every code.
        vocab_size: number of ids, those of other names included.
    """

    start: int
    end: int
    new_line: int
    begin_text: int
    end_turn: int
    sizes: Sequence[int]
    codes: Int[np.ndarray, " k"]
    vocab_size: int

    @classmethod
    def from_file(cls, path: os.PathLike | str) -> "ImageProtocol":
        """Read a `tokenizer.json` of Hugging Face.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is no such file, or lacks names that spell images; see
                `from_vocabulary`.
        """
        path = pathlib.Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; copy it from the model's repository")
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"{path} is larger than any tokenizer, {_MOST_BYTES >> 20} MiB")
        try:
            parsed = json.loads(path.read_bytes())
            names = {str(name): number for name, number in dict(parsed["model"]["vocab"]).items()}
            added = parsed.get("added_tokens") or ()
            names |= {str(token["content"]): token["id"] for token in added}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{path} is no tokenizer of Hugging Face with a vocabulary "
                f"({type(error).__name__}: {error})"
            ) from error
        try:
            return cls.from_vocabulary(names)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_vocabulary(cls, names: Mapping[str, int]) -> "ImageProtocol":
        """Find the ids by their names.

        Args:
            names: name -> id.

        Raises:
            ValueError: a name is missing, a code is named wrongly, twice or not at all, or two
                names share an id; all of it is listed.
        """
        problems = []
        single = dict(
            start=START, end=END, new_line=NEW_LINE, begin_text=BEGIN_TEXT, end_turn=END_TURN
        )
        if missing := [name for name in single.values() if name not in names]:
            problems.append(f"there is no {', '.join(missing)}")
        codes, wrong = _find_codes(names)
        problems += wrong
        sizes: list[int] = []
        while (name := size_name(len(sizes) + 1)) in names:
            sizes.append(names[name])
        if not sizes:
            problems.append(f"there are no sizes, {size_name(1)} and so on")
        used = [names[name] for name in single.values() if name in names]
        used += [*sizes, *codes.values()]
        if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 2**31 for i in used):
            problems.append("an id is no whole number from 0 to 2147483647")
        elif len(set(used)) < len(used):
            problems.append("two of the names that spell images share an id")
        if problems:
            raise ValueError(
                "the vocabulary does not spell images as Lumina-mGPT's does: "
                + "; ".join(problems)
                + "; give the tokenizer.json of the model's own repository"
            )
        return cls(
            **{field: names[name] for field, name in single.items()},
            sizes=tuple(sizes),
            codes=np.array([codes[code] for code in range(len(codes))], np.int32),
            vocab_size=1 + max(i for i in names.values() if isinstance(i, int)),
        )

    @property
    def codebook_size(self) -> int:
        """Number of codes k."""
        return len(self.codes)

    @property
    def highest_id(self) -> int:
        """The highest id that spells an image or begins or ends a prompt."""
        ends = (self.start, self.end, self.begin_text, self.end_turn)
        return int(max(*ends, *self.sizes, self.stream_ids.max()))

    @property
    def stream_ids(self) -> Int[np.ndarray, " k1"]:
        """Ids of the codes and, behind them, of the new line: of what is drawn or closes a row."""
        return np.append(self.codes, np.int32(self.new_line))

    def begin(self, grid_size: tuple[int, int]) -> Int[np.ndarray, " n"]:
        """Return the ids before the first code of an image: start, height, width.

        Raises:
            ValueError: if the grid is not of whole units, or larger than the vocabulary can say.
        """
        units = []
        for name, side in zip(("rows", "columns"), grid_size, strict=True):
            if side < UNIT or side % UNIT or side // UNIT > len(self.sizes):
                raise ValueError(
                    f"a grid of {side} {name} has no size in this vocabulary; allowed: multiples "
                    f"of {UNIT} from {UNIT} to {UNIT * len(self.sizes)}"
                )
            units.append(self.sizes[side // UNIT - 1])
        return np.array([self.start, *units], np.int32)

    def write(self, codes: Integer[np.ndarray, "gh gw"]) -> Int[np.ndarray, " n"]:
        """Return the ids of an image, from its start to its end.

        Raises:
            ValueError: if a code is out of range, or the grid has no size; see `begin`.
        """
        wrong = codes[(codes < 0) | (codes >= self.codebook_size)]
        if wrong.size:
            raise ValueError(
                f"code {int(wrong.flat[0])} is out of range; allowed: 0 to {self.codebook_size - 1}"
            )
        begin = self.begin(codes.shape)
        rows = np.pad(self.codes[codes], ((0, 0), (0, 1)), constant_values=self.new_line)
        return np.concatenate([begin, rows.reshape(-1), [self.end]]).astype(np.int32)

    def parse(self, ids: Sequence[int] | np.ndarray) -> Int[np.ndarray, "gh gw"]:
        """Return the codes of an image; the inverse of `write`.

        Args:
            ids: of one image, from its start to its end, and nothing else.

        Raises:
            ValueError: if they spell no image; it says which row is malformed, and where.
        """
        found = [int(i) for i in ids]
        if not found or found[0] != self.start:
            raise ValueError(f"an image begins with {START} ({self.start}); {_show(found, 0)}")
        numbers = {size: number for number, size in enumerate(self.sizes, 1)}
        sides = []
        for place, name in ((1, "height"), (2, "width")):
            if place >= len(found) or found[place] not in numbers:
                raise ValueError(
                    f"the {name} of an image is one of {self.sizes[0]} to {self.sizes[-1]}; "
                    f"{_show(found, place)}"
                )
            sides.append(UNIT * numbers[found[place]])
        height, width = sides
        known = {int(i): code for code, i in enumerate(self.codes)}
        codes = np.empty((height, width), np.int32)
        for row in range(height):
            first = HEAD_LENGTH + row * (width + 1)
            for column in range(width):
                place = first + column
                if place >= len(found) or found[place] not in known:
                    raise ValueError(
                        f"row {row} of {height} has {column} codes, not {width}: "
                        f"{_show(found, place)}"
                    )
                codes[row, column] = known[found[place]]
            place = first + width
            if place >= len(found) or found[place] != self.new_line:
                raise ValueError(
                    f"row {row} of {height} does not end behind its {width} codes with {NEW_LINE} "
                    f"({self.new_line}): {_show(found, place)}"
                )
        place = HEAD_LENGTH + height * (width + 1)
        if found[place:] != [self.end]:
            raise ValueError(
                f"behind its {height} rows an image ends with {END} ({self.end}) and nothing else; "
                f"{_show(found, place)}, of {len(found)} ids"
            )
        return codes


def _find_codes(names: Mapping[str, int]) -> tuple[dict[int, int], list[str]]:
    """Return the id of every code, and what is wrong with their names."""
    codes: dict[int, int] = {}
    problems = []
    for name in (name for name in names if name.startswith(_CODE_PREFIX)):
        match = _CODE_NAME.fullmatch(name)
        if not match:
            problems.append(f"{name!r} names no code: {_CODE_PREFIX}, digits A to J, Z")
            continue
        code = int(match[1].translate(_DIGITS))
        if code in codes:
            problems.append(f"{name!r} names code {code} once more")
        codes[code] = names[name]
    if not codes:
        problems.append(f"there are no codes, {_CODE_PREFIX}AZ and so on")
    elif (most := max(codes)) >= len(codes):
        gap = next(code for code in range(most) if code not in codes)
        problems.append(f"code {gap} has no name, though there are codes up to {most}")
    return codes, problems


def _show(ids: Sequence[int], place: int) -> str:
    """Say what stands at a place of the ids."""
    if place >= len(ids):
        return f"there are {len(ids)} ids only"
    return f"id {place} is {ids[place]}"


def size_name(units: int) -> str:
    """Return the name of a number of units of 32 pixels."""
    return f"<reserved{_SIZE_BASE + units:05d}>"
