"""From a validated configuration to the sizes of its images."""

from ml_collections import ConfigDict

from maskgil_jax.data.buckets import Size, area_buckets, check_bucket
from maskgil_jax.masking import check_choice

BUCKETS = ("none", "area", "listed")


def bucket_sizes(config: ConfigDict) -> tuple[Size, ...]:
    """Return the sizes (height, width) of the images of a run, one or many.

    Raises:
        ValueError: if `data.image_size` and the fields of buckets do not go together.
    """
    data = config.data
    check_choice("data.buckets", data.buckets, BUCKETS)
    height, width = data.image_size
    if data.buckets == "none":
        return ((height, width),)
    if data.buckets == "listed":
        return _listed(data)
    if height != width:
        raise ValueError(
            f"data.image_size {(height, width)} must be square with data.buckets {data.buckets!r}: "
            "its area is what all buckets have"
        )
    return area_buckets(height, data.bucket_multiple, data.bucket_max_ratio)


def _listed(data: ConfigDict) -> tuple[Size, ...]:
    sizes = tuple(data.bucket_sizes)
    for size in sizes:
        if not (isinstance(size, tuple) and len(size) == 2 and min(size) >= 1):
            raise ValueError(
                f"data.bucket_sizes: {size!r} is no size; give (height, width) in pixels"
            )
    if tuple(data.image_size) not in sizes or len(set(sizes)) < len(sizes):
        raise ValueError(
            f"data.bucket_sizes {sizes} must name different sizes, data.image_size "
            f"{tuple(data.image_size)} among them: it is generated where no size is named"
        )
    return sizes


def check_size(config: ConfigDict, size: Size) -> None:
    """Raise a `ValueError` that names the nearest if a size is none of the buckets of a run."""
    if config.data.buckets != "none":
        check_bucket(size, bucket_sizes(config))
