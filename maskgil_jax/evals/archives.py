"""Damage of `.npz` archives, of which their readers make errors of many kinds."""

import contextlib
import errno
import zipfile
import zlib
from collections.abc import Iterator

# A changed bit may ask for a password, for a compression or a feature that nobody knows, for a
# place before the file's beginning, or for more memory than there is.
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    ValueError,
    NotImplementedError,
    RuntimeError,
    MemoryError,
)


@contextlib.contextmanager
def name_damage(what: str, kind: type[ValueError] = ValueError) -> Iterator[None]:
    """Give one error for all that reading a damaged archive raises.

    Args:
        what: said in front of the reason, such as "x.npz is damaged".
        kind: of the error.

    Raises:
        ValueError: what was read is damaged. Other errors pass, such as those of a missing file.
    """
    try:
        yield
    except _DAMAGE as error:
        raise kind(f"{what}: {error}; copy or make it anew") from error
    except OSError as error:
        # How a place before the beginning ends in a file; a disk that fails is no damage.
        if error.errno != errno.EINVAL:
            raise
        raise kind(f"{what}: {error}; copy or make it anew") from error
