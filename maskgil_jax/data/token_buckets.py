"""Stored tokens of several grids: a folder of token records for each size, and their list.

A folder holds `buckets.json` and, for every size in it, a folder such as `256x512` (height and
width in pixels of what was encoded) that is a data set of token records by itself.
"""

import json
import os
import pathlib
from collections.abc import Mapping

from maskgil_jax.data.buckets import Size, format_size
from maskgil_jax.data.errors import DatasetError
from maskgil_jax.data.token_dataset import DATASET_FILE, REMEDY, TokenDataset
from maskgil_jax.data.token_records import TokenRecordSource

BUCKETS_FILE = "buckets.json"
FORMAT = "maskgil_jax.token_buckets"
VERSION = 1


def describe_token_buckets(datasets: Mapping[Size, TokenDataset]) -> str:
    """Return the contents of `buckets.json`, the same for the same data sets."""
    entries = [
        {
            "folder": format_size(size),
            "image_size": size,
            "grid": datasets[size].grid,
            "count": datasets[size].count,
        }
        for size in sorted(datasets)
    ]
    return json.dumps({"format": FORMAT, "version": VERSION, "buckets": entries}, indent=1) + "\n"


def open_token_buckets(
    path: str | os.PathLike,
    *,
    captions: bool = False,
    features: bool = False,
    check_records: bool = True,
) -> dict[Size, TokenRecordSource]:
    """Open stored tokens as one source for each size (height, width) of images.

    A folder of token records of one size is opened, too.

    Args:
      path: folder that `tools/extract_tokens.py` wrote.
      captions, features, check_records: see `TokenRecordSource`.

    Raises:
      DatasetError: a file is missing or damaged, or the buckets are not of one tokenizer and kind.
    """
    folder = pathlib.Path(path).expanduser()
    options = {"captions": captions, "features": features, "check_records": check_records}
    if (folder / DATASET_FILE).exists():
        source = TokenRecordSource(folder, **options)
        return {source.dataset.image_size: source}
    sources: dict[Size, TokenRecordSource] = {}
    for size, count in _read_list(folder).items():
        source = TokenRecordSource(folder / format_size(size), **options)
        if (source.dataset.image_size, len(source)) != (size, count):
            raise DatasetError(
                f"{folder / format_size(size)} holds {len(source)} records of "
                f"{source.dataset.image_size}; {folder / BUCKETS_FILE} says {count}; {REMEDY}"
            )
        sources[size] = source
    kinds = {size: _describe_kind(source.dataset) for size, source in sources.items()}
    first = min(kinds)
    for size, kind in kinds.items():
        if kind != kinds[first]:
            raise DatasetError(
                f"the buckets of {folder} do not belong together: {format_size(first)} has "
                f"{kinds[first]}, {format_size(size)} has {kind}; {REMEDY}"
            )
    return sources


def _describe_kind(dataset: TokenDataset) -> str:
    """Return what is the same for all buckets of a data set."""
    labels = "no labels" if dataset.num_classes is None else f"{dataset.num_classes} classes"
    texts = "captions" if dataset.has_captions else "no captions"
    if dataset.text is not None:
        made = dataset.text
        texts += f" with {made.dtype} features of {made.fingerprint[:12]}"
    return (
        f"tokens of {dataset.tokenizer.fingerprint[:12]}, crops {', '.join(dataset.crops)}, "
        f"{labels}, {texts}"
    )


def _read_list(folder: pathlib.Path) -> dict[Size, int]:
    """Return the number of records for every size."""
    file = folder / BUCKETS_FILE
    try:
        fields = json.loads(file.read_text())
        if (fields["format"], fields["version"]) != (FORMAT, VERSION):
            raise ValueError(
                f"it has format {fields['format']!r}, version {fields['version']!r}; this release "
                f"reads {FORMAT!r}, {VERSION}"
            )
        found = {}
        for entry in fields["buckets"]:
            height, width = map(int, entry["image_size"])
            found[height, width] = int(entry["count"])
        if not found:
            raise ValueError("it lists no buckets")
        return found
    except FileNotFoundError as error:
        raise DatasetError(
            f"{folder} holds no token records: {DATASET_FILE} and {BUCKETS_FILE} are missing; they "
            "are written when tools/extract_tokens.py has finished. If that was cut short, start "
            "it again"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{file} cannot be read: {error}; restore it, or {REMEDY}") from error
