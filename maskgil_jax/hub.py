"""Files and model directories of the Hugging Face hub, `hf://owner/repo[/path][@revision]`.

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

from maskgil_jax.checkpoints import (
    MODEL_FILES,
    CheckpointError,
    file_sha256,
    list_model_files,
)

SCHEME = "hf://"
# What pathlib makes of the scheme.
_SHORT_SCHEME = "hf:/"
_NO_HUB = f'{SCHEME} files need huggingface_hub: pip install "maskgil_jax[hub]"'
_ADDRESS = re.compile(r"hf://([\w.-]+/[\w.-]+)/([^@]+)(?:@(.+))?", re.ASCII)
_FOLDER_ADDRESS = re.compile(r"hf://?([\w.-]+/[\w.-]+)(?:/([^@]*))?(?:@(.+))?", re.ASCII)
# Of the files that tools/convert_checkpoint.py reads.
_WEIGHTS = (".pt", ".pth", ".ckpt", ".safetensors", ".safetensors.index.json")
_CONVERT = "python tools/convert_checkpoint.py import --dst DIR --src"


class HubError(ValueError):
    """What the hub does not give, or no address of it; the message says why and what to do."""


class MissingFileError(HubError):
    """The repository is there, but has no such file."""


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
            HubError: it is not `hf://owner/repo/path[@revision]`.
        """
        match = _ADDRESS.fullmatch(address)
        if match is None or {"", ".", ".."} & set(match.group(2).split("/")):
            raise HubError(
                f"{address!r} is no file of the hub; write hf://owner/repo/path/in/repo[@revision]"
            )
        return cls(*match.groups())

    def __str__(self) -> str:
        return f"{SCHEME}{self.repo}/{self.path}{_show_revision(self.revision)}"

    def sibling(self, name: str) -> "HubFile":
        """Return the file of another name in the same folder and revision."""
        return replace(self, path="/".join([*self.path.split("/")[:-1], name]))

    def download(self) -> Path:
        """Return the path of a local copy, downloaded where the cache has none.

        Raises:
            HubError: no such repository, revision or file, no access to it, the hub cannot be
                reached, or what was downloaded is damaged.
            ImportError: `huggingface_hub` is not installed.
        """
        path = _fetch(self)
        _check_blob(self, path)
        return path


@dataclass(frozen=True)
class HubFolder:
    """A model directory in a repository of the hub.

    Attributes:
        repo: `owner/name`.
        path: of the folder in the repository; the repository itself if None.
        revision: a branch, tag or commit; the default branch if None.
    """

    repo: str
    path: str | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, address: os.PathLike | str) -> "HubFolder":
        """Read an address, of which pathlib may have taken a slash.

        Raises:
            HubError: it is not `hf://owner/repo[/folder][@revision]`, or names a checkpoint file.
        """
        text = os.fspath(address)
        match = _FOLDER_ADDRESS.fullmatch(text)
        path = (match.group(2) or "").removesuffix("/") if match else ""
        if match is None or (path and {"", ".", ".."} & set(path.split("/"))):
            raise HubError(
                f"{text!r} is no folder of the hub; write hf://owner/repo[/folder][@revision]"
            )
        folder = cls(match.group(1), path or None, match.group(3))
        if path.endswith(_WEIGHTS):
            raise HubError(
                f"{folder} is a checkpoint file, not a model directory; convert it first, and give "
                f"DIR: {_CONVERT} {folder}"
            )
        return folder

    def __str__(self) -> str:
        path = "" if self.path is None else f"/{self.path}"
        return f"{SCHEME}{self.repo}{path}{_show_revision(self.revision)}"

    def file(self, name: str) -> HubFile:
        """Return the file of a name in this folder."""
        path = name if self.path is None else f"{self.path}/{name}"
        return HubFile(self.repo, path, self.revision)

    def pin(self) -> "HubFolder":
        """Return the folder at the commit that its revision now is.

        Raises:
            HubError: as `download`.
            ImportError: as `download`.
        """
        file = self.file(MODEL_FILES[0])
        try:
            local = file.download()
        except MissingFileError as error:
            raise self._explain_missing(MODEL_FILES[0]) from error
        # The cache has a folder for every commit, in which files lie as in the repository.
        return replace(self, revision=local.parents[file.path.count("/")].name)

    def download(self) -> Path:
        """Return a local copy, all files of it of one commit; they are not read.

        Raises:
            HubError: no such repository, revision or folder, it is no model directory, there is no
                access to it, the hub cannot be reached, or what was downloaded is damaged.
            ImportError: `huggingface_hub` is not installed.
        """
        pinned = self.pin()
        try:
            folders = {pinned.file(name).download().parent for name in MODEL_FILES}
        except MissingFileError as error:
            raise self._explain_missing(MODEL_FILES[1]) from error
        (folder,) = folders
        # Whoever reads the directory says what is wrong with its header.
        with contextlib.suppress(CheckpointError):
            for name in list_model_files(folder / MODEL_FILES[0]):
                pinned.file(name).download()
        return folder

    def _explain_missing(self, name: str) -> HubError:
        """Return the error that says what the folder is, where it is no model directory."""
        there = self._list_names()
        weights = [one for one in there if one.endswith(_WEIGHTS) and one != MODEL_FILES[1]]
        if weights:
            return HubError(
                f"{self} is no model directory: it has no {name}, but checkpoints of another "
                f"program ({', '.join(weights[:3])}); convert the one you need, and give DIR: "
                f"{_CONVERT} {self.file(weights[0])}"
            )
        if "run.json" in there:
            return HubError(
                f"{self} is a training run, of which no checkpoint is read from the hub; make a "
                "model directory of it with tools/export_weights.py, and upload that"
            )
        return HubError(
            f"{self} is no model directory: it has no {name} (expected {' and '.join(MODEL_FILES)},"
            " as tools/convert_checkpoint.py writes them)"
        )

    def _list_names(self) -> list[str]:
        """Return the names of the folder's files; none where the folder is missing."""
        import huggingface_hub

        with contextlib.suppress(MissingFileError), _explain(self):
            entries = huggingface_hub.HfApi().list_repo_tree(
                self.repo, self.path, revision=self.revision
            )
            return sorted(entry.path.split("/")[-1] for entry in entries)
        return []


def is_address(path: os.PathLike | str) -> bool:
    """Return whether a path is meant as an address of the hub, also if pathlib took a slash."""
    return os.fspath(path).startswith(_SHORT_SCHEME)


def find_directory(path: os.PathLike | str) -> Path:
    """Return a local directory: the path itself, or the copy of a model directory of the hub.

    Raises:
        HubError: as `HubFolder.parse` and `HubFolder.download`.
        ImportError: an address of the hub without its client.
    """
    return HubFolder.parse(path).download() if is_address(path) else Path(path)


def _show_revision(revision: str | None) -> str:
    return "" if revision is None else f"@{revision}"


def _fetch(file: HubFile) -> Path:
    """Return the path of a file in the cache, downloaded where it is missing there."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(_NO_HUB) from error
    options: dict[str, Any] = {"revision": file.revision}
    with _explain(file):
        cached = huggingface_hub.try_to_load_from_cache(file.repo, file.path, **options)
        if not isinstance(cached, str):
            # Of what is not in the cache, the client asks for half a minute.
            options["local_files_only"] = not _is_reachable(file)
        return Path(huggingface_hub.hf_hub_download(file.repo, file.path, **options))


def _is_reachable(file: HubFile) -> bool:
    """Return whether the hub answers, whatever it says."""
    import huggingface_hub
    from huggingface_hub import constants, errors

    url = huggingface_hub.hf_hub_url(file.repo, file.path, revision=file.revision)
    try:
        huggingface_hub.get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except errors.HfHubHTTPError:
        return True
    except _transport_errors():
        return False
    return True


def _transport_errors() -> tuple[type[Exception], ...]:
    """Return the errors of the HTTP library that the client uses, which differs by version."""
    from huggingface_hub import errors

    bases: Any = errors.HfHubHTTPError.__bases__
    return (*bases, OSError)


@contextlib.contextmanager
def _explain(place: HubFile | HubFolder) -> Iterator[None]:
    """Turn the hub's errors into ours."""
    from huggingface_hub import errors

    # ValueError: of a name that cannot be one of a repository.
    transport: tuple[type[Exception], ...] = (*_transport_errors(), ValueError)
    at = "" if place.revision is None else f" at revision {place.revision!r}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise HubError(
            f"{place}: {place.repo} is gated; accept its terms on the hub and set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{place}: the hub has no repository {place.repo!r}, or it is private; check the name, "
            "or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{place}: {place.repo} has no revision {place.revision!r}") from error
    except errors.LocalEntryNotFoundError as error:
        raise HubError(
            f"{place}: the hub cannot be reached and the cache has no copy; connect, unset "
            "HF_HUB_OFFLINE, or give a local file"
        ) from error
    except errors.EntryNotFoundError as error:
        raise MissingFileError(f"{place}: {place.repo} has no file {place.path!r}{at}") from error
    except transport as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise HubError(f"{place} could not be downloaded: {reason}") from error


def _check_blob(file: HubFile, path: Path) -> None:
    """Refuse a damaged copy: the cache names large files by their SHA-256 but never checks it."""
    name = os.path.basename(os.path.realpath(path))
    if re.fullmatch(r"[0-9a-f]{64}", name) and file_sha256(path) != name:
        raise HubError(
            f"{file}: the copy in the cache is damaged (its SHA-256 is not {name}); delete "
            f"{os.path.realpath(path)} and try again"
        )
