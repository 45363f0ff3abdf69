"""What the data room refuses: a dataset that is not there, an image that cannot be read."""


class DatasetError(ValueError):
    """A dataset is missing, empty, laid out differently or not prepared."""


class ImageReadError(DatasetError):
    """More images are truncated or unreadable than the caller allows; names the file."""
