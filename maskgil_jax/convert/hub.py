"""Checkpoint files of the Hugging Face hub, `hf://owner/repo/path/in/repo[@revision]`.

Needs `huggingface_hub` (extra `hub`), whose cache and environment variables (`HF_HOME`,
`HF_ENDPOINT`, `HF_HUB_OFFLINE`, `HF_TOKEN`) hold here too.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from maskgil_jax.checkpoints import file_sha256
from maskgil_jax.convert.rules import ConversionError

SCHEME = "hf://"
_NO_HUB = f'{SCHEME} files need huggingface_hub: pip install "maskgil_jax[hub]"'
_ADDRESS = re.compile(r"hf://([\w.-]+/[\w.-]+)/([^@]+)(?:@(.+))?", re.ASCII)


@dataclass(frozen=True)
class HubFile:
    """A file in a repository of the hub.

    Attributes:
        repo: `owner/name`.
        path: of the file in the repository.
        revision: a branch, tag or commit; the default branch if None.
    """

    repo: str
    path: str
    revision: str | None = None

    @classmethod
    def parse(cls, address: str) -> "HubFile":
        """Read an address.

        Raises:
            ConversionError: it is not `hf://owner/repo/path[@revision]`.
        """
        match = _ADDRESS.fullmatch(address)
        if match is None or {"", ".", ".."} & set(match.group(2).split("/")):
            raise ConversionError(
                f"{address!r} is no file of the hub; write hf://owner/repo/path/in/repo[@revision]"
            )
        return cls(*match.groups())

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision}"
        return f"{SCHEME}{self.repo}/{self.path}{revision}"

    def sibling(self, name: str) -> "HubFile":
        """Return the file of another name in the same folder and revision."""
        return replace(self, path="/".join([*self.path.split("/")[:-1], name]))

    def download(self) -> Path:
        """Return the path of a local copy, downloaded where the cache has none.

        Raises:
            ConversionError: no such repository, revision or file, no access to it, the hub cannot
                be reached, or what was downloaded is damaged.
            ImportError: `huggingface_hub` is not installed.
        """
        try:
            import huggingface_hub
        except ImportError as error:
            raise ImportError(_NO_HUB) from error
        with _explain(self):
            path = huggingface_hub.hf_hub_download(self.repo, self.path, revision=self.revision)
        _check_blob(self, Path(path))
        return Path(path)


@contextlib.contextmanager
def _explain(file: HubFile) -> Iterator[None]:
    """Turn the hub's errors into ours."""
    from huggingface_hub import errors

    # Those of the HTTP library that the client uses, which differs between versions.
    transport: Any = errors.HfHubHTTPError.__bases__
    at = "" if file.revision is None else f" at revision {file.revision!r}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise ConversionError(
            f"{file}: {file.repo} is gated; accept its terms on the hub and set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ConversionError(
            f"{file}: the hub has no repository {file.repo!r}, or it is private; check the name, "
            "or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ConversionError(f"{file}: {file.repo} has no revision {file.revision!r}") from error
    except errors.LocalEntryNotFoundError as error:
        raise ConversionError(
            f"{file}: the hub cannot be reached and the cache has no copy; connect, unset "
            "HF_HUB_OFFLINE, or give a local file"
        ) from error
    except errors.EntryNotFoundError as error:
        raise ConversionError(f"{file}: {file.repo} has no file {file.path!r}{at}") from error
    except (*transport, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConversionError(f"{file} could not be downloaded: {reason}") from error


def _check_blob(file: HubFile, path: Path) -> None:
    """Refuse a damaged copy: the cache names large files by their SHA-256 but never checks it."""
    name = os.path.basename(os.path.realpath(path))
    if re.fullmatch(r"[0-9a-f]{64}", name) and file_sha256(path) != name:
        raise ConversionError(
            f"{file}: the copy in the cache is damaged (its SHA-256 is not {name}); delete "
            f"{os.path.realpath(path)} and try again"
        )
