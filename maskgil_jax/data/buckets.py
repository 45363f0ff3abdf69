"""Sizes for images of any shape: the list of buckets, and which image goes to which.

A batch has one size. Images of many shapes are therefore cropped to a few sizes of nearly equal
area, each to the one that keeps most of it; `pipeline.make_bucketed_loader` makes the batches.
"""

import concurrent.futures
import functools
import hashlib
import math
import operator
from collections.abc import Mapping, Sequence, Sized
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Int64

from maskgil_jax.data.errors import ImageReadError

Size = tuple[int, int]  # height and width in pixels


def area_buckets(size: int, multiple: int = 32, max_ratio: float = 4.0) -> tuple[Size, ...]:
    """List the heights and widths of at most `size`² pixels, sorted by height.

    They are the corners of a walk along the boundary of that area in units of `multiple` pixels,
    from one row to one column: 25 sizes at 256 and 49 at 512, of units of 32.

    Args:
      size: side of the square bucket in pixels.
      multiple: unit of both sides in pixels; a multiple of the tokenizer's pixels per token.
      max_ratio: longer side over shorter side, at most.

    Raises:
      ValueError: `size` is no positive multiple of `multiple`, or `max_ratio` is less than 1.

    Reference: Lumina-mGPT, the size buckets of its training data.
    """
    if multiple < 1 or size < 1 or size % multiple:
        raise ValueError(
            f"buckets of size {size} and multiple {multiple}: the size must be a positive multiple"
        )
    if not 1 <= max_ratio < math.inf:
        raise ValueError(f"max_ratio = {max_ratio}; give 1 (squares only) or more")
    units = (size // multiple) ** 2
    found = set()
    width, height = units, 1
    while width:
        if max(width, height) <= max_ratio * min(width, height):
            found.add((height * multiple, width * multiple))
        if (height + 1) * width <= units:
            height += 1
        else:
            width -= 1
    return tuple(sorted(found))


def kept_share(size: Size, bucket: Size) -> float:
    """Return the share of an image's area that is left when it is cropped to a bucket's shape."""
    # With whole numbers, equal shapes have equal shares.
    rows, columns = bucket[0] * size[1], bucket[1] * size[0]
    return min(rows, columns) / max(rows, columns)


def choose_bucket(size: Size, buckets: Sequence[Size]) -> Size:
    """Return the bucket that keeps most of an image, of several the largest.

    Raises:
      ValueError: there are no buckets, or a side of `size` is not positive.
    """
    if min(size) < 1 or not buckets:
        raise ValueError(f"image of {size} pixels and {len(buckets)} buckets; give at least 1 each")
    return max(buckets, key=lambda bucket: (kept_share(size, bucket), math.prod(bucket), bucket))


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> Size:
    """Return the bucket nearest to a size, by the factors between their heights and widths."""
    height, width = size
    return min(
        buckets, key=lambda b: (math.hypot(math.log(b[0] / height), math.log(b[1] / width)), b)
    )


def check_bucket(size: Size, buckets: Sequence[Size]) -> None:
    """Refuse a size, as a user asks for it, that is no bucket.

    Raises:
      ValueError: it is none; the message names the nearest.
    """
    if tuple(size) in buckets:
        return
    near = ""
    if min(size) > 0:
        near = f"; the nearest is {format_size(nearest_bucket(size, buckets))}"
    names = ", ".join(map(format_size, sorted(buckets)))
    raise ValueError(
        f"size {format_size(size)} (height x width) is none of the model's{near}; allowed: {names}"
    )


def format_size(size: Sequence[int]) -> str:
    """Return a size as text, height first: 512x768."""
    return "x".join(map(str, size))


class Subset:
    """Give some records of a source as a source.

    Args:
      source: random-access data set.
      indices: of the records, in order.
      label: tells this subset from others of the same source, in its name.

    Raises:
      ValueError: an index is outside the source.
    """

    def __init__(self, source: Any, indices: Sequence[int] | np.ndarray, label: str):
        self.source = source
        self.indices: Int64[np.ndarray, " n"] = np.asarray(indices, np.int64)
        outside = self.indices[(self.indices < 0) | (self.indices >= len(source))]
        if outside.size:
            raise ValueError(f"record {outside[0]} of {source.name}; it has {len(source)}")
        # A run resumes with the same records only.
        digest = hashlib.sha256(self.indices.tobytes()).hexdigest()[:12]
        self.name = f"{source.name} {label} {digest}"
        self.num_classes = getattr(source, "num_classes", None)

    def describe(self, index: int) -> str:
        """Return the name of an image, of a source that has names for them."""
        return self.source.describe(int(self.indices[index]))

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the texts of an image, of a source that tells them without it."""
        return self.source.captions(int(self.indices[index]))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        return self.source[int(self.indices[operator.index(index)])]

    def __repr__(self) -> str:
        return f"Subset({self.source!r}, {len(self)} records)"


def split_by_bucket(
    source: Any, buckets: Sequence[Size], *, num_threads: int = 8, keep_unreadable: bool = False
) -> dict[Size, Subset]:
    """Sort the images of a source into buckets; those that get none are left out of the result.

    The header of every image is read once. Every process must do it, and finds the same.

    Args:
      source: data set whose `image_size(index)` gives an image's height and width.
      buckets: sizes to choose from.
      num_threads: threads that read headers.
      keep_unreadable: put images whose header cannot be read into the fullest bucket, for a reader
        that counts what it cannot read, instead of failing.

    Raises:
      ValueError: the source cannot tell sizes, or has no images.
      ImageReadError: from the source, at one unreadable image more than it allows.
    """
    if not hasattr(source, "image_size"):
        raise ValueError(
            f"{source.name} does not tell the sizes of its images; give one source per bucket"
        )
    if not len(source):
        raise ValueError(f"{source.name} has no images")
    choose = functools.cache(lambda size: choose_bucket(size, buckets))
    members: dict[Size, list[int]] = {}
    unreadable = []

    def find_size(index: int) -> Size | None:
        try:
            return source.image_size(index)
        except ImageReadError:
            if not keep_unreadable:
                raise
            return None

    with concurrent.futures.ThreadPoolExecutor(max(num_threads, 1)) as pool:
        for index, size in enumerate(pool.map(find_size, range(len(source)))):
            if size is None:
                unreadable.append(index)
            else:
                members.setdefault(choose(size), []).append(index)
    if unreadable:
        if not members:
            raise ImageReadError(f"all {len(unreadable)} images of {source.name} are unreadable")
        fullest = max(members.values(), key=len)
        fullest.extend(unreadable)
        fullest.sort()
    return {size: Subset(source, members[size], format_size(size)) for size in sorted(members)}


def describe_buckets(sources: Mapping[Size, Sized], batch_size: int) -> str:
    """Say in one line how many images the buckets hold, and which hold less than a batch."""
    sizes = sorted(sources)
    total = sum(len(source) for source in sources.values())
    line = (
        f"{total:,} images in {len(sizes)} buckets, {format_size(sizes[0])} to "
        f"{format_size(sizes[-1])} pixels"
    )
    small = [f"{format_size(s)} ({len(sources[s])})" for s in sizes if len(sources[s]) < batch_size]
    if small:
        more = ", …" if len(small) > 5 else ""
        line += (
            f"; {len(small)} hold fewer than a batch of {batch_size} and repeat them in it: "
            f"{', '.join(small[:5])}{more}"
        )
    return line
