"""What a run leaves on disk: model directories and training checkpoints.

Two formats, for two readers.

* A **model directory** (`config.json` + `params.safetensors`) is what converters write, what the
  package ships, and what other programs can read: an architecture and its weights, no more.
* A **training checkpoint** (orbax, in `Checkpoints`) is what a run resumes from: state and data
  iterator of one step, followed by a manifest of SHA-256 sums that is written last and checked
  before anything is restored.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy
from absl import logging
from flax import traverse_util
from jax.experimental import multihost_utils

FORMAT = "maskgil_jax"
FORMAT_VERSION = 1
KINDS = ("tokenizer", "model", "language-model", "text-encoder", "perceptual", "evaluator")
_PARAMS = "params.safetensors"
_CONFIG = "config.json"
# What a model directory consists of.
MODEL_FILES = (_CONFIG, _PARAMS)
_RECORD = "record"
_TEMPORARY = ".orbax-checkpoint-tmp"


class CheckpointError(ValueError):
    """A checkpoint or model directory that cannot be used; the message says why and what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelDir:
    """The contents of a model directory.

    Attributes:
        kind: `"tokenizer"`, `"model"`, `"language-model"`, `"text-encoder"`, `"perceptual"` (a net
            that only losses use) or `"evaluator"` (one that only metrics use).
        family: which architecture, e.g. `"llamagen-vq"` or `"maskgil"`.
        config: fields of the architecture's config dataclass.
        params: nested dict of NumPy arrays.
        source: where the weights came from (file, sha256, command), or empty.
        hashes: SHA-256 of the weights and of every other file of the directory, by name.
    """

    kind: str
    family: str
    config: dict[str, Any]
    params: dict[str, Any]
    source: dict[str, Any]
    hashes: dict[str, str]


def file_sha256(path: os.PathLike | str) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def new_directory(path: os.PathLike | str):
    """Yield a temporary sibling of `path` that takes its name only if the block succeeds.

    Raises:
        FileExistsError: if `path` already holds something.
    """
    path = pathlib.Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not empty; choose another path or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_model_dir(
    path: os.PathLike | str,
    *,
    kind: str,
    family: str,
    config: Mapping[str, Any],
    params: Mapping[str, Any],
    source: Mapping[str, Any] | None = None,
    files: Sequence[os.PathLike | str] = (),
) -> None:
    """Write an architecture and its weights; nothing appears at `path` unless all of it is written.

    Args:
        path: directory to create; may exist only if empty.
        kind: one of `KINDS`.
        family: which architecture.
        config: JSON-friendly fields of the architecture's config dataclass.
        params: nested dict of arrays.
        source: provenance to keep beside the weights (JSON-friendly).
        files: other files to copy into it, under their names: a text encoder's tokenizer.

    Raises:
        FileExistsError: if `path` already holds something.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is unknown; allowed: {', '.join(map(repr, KINDS))}")
    names = [pathlib.Path(file).name for file in files]
    if len({*names, *MODEL_FILES}) < len(names) + len(MODEL_FILES):
        raise ValueError(f"{names} are not names of their own beside {', '.join(MODEL_FILES)}")
    flat = traverse_util.flatten_dict(params, sep="/")
    arrays = {key: np.ascontiguousarray(np.asarray(value)) for key, value in flat.items()}
    with new_directory(path) as temporary:
        safetensors.numpy.save_file(arrays, temporary / _PARAMS)
        (temporary / _PARAMS).chmod(0o644)
        for file in files:
            shutil.copyfile(file, temporary / pathlib.Path(file).name)
        header = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "kind": kind,
            "family": family,
            "config": dict(config),
            "sha256": {name: file_sha256(temporary / name) for name in (_PARAMS, *names)},
            "source": dict(source or {}),
        }
        (temporary / _CONFIG).write_text(json.dumps(header, indent=2) + "\n")


def is_model_dir(path: os.PathLike | str) -> bool:
    """Return whether `path` looks like a model directory (its files are not checked)."""
    return (pathlib.Path(path) / _PARAMS).is_file()


def read_model_dir(path: os.PathLike | str) -> ModelDir:
    """Read a directory written by `write_model_dir`, checking the weights against their SHA-256.

    Raises:
        FileNotFoundError: if a file is missing.
        CheckpointError: if the header is not ours or the weights are not those it names.
    """
    path = pathlib.Path(path)
    for name in MODEL_FILES:
        if not (path / name).is_file():
            raise FileNotFoundError(
                f"{path} is not a model directory: {name} is missing "
                f"(expected {_CONFIG} and {_PARAMS}, as tools/convert_checkpoint.py writes them)"
            )
    header = read_header(path / _CONFIG)
    for name, expected in header["sha256"].items():
        if not (path / name).is_file():
            raise FileNotFoundError(
                f"{path / name} is missing, which {_CONFIG} names; copy or convert the directory "
                "again"
            )
        if expected != (actual := file_sha256(path / name)):
            raise CheckpointError(
                f"{path / name} has SHA-256 {actual}, but {_CONFIG} expects {expected}: the file "
                "is damaged or was replaced; copy or convert it again"
            )
    flat = safetensors.numpy.load_file(path / _PARAMS)
    return ModelDir(
        kind=header["kind"],
        family=header["family"],
        config=header["config"],
        params=traverse_util.unflatten_dict(flat, sep="/"),
        source=header.get("source", {}),
        hashes=dict(header["sha256"]),
    )


def read_kind(path: os.PathLike | str) -> str:
    """Return of which kind a model directory is; of its files only `config.json` is read.

    Raises:
        CheckpointError: if it is not ours.
    """
    return str(read_header(pathlib.Path(path) / _CONFIG)["kind"])


def list_model_files(config: os.PathLike | str) -> tuple[str, ...]:
    """Return the names of all files of a model directory, of which only `config.json` is read.

    Raises:
        CheckpointError: if it is not ours.
    """
    return (_CONFIG, *read_header(config)["sha256"])


def read_header(path: os.PathLike | str) -> dict[str, Any]:
    """Read the `config.json` of a model directory, whose other files are not looked at.

    Raises:
        CheckpointError: if it is not ours.
    """
    path = pathlib.Path(path)
    try:
        header = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise CheckpointError(f"{path} does not say format {FORMAT!r}")
    if header.get("version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has version {header.get('version')!r}; this code reads "
            f"{FORMAT_VERSION}. Use the release of {FORMAT} that wrote it."
        )
    missing = [k for k in ("kind", "family", "config", "sha256") if k not in header]
    if missing:
        raise CheckpointError(f"{path} lacks the fields {missing}; write it anew")
    hashes = header["sha256"]
    if not isinstance(hashes, dict) or _PARAMS not in hashes:
        raise CheckpointError(f"{path} names no SHA-256 of {_PARAMS}; write it anew")
    # A file of another folder is none of the directory's.
    if odd := [name for name in hashes if pathlib.PurePath(name).name != name]:
        raise CheckpointError(f"{path} names {odd[0]!r}, which is no file of its folder")
    return header


class Checkpoints:
    """The training checkpoints of one run directory.

    Layout: `checkpoints/<step>/` (orbax; one item per tree and the data iterator) and
    `manifests/<step>.json`, the SHA-256 of every file of the step, written before orbax commits the
    step by renaming it. A step without a valid manifest does not count: it is moved to `damaged/`
    and the newest valid one is used.

    All processes of a run call every method together.
    """

    def __init__(
        self, workdir: os.PathLike | str, *, keep: int | None = 2, read_only: bool = False
    ):
        """Open the checkpoints under `workdir`.

        Args:
            workdir: the run's directory.
            keep: how many of the newest steps to keep; all, until `drop`, if `None`.
            read_only: whether to leave the directory exactly as it is, a run that is still being
                written included.
        """
        self._root = pathlib.Path(workdir).absolute()
        self._steps = self._root / "checkpoints"
        self._manifests = self._root / "manifests"
        self._first = jax.process_index() == 0
        self._manager = None
        self._verified: set[int] = set()
        if read_only:
            return
        if self._first:
            self._manifests.mkdir(parents=True, exist_ok=True)
            # Orbax leaves behind what a killed run was writing.
            for leftover in self._steps.glob(f"*{_TEMPORARY}"):
                shutil.rmtree(leftover)
            self._set_aside_invalid()
        multihost_utils.sync_global_devices("checkpoints_verified")
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_manifests),
        )
        self._manager = ocp.CheckpointManager(self._steps, options=options)

    def latest_step(self, items: Sequence[str] = ()) -> int | None:
        """Return the newest step that was committed and verified, or `None`.

        The first process looks, and all take its answer.

        Args:
            items: names of the trees that will be read; only their contents are verified then, and
                that no other file is missing. All of it, if empty.
        """
        found = self._newest_verified(items) if self._first or self._manager is None else None
        if self._manager is None or jax.process_count() == 1:
            return found
        step = multihost_utils.broadcast_one_to_all(np.int32(-1 if found is None else found))
        return None if step < 0 else int(step)

    def _newest_verified(self, items: Sequence[str]) -> int | None:
        for step in reversed(self.steps()):
            if step in self._verified:
                return step
            if self._find_problem(self._steps / str(step), items) is None:
                if not items:
                    self._verified.add(step)
                return step
        return None

    def save(
        self,
        step: int,
        trees: Mapping[str, Any],
        data: Any = None,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        """Start writing a checkpoint; errors of an earlier one surface here.

        Args:
            step: number of updates done.
            trees: named pytrees of global arrays.
            data: the data iterator, with `get_state() → bytes`; `None` if no run is to continue
                from here.
            record: what is to be known of the step, as JSON has it; see `read_record`.
        """
        items: dict[str, Any] = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        if data is not None:
            items["data"] = grain.checkpoint.CheckpointSave(data)
        if record is not None:
            items[_RECORD] = ocp.args.JsonSave(dict(record))
        self._writer().save(step, args=ocp.args.Composite(**items), force=True)

    def restore(self, step: int, abstract: Mapping[str, Any], data: Any = None) -> dict[str, Any]:
        """Read a checkpoint into the shapes, types and shardings of `abstract`.

        Args:
            step: as returned by `latest_step`.
            abstract: named trees of `ShapeDtypeStruct` with shardings.
            data: the data iterator to set to the saved position, with `set_state(bytes)`; not read
                if `None`.

        Raises:
            CheckpointError: if the checkpoint holds other tensors; all differences are listed.
        """
        self._check_same(step, abstract)
        path = self._steps / str(step)
        restored = {}
        with ocp.StandardCheckpointer() as checkpointer:
            for name, tree in abstract.items():
                restored[name] = checkpointer.restore(path / name, tree)
        if data is not None:
            data.set_state(_read_position(path / "data"))
        return restored

    def read_record(self, step: int) -> dict[str, Any]:
        """Return the record that a step was saved with.

        Raises:
            CheckpointError: if it was saved without one.
        """
        path = self._steps / str(step) / _RECORD
        if not path.is_dir():
            raise CheckpointError(f"{path.parent} holds no {_RECORD}; another program wrote it")
        return ocp.JsonCheckpointHandler().restore(path)

    def drop(self, step: int) -> None:
        """Remove a step that is on disk, for good."""
        self._writer().delete(step)
        self._verified.discard(step)
        if self._first:
            (self._manifests / f"{step}.json").unlink(missing_ok=True)

    def steps(self) -> list[int]:
        """Return the steps on disk, verified or not, in ascending order."""
        return sorted(int(p.name) for p in self._steps.glob("*") if p.name.isdigit())

    def item_names(self, step: int) -> list[str]:
        """Return the names of the trees in a checkpoint."""
        return sorted(p.name for p in (self._steps / str(step)).iterdir() if p.is_dir())

    def wait(self) -> None:
        """Wait until the last save is on disk and its manifest written."""
        self._writer().wait_until_finished()

    def _writer(self) -> ocp.CheckpointManager:
        if self._manager is None:
            raise CheckpointError(f"{self._root} was opened read-only")
        return self._manager

    def close(self) -> None:
        """Wait for the last save and release the manager."""
        if self._manager is not None:
            self._manager.wait_until_finished()
            self._manager.close()

    def _check_same(self, step: int, abstract: Mapping[str, Any]) -> None:
        there: dict[str, str] = {}
        for name in set(abstract) & set(self.item_names(step)):
            handler = ocp.StandardCheckpointHandler()
            metadata = handler.metadata(self._steps / str(step) / name)
            there |= _describe(name, getattr(metadata, "tree", metadata))
        here: dict[str, str] = {}
        for name, tree in abstract.items():
            here |= _describe(name, tree)
        differing = [
            f"  {key}: the checkpoint has {there.get(key, 'nothing')}, "
            f"this run has {here.get(key, 'nothing')}"
            for key in sorted(set(there) | set(here))
            if there.get(key) != here.get(key)
        ]
        if differing:
            raise CheckpointError(
                f"checkpoint {self._steps / str(step)} is of another architecture; "
                f"{len(differing)} tensors differ:\n" + "\n".join(differing)
            )

    def _write_manifests(self) -> None:
        """Sum up the step being written; orbax calls this just before it renames the step."""
        if not self._first:
            return
        for path in self._steps.glob(f"*{_TEMPORARY}"):
            sums = {str(p.relative_to(path)): file_sha256(p) for p in _files(path)}
            manifest = self._manifests / f"{path.name.removesuffix(_TEMPORARY)}.json"
            write_text_atomically(manifest, json.dumps(sums, indent=0))
        steps = {p.name.split(".")[0] for p in self._steps.iterdir()}
        for manifest in self._manifests.glob("*.json"):
            if manifest.stem not in steps:
                manifest.unlink()

    def _set_aside_invalid(self) -> None:
        if not self._steps.is_dir():
            return
        for path in sorted(p for p in self._steps.iterdir() if p.name.isdigit()):
            problem = self._find_problem(path)
            if problem is None:
                self._verified.add(int(path.name))
                continue
            target = self._root / "damaged" / path.name
            target.parent.mkdir(exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            path.rename(target)
            (self._manifests / f"{path.name}.json").unlink(missing_ok=True)
            logging.warning("Checkpoint %s is not used (%s); moved to %s", path, problem, target)

    def _find_problem(self, path: pathlib.Path, items: Sequence[str] = ()) -> str | None:
        manifest = self._manifests / f"{path.name}.json"
        try:
            sums = json.loads(manifest.read_text())
        except FileNotFoundError:
            return "its manifest was not written: the run ended while saving"
        except (json.JSONDecodeError, UnicodeDecodeError):
            return "its manifest is damaged"
        if not isinstance(sums, dict) or not sums:
            return "its manifest is damaged"
        try:
            actual = {str(p.relative_to(path)) for p in _files(path)}
            if missing := sorted(set(sums) - actual):
                return f"files are missing: {', '.join(missing[:5])}"
            read = [name for name in sorted(sums) if not items or name.split("/")[0] in items]
            changed = [name for name in read if file_sha256(path / name) != sums[name]]
        except OSError as error:
            return f"it cannot be read: {error}"
        return f"contents differ from the manifest: {', '.join(changed[:5])}" if changed else None


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    """Return the files of a step that hold its contents, not orbax's note of the time."""
    return sorted(p for p in path.rglob("*") if p.is_file() and p.name != "_CHECKPOINT_METADATA")


def _read_position(folder: pathlib.Path) -> bytes:
    """Return the data position, which is the same in every process, however many wrote it."""
    files = sorted(folder.glob("process_*.json"))
    if not files:
        raise CheckpointError(f"{folder} holds no data position; the run cannot continue from it")
    return files[0].read_bytes()


def _describe(name: str, tree: Any) -> dict[str, str]:
    """Map the path of every tensor to its type and shape."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        "/".join([name, *(_key_name(key) for key in path)]): f"{np.dtype(x.dtype)}{list(x.shape)}"
        for path, x in leaves
    }


def _key_name(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))


def write_text_atomically(path: os.PathLike | str, text: str) -> None:
    """Write a small file so that a kill leaves either the old contents or the new."""
    write_bytes_atomically(path, text.encode())


def write_bytes_atomically(path: os.PathLike | str, contents: bytes) -> None:
    """Do as `write_text_atomically`, with bytes."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "wb") as file:
        file.write(contents)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
