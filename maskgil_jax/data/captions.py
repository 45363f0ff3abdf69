"""Images with texts as a source: files with a text beside each, or a table in JSON lines.

All texts are read and checked when a data set is opened, and stay in memory; images are read when
asked for. Everything that is wrong is told at once. `webdataset` and `tfds` read other formats.
"""

import collections
import functools
import hashlib
import json
import os
import pathlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, SupportsIndex

import numpy as np

from maskgil_jax.data.errors import DatasetError, ImageReadError
from maskgil_jax.data.folder import EXTENSIONS
from maskgil_jax.data.images import Record, TolerantReader, decode_rgb, read_size

METADATA_FILE = "metadata.jsonl"
_FILE_FIELDS = ("file_name", "image")
_TEXT_FIELDS = ("caption", "text")
_SHOWN = 5  # examples of each problem in a message
_HEADER_BYTES = 2**16  # of an image, read to find its size; all of it where that is not enough


class Entry(NamedTuple):
    """One image and its texts.

    Attributes:
      key: name in messages, such as its path in the data set.
      file: that holds the image.
      captions: one text or more, none of them empty.
      span: where in the file the image is, first byte and number of bytes; `None` for all of it.
    """

    key: str
    file: str
    captions: tuple[str, ...]
    span: tuple[int, int] | None = None


class Findings:
    """Collects what is wrong with a data set, to refuse it or to leave that out.

    Args:
      where: name of the data set in messages.
      allow_incomplete: whether to leave out, with one warning, instead of refusing.
    """

    def __init__(self, where: str, allow_incomplete: bool):
        self._where, self._allow_incomplete = where, allow_incomplete
        self._examples: dict[str, list[str]] = collections.defaultdict(list)
        self.counts: dict[str, int] = collections.Counter()

    def add(self, problem: str, example: str) -> None:
        """Note one case of a problem, which is named in the plural."""
        self.counts[problem] += 1
        if len(self._examples[problem]) < _SHOWN:
            self._examples[problem].append(example)

    def settle(self) -> None:
        """Refuse the data set or warn, if anything is wrong.

        Raises:
          DatasetError: something is, and nothing may be left out.
        """
        if not self.counts:
            return
        found = "; ".join(
            f"{count} {problem} ({', '.join(self._examples[problem])}"
            f"{', …' if count > _SHOWN else ''})"
            for problem, count in self.counts.items()
        )
        if not self._allow_incomplete:
            raise DatasetError(
                f"{self._where} has {found}. Repair it, or leave these out with allow_incomplete"
            )
        warnings.warn(f"{self._where}: left out {found}", stacklevel=4)


class CaptionedImages:
    """Give images with texts as `{"image": uint8 [H W 3], "caption": str}`.

    Images are upright, as their EXIF orientation says. Where an image has several texts, `caption`
    is an array of them, of which `transforms.PickCaption` draws one.

    Args:
      name: of the data set.
      entries: what it has, as `read_caption_folder` and the like list it.
      max_bad_images: how many unreadable images may be replaced by the next readable one, each
        with a warning; one more is an error.
      left_out: problem → number of cases that are not among the entries.

    Raises:
      DatasetError: there are no entries.
      ImageReadError: from indexing, at one unreadable image more than allowed; names it.
    """

    num_classes = None

    def __init__(
        self,
        name: str,
        entries: Sequence[Entry],
        *,
        max_bad_images: int = 0,
        left_out: dict[str, int] | None = None,
    ):
        if not entries:
            raise DatasetError(f"{name} has no images with captions")
        self._entries = entries
        self.left_out = dict(left_out or {})
        self._reader = TolerantReader(self._read, self.describe, len(entries), max_bad_images)
        # A run resumes with the same images and texts only.
        self.name = f"{name} {self.fingerprint[:12]}"

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the names of all images and of their texts."""
        digest = hashlib.sha256()
        for entry in self._entries:
            digest.update(os.fsencode(json.dumps([entry.key, *entry.captions])))
        return digest.hexdigest()

    @property
    def bad_images(self) -> tuple[str, ...]:
        """Names of the unreadable images met so far."""
        return self._reader.bad_images

    def describe(self, index: int) -> str:
        """Return the name of an image."""
        return self._entries[index].key

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the texts of an image, without reading it."""
        return self._entries[index].captions

    def image_size(self, index: SupportsIndex) -> tuple[int, int]:
        """Return height and width of an image, or of the one that stands in, from its header."""
        return self._reader.apply(self._read_size, index)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: SupportsIndex) -> Record:
        return self._reader[index]

    def __repr__(self) -> str:
        return f"CaptionedImages({self.name!r}, {len(self)} images)"

    def _read(self, index: int) -> Record:
        entry = self._entries[index]
        image = decode_rgb(_read_bytes(entry, None) if entry.span else entry.file, upright=True)
        return {"image": image, "caption": as_field(entry.captions)}

    def _read_size(self, index: int) -> tuple[int, int]:
        entry = self._entries[index]
        if entry.span is None:
            return read_size(entry.file, upright=True)
        try:
            return read_size(_read_bytes(entry, _HEADER_BYTES), upright=True)
        except ImageReadError:
            return read_size(_read_bytes(entry, None), upright=True)


def as_field(captions: Sequence[str]) -> Any:
    """Return the field `caption` of a record: one text, or an array of several."""
    return captions[0] if len(captions) == 1 else np.asarray(captions)


def _read_bytes(entry: Entry, limit: int | None) -> bytes:
    """Return the bytes of an image inside a file, `limit` at most."""
    start, size = entry.span or (0, -1)
    try:
        with open(entry.file, "rb") as file:
            file.seek(start)
            return file.read(size if limit is None else min(size, limit))
    except OSError as error:
        raise ImageReadError(f"{entry.file}: {error.strerror}") from error


def read_caption_folder(
    path: str | os.PathLike, *, allow_incomplete: bool = False, max_bad_images: int = 0
) -> CaptionedImages:
    """Open a folder of images with a text file of the same name beside each: x.jpg and x.txt.

    Folders below it are read too, in the order of the names; names that begin with a dot and other
    kinds of files are passed over. The whole text, without white space around it, is one caption.

    Args:
      path: the folder.
      allow_incomplete: leave out images without a text, texts without an image, texts that are
        empty or not UTF-8, and images of which two have the same name; they are counted in
        `left_out`, and one warning tells them. Otherwise they are an error.
      max_bad_images: see `CaptionedImages`.

    Raises:
      DatasetError: the folder is missing or without images, or incomplete.
    """
    folder = pathlib.Path(path).expanduser()
    if not folder.is_dir():
        raise DatasetError(f"no folder {folder}; expected images with texts: x.jpg and x.txt")
    findings = Findings(str(folder), allow_incomplete)
    entries = []
    for here, names in _walk(folder):
        texts = {name[:-4]: name for name in names if name.lower().endswith(".txt")}
        images: set[str] = set()
        for name in names:
            stem, extension = os.path.splitext(name)
            if extension.lower() not in EXTENSIONS:
                continue
            key = _key(folder, here, name)
            if stem in images:
                findings.add("images of which another has the same name", key)
            elif stem not in texts:
                findings.add("images without a caption file", key)
            else:
                data = pathlib.Path(here, texts[stem]).read_bytes()
                text = decode_text(data, _key(folder, here, texts[stem]), findings)
                if text is not None:
                    entries.append(Entry(key, os.path.join(here, name), (text,)))
            images.add(stem)
        for stem in sorted(texts.keys() - images):
            findings.add("caption files without an image", _key(folder, here, texts[stem]))
    if not entries and not findings.counts:
        raise DatasetError(
            f"no images ({', '.join(EXTENSIONS)}) in {folder} or below; expected x.jpg with x.txt"
        )
    findings.settle()
    return CaptionedImages(
        folder.name, entries, max_bad_images=max_bad_images, left_out=findings.counts
    )


def _walk(folder: pathlib.Path) -> Iterator[tuple[str, list[str]]]:
    """Yield every folder with its files, both in the order of their names."""

    def fail(error: OSError) -> None:
        raise DatasetError(f"cannot read {error.filename}: {error.strerror}") from error

    for here, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield here, sorted(name for name in names if not name.startswith("."))


def _key(folder: pathlib.Path, here: str, name: str) -> str:
    return pathlib.Path(here, name).relative_to(folder).as_posix()


def decode_text(data: bytes, where: str, findings: Findings) -> str | None:
    """Return a text without white space around it; note why not and return `None` otherwise."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        findings.add("captions that are not UTF-8", f"{where} line {line}")
        return None
    return check_text(text, where, findings)


def check_text(text: Any, where: str, findings: Findings) -> str | None:
    """Return a text without white space around it; note why not and return `None` otherwise."""
    if not isinstance(text, str):
        findings.add("captions that are no text", f"{where}: {text!r:.40}")
        return None
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON's escapes can write half a character
        findings.add("captions that are not UTF-8", where)
        return None
    if not text.strip():
        findings.add("empty captions", where)
        return None
    return text.strip()


def read_json_lines(
    path: str | os.PathLike, *, allow_incomplete: bool = False, max_bad_images: int = 0
) -> CaptionedImages:
    """Open a table of images and texts, one JSON object per line.

    A line is `{"file_name": "a/x.jpg", "caption": "…"}`; `image` may stand for `file_name` and
    `text` for `caption`, and a list for a text where an image has several. Paths are relative to
    the table's folder. Other fields, empty lines and images that no line names are passed over.

    Args:
      path: the table, or a folder with a `metadata.jsonl`, as Hugging Face's imagefolder has it.
      allow_incomplete: leave out lines that are no such object, that name a missing image or one
        that an earlier line names, and texts that are missing, empty or not UTF-8; they are
        counted in `left_out`, and one warning tells them. Otherwise they are an error.
      max_bad_images: see `CaptionedImages`.

    Raises:
      DatasetError: the table is missing or without lines, or incomplete.
    """
    table = pathlib.Path(path).expanduser()
    table = table / METADATA_FILE if table.is_dir() else table
    try:
        content = table.read_bytes()
    except OSError as error:
        raise DatasetError(f"cannot read the table {table}: {error.strerror}") from error
    findings = Findings(str(table), allow_incomplete)
    entries, seen = [], set()
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        made = _parse_line(line, number, findings)
        if made is None:
            continue
        name, texts = made
        file = os.path.join(table.parent, name)
        if not os.path.isfile(file):
            findings.add("images that are missing", f"{name} of line {number}")
        elif name in seen:
            findings.add("images that an earlier line names", f"{name} of line {number}")
        else:
            seen.add(name)
            entries.append(Entry(name, file, texts))
    if not entries and not findings.counts:
        raise DatasetError(f"the table {table} is empty; expected one JSON object per line")
    findings.settle()
    name = f"{table.parent.name}/{table.name}"
    return CaptionedImages(name, entries, max_bad_images=max_bad_images, left_out=findings.counts)


def _parse_line(line: bytes, number: int, findings: Findings) -> tuple[str, tuple[str, ...]] | None:
    """Return file name and texts, or note what is wrong."""
    where = f"line {number}"
    try:
        fields = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        findings.add("lines that are not UTF-8", where)
        return None
    except (ValueError, RecursionError) as error:
        findings.add("lines that are no JSON", f"{where}: {error}")
        return None
    if not isinstance(fields, dict):
        findings.add("lines that are no JSON object", where)
        return None
    name = next((fields[field] for field in _FILE_FIELDS if field in fields), None)
    if not isinstance(name, str) or not name or "\0" in name:
        findings.add(f"lines without {' or '.join(_FILE_FIELDS)}", where)
        return None
    texts = find_texts(fields, f"{name} of {where}", findings)
    return (name, texts) if texts else None


def find_texts(fields: dict[str, Any], where: str, findings: Findings) -> tuple[str, ...]:
    """Return the texts in the fields of a JSON object; note why if there are none."""
    there = [fields[field] for field in _TEXT_FIELDS if fields.get(field) is not None]
    value = there[0] if there else None
    if value is None or value == []:
        findings.add("images without a caption", where)
        return ()
    values = value if isinstance(value, list) else [value]
    texts = [check_text(text, where, findings) for text in values]
    return tuple(text for text in texts if text is not None)
