"""Images with texts in tar files, as webdataset and img2dataset write them, read by index.

The headers of every tar are read once when the data set is opened; an image is then read at its
place in the file.
"""

import dataclasses
import json
import os
import pathlib
import tarfile
from typing import IO

from maskgil_jax.data.captions import (
    CaptionedImages,
    Entry,
    Findings,
    decode_text,
    find_texts,
)
from maskgil_jax.data.errors import DatasetError
from maskgil_jax.data.folder import EXTENSIONS

_LAYOUT = "expected *.tar with members KEY.jpg and KEY.txt or KEY.json"
_IMAGES = tuple(extension.removeprefix(".") for extension in EXTENSIONS)
_TEXTS = ("txt", "json")  # in this order
_BLOCK = 512


@dataclasses.dataclass
class _Sample:
    """Members of one key: extension → first byte and number of bytes."""

    members: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    is_doubled: bool = False


def read_webdataset(
    path: str | os.PathLike, *, allow_incomplete: bool = False, max_bad_images: int = 0
) -> CaptionedImages:
    """Open tar files whose members KEY.jpg and KEY.txt are an image and its text.

    Any image format may stand for jpg. Without KEY.txt, the text is `caption` or `text` of the
    object in KEY.json, which may be a list of several. A key is a member's path up to the first
    dot of its name, and belongs to its tar. Members of other kinds are passed over.

    Args:
      path: a folder with `*.tar`, read in the order of their names, or one tar.
      allow_incomplete: leave out what is behind the place where a tar is cut short or damaged,
        images without a text, texts without an image, texts that are empty or not UTF-8, and keys
        that a tar has twice; they are counted in `left_out`, and one warning tells them. Otherwise
        they are an error.
      max_bad_images: see `CaptionedImages`.

    Raises:
      DatasetError: there are no tars, one is compressed, or the data set is incomplete; of a tar
        that is cut short with the number of samples that are whole.
    """
    root = pathlib.Path(path).expanduser()
    findings = Findings(str(root), allow_incomplete)
    entries: list[Entry] = []
    for shard in _list_shards(root):
        entries.extend(_read_shard(shard, findings))
    if not entries and not findings.counts:
        raise DatasetError(f"the tars of {root} have no images with texts; {_LAYOUT}")
    findings.settle()
    return CaptionedImages(
        root.name, entries, max_bad_images=max_bad_images, left_out=findings.counts
    )


def _list_shards(root: pathlib.Path) -> list[pathlib.Path]:
    if root.is_file():
        return [root]
    try:
        names = sorted(name for name in os.listdir(root) if not name.startswith("."))
    except OSError as error:
        raise DatasetError(f"cannot read {root}: {error.strerror}; {_LAYOUT}") from error
    shards = [root / name for name in names if name.endswith(".tar")]
    if not shards:
        hint = ""
        if packed := [name for name in names if ".tar." in name or name.endswith(".tgz")]:
            hint = f"; {packed[0]} is compressed, which cannot be read by index: unpack it to .tar"
        raise DatasetError(f"no tars in {root}; {_LAYOUT}{hint}")
    return shards


def _read_shard(shard: pathlib.Path, findings: Findings) -> list[Entry]:
    """Return what one tar holds, and note what is wrong with it."""
    samples, damage = _index_members(shard)
    entries: list[Entry] = []
    with open(shard, "rb") as file:
        for key, sample in samples.items():
            where = f"{shard.name}/{key}"
            images = [name for name in sample.members if name in _IMAGES]
            texts = [name for name in _TEXTS if name in sample.members]
            if damage and key == next(reversed(samples)) and not (images and texts):
                continue  # the rest of it is behind the damage
            if sample.is_doubled or len(images) > 1:
                findings.add("keys with a member or an image twice", where)
            elif not images:
                # A JSON file alone may be anything.
                if "txt" in texts:
                    findings.add("captions without an image", where)
            elif not texts:
                findings.add("images without a caption", where)
            elif captions := _read_texts(file, sample, texts[0], where, findings):
                span = sample.members[images[0]]
                entries.append(Entry(f"{where}.{images[0]}", str(shard), captions, span))
    if damage:
        whole = f"{len(entries)} whole samples before it"
        findings.add("tars that are cut short or damaged", f"{shard.name}: {damage}, {whole}")
    return entries


def _index_members(shard: pathlib.Path) -> tuple[dict[str, _Sample], str]:
    """Return the whole members by key, and why there may be more of them, or nothing."""
    samples: dict[str, _Sample] = {}
    size = shard.stat().st_size
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                _, _, name = member.name.rpartition("/")
                stem, dot, extension = name.partition(".")
                if not (member.isreg() and stem and dot) or member.issparse():
                    continue
                if member.offset_data + member.size > size:
                    return samples, f"{member.name} ends behind the end of the file"
                key = member.name[: len(member.name) - len(extension) - 1]
                sample = samples.setdefault(key, _Sample())
                sample.is_doubled |= extension.lower() in sample.members
                sample.members[extension.lower()] = member.offset_data, member.size
            end = tar.offset
    except tarfile.TarError as error:
        return samples, str(error)
    except OSError as error:
        raise DatasetError(f"cannot read {shard}: {error.strerror}") from error
    # tarfile takes a damaged header, or none, for the end; a tar that is whole has a zero block.
    with open(shard, "rb") as file:
        file.seek(end)
        is_closed = file.read(_BLOCK) == bytes(_BLOCK)
    return samples, "" if is_closed else f"no end mark after {end:,} of {size:,} bytes"


def _read_texts(
    file: IO[bytes], sample: _Sample, extension: str, where: str, findings: Findings
) -> tuple[str, ...]:
    """Return the texts of a sample, or note what is wrong."""
    start, size = sample.members[extension]
    file.seek(start)
    data, where = file.read(size), f"{where}.{extension}"
    if extension == "txt":
        text = decode_text(data, where, findings)
        return () if text is None else (text,)
    try:
        fields = json.loads(data)
    except UnicodeDecodeError:
        findings.add("captions that are not UTF-8", where)
        return ()
    except (ValueError, RecursionError) as error:
        findings.add("JSON files that cannot be read", f"{where}: {error}")
        return ()
    if not isinstance(fields, dict):
        findings.add("JSON files that hold no object", where)
        return ()
    return find_texts(fields, where, findings)
