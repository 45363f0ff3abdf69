"""Convert checkpoints between PyTorch files and model directories, or look at either.

    python tools/convert_checkpoint.py import --src vq_ds16_c2i.pt --dst DIR
    python tools/convert_checkpoint.py export --src DIR --dst FILE.pt
    python tools/convert_checkpoint.py inspect --src FILE_OR_DIR

A source may lie on the Hugging Face hub: a file `hf://owner/repo/path/in/repo[@revision]`, or a
model directory `hf://owner/repo[/folder][@revision]`. The family is found by the names, shapes and
dtypes of all tensors, or given; sizes are inferred from the shapes; what neither tells is an
option, or in files of the same repository that must lie beside, `config.json` and `tokenizer.json`
of Gemma. Every problem of a file is reported at once, and nothing is written unless all of it fits.
"""

import argparse
import contextlib
import json
import logging
import math
import re
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from maskgil_jax import convert, hub
from maskgil_jax.checkpoints import (
    file_sha256,
    read_model_dir,
    write_bytes_atomically,
    write_model_dir,
)
from maskgil_jax.convert.files import (
    INDEX,
    SUFFIXES,
    Checkpoint,
    check_target,
    open_checkpoint,
    parse_source,
    write_checkpoint,
)
from maskgil_jax.convert.rules import ConversionError
from maskgil_jax.hub import HubFile

_OPTIONS = (
    *("num_heads", "num_classes", "grid_size", "cond_rope", "qk_norm", "post_norm", "text_length"),
    "widen",
)
_STOPPED = 128 + signal.SIGTERM


def parse_grid(text: str) -> tuple[int, int]:
    """Read `16x16` as (rows, columns)."""
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no grid size; write rows x columns: 16x16")
    return int(match.group(1)), int(match.group(2))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    written = f"one of {', '.join(SUFFIXES)}"
    read = f"{', '.join((*SUFFIXES, INDEX))}, or hf://owner/repo/path[@revision]"

    add = commands.add_parser("import", help="PyTorch file -> model directory").add_argument
    add("--src", required=True, help=f"checkpoint file: {read}")
    add("--dst", required=True, type=Path, help="model directory to create")
    add("--heads", help="second file, of the family lpips: the heads beside --src's VGG16")
    _add_file_options(add)

    add = commands.add_parser("export", help="model directory -> PyTorch file").add_argument
    add("--src", required=True, help="model directory, or hf://owner/repo[/folder][@revision]")
    add("--dst", required=True, type=Path, help=f"file to create, {written}")

    command = commands.add_parser("inspect", help="say what a file or model directory holds")
    command.add_argument("--src", required=True, help=f"model directory, or {read}")
    _add_file_options(command.add_argument)
    return parser


def _add_file_options(add: Any) -> None:
    """Add what tells more about a checkpoint file than it tells itself."""
    add("--family", choices=convert.FAMILIES, help="whose checkpoint it is (default: the one fit)")
    add("--sha256", help="refuse the file unless it has this SHA-256")
    add(
        "--widen",
        action="store_true",
        default=None,
        help="take float16 and bfloat16 tensors as the float32 of the same values",
    )
    add("--num_heads", type=int, help="attention heads, where the size is no published one")
    add("--num_classes", type=int, help="classes, where codes and classes share one table")
    add("--grid_size", type=parse_grid, help="rows x columns of tokens, where not 16x16 or square")
    add("--text_length", type=int, help="tokens of a caption, where more than of the null caption")
    add(
        "--cond_rope", choices=("zero", "identity", "diagonal"), help="rotary rows of the condition"
    )
    add("--qk_norm", choices=("layer", "rms"), help="kind of the query and key norms in the file")
    add("--post_norm", choices=("layer", "rms"), help="kind of the post-norms in the file")


def _given_options(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in _OPTIONS if getattr(args, name) is not None}


@contextlib.contextmanager
def _open_source(args: argparse.Namespace) -> Iterator[tuple[str, Checkpoint]]:
    """Open a checkpoint file as one of the family given, or else of the one that fits.

    Yields:
        The family's name and the checkpoint.
    """
    source, name = parse_source(args.src), args.family
    if name is None:
        with open_checkpoint(
            source, wrappers=convert.all_wrappers(), sha256=args.sha256
        ) as checkpoint:
            name = convert.detect_family(checkpoint.state_dict, **_given_options(args)).family
            if checkpoint.weights_under in (*convert.find_family(name).wrappers[:1], ""):
                yield name, checkpoint
                return
    # The family may prefer another entry of the file than the first that any family knows.
    wrappers = convert.find_family(name).wrappers
    with open_checkpoint(source, wrappers=wrappers, sha256=args.sha256) as checkpoint:
        yield name, checkpoint


@contextlib.contextmanager
def _open_heads(args: argparse.Namespace) -> Iterator[Checkpoint | None]:
    """Open the second file of a checkpoint, if there is one."""
    if not args.heads:
        yield None
        return
    wrappers = convert.find_family(args.family).wrappers
    with open_checkpoint(parse_source(args.heads), wrappers=wrappers) as checkpoint:
        _print_file(args.heads, checkpoint)
        yield checkpoint


def import_checkpoint(args: argparse.Namespace) -> None:
    """Convert a PyTorch file into a model directory."""
    if args.dst.exists() and (not args.dst.is_dir() or any(args.dst.iterdir())):
        raise FileExistsError(f"{args.dst} exists and is not empty; choose another path")
    if args.heads and args.family != "lpips":
        raise ValueError(f"--heads {args.heads} is for --family lpips, whose weights are two files")
    with _open_source(args) as (name, checkpoint), _open_heads(args) as heads:
        _print_file(args.src, checkpoint)
        state = _join(checkpoint, heads)
        family = convert.find_family(name)
        options = _given_options(args) | read_settings(family, parse_source(args.src))
        copied = [find_beside(parse_source(args.src), name) for name in family.copied_files]
        config, params = convert.import_state_dict(name, state, **options)
    write_model_dir(
        args.dst,
        kind=family.kind,
        family=family.architecture,
        config=config.to_dict(),
        params=params,
        source={
            "file": args.src if "://" in args.src else Path(args.src).name,
            "sha256": checkpoint.sha256,
            "weights_under": checkpoint.weights_under,
            "converted_from": name,
            **({"heads_sha256": heads.sha256} if heads else {}),
        },
        files=copied,
    )
    _print_summary(name, config.to_dict(), params)
    print(f"wrote {args.dst}")


def _join(checkpoint: Checkpoint, heads: Checkpoint | None) -> Mapping[str, Any]:
    """Return the tensors of both files, none of which may be in both."""
    if heads is None:
        return checkpoint.state_dict
    if both := sorted(checkpoint.state_dict.keys() & heads.state_dict.keys()):
        raise ConversionError(
            f"{len(both)} tensors are in --src and in --heads too: {', '.join(both[:5])}; give the "
            "file of VGG16 and that of the heads"
        )
    return {**checkpoint.state_dict, **heads.state_dict}


def export_checkpoint(args: argparse.Namespace) -> None:
    """Convert a model directory into a PyTorch file."""
    check_target(args.dst)
    if args.dst.exists():
        raise FileExistsError(f"{args.dst} exists; choose another path or remove it")
    directory = hub.find_directory(args.src)
    source = read_model_dir(directory)
    name, config = convert.choose_family(source.family, source.config)
    family = convert.find_family(name)
    beside = _plan_beside(family, config, directory, args.dst.parent)
    state = convert.export_state_dict(name, config, source.params)
    # The weights come last: where they are, all is.
    args.dst.parent.mkdir(parents=True, exist_ok=True)
    for path, contents in beside.items():
        write_bytes_atomically(path, contents)
    write_checkpoint(args.dst, state, wrapper=family.export_wrapper)
    _print_summary(name, config.to_dict(), source.params)
    print(f"wrote {args.dst}: sha256 {file_sha256(args.dst)}")
    for path in beside:
        print(f"wrote {path}")
    if flags := _import_flags(name, config):
        print(f"the file does not tell everything; import it with: --family {name} {flags}")


def find_beside(source: Path | HubFile, name: str) -> Path:
    """Return a local copy of the file of a name that lies beside a checkpoint.

    Raises:
        FileNotFoundError: there is none.
    """
    if isinstance(source, HubFile):
        try:
            return source.sibling(name).download()
        except hub.MissingFileError as error:
            raise FileNotFoundError(str(error)) from error
    path = source.parent / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; the checkpoint does not tell what it does, so copy {name} of the "
            "same repository there"
        )
    return path


def read_settings(family: convert.Family, source: Path | HubFile) -> dict[str, Any]:
    """Return the option `settings` of a family whose checkpoints have a file of them.

    Raises:
        ConversionError: the file is no JSON object.
        FileNotFoundError: there is none.
    """
    if not family.settings_file:
        return {}
    path = find_beside(source, family.settings_file)
    try:
        settings = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ConversionError(f"{path} holds a {type(settings).__name__}, not the model's settings")
    return {"settings": settings}


def _plan_beside(
    family: convert.Family, config: Any, source: Path, folder: Path
) -> dict[Path, bytes]:
    """Return what an export writes beside the weights; a file that is there must be the same."""
    planned = {folder / name: (source / name).read_bytes() for name in family.copied_files}
    if family.write_settings is not None:
        text = json.dumps(family.write_settings(config), indent=2) + "\n"
        planned[folder / family.settings_file] = text.encode()
    for path, contents in planned.items():
        if path.exists() and path.read_bytes() != contents:
            raise FileExistsError(f"{path} exists and is another; choose another folder")
    return planned


def inspect_source(args: argparse.Namespace) -> None:
    """Print what a checkpoint file or a model directory holds, and what does not fit."""
    if _is_directory(args.src):
        _inspect_directory(args)
        return
    options = _given_options(args)
    wrappers = convert.find_family(args.family).wrappers if args.family else convert.all_wrappers()
    with open_checkpoint(
        parse_source(args.src), wrappers=wrappers, sha256=args.sha256
    ) as checkpoint:
        _print_file(args.src, checkpoint)
        _print_tensors(checkpoint.state_dict)
        name = args.family or convert.detect_family(checkpoint.state_dict, **options).family
        # Settings need not be there only to look.
        with contextlib.suppress(FileNotFoundError):
            options |= read_settings(convert.find_family(name), parse_source(args.src))
        fit = convert.fit_family(name, checkpoint.state_dict, **options)
        if fit.problems:
            raise ConversionError(f"the file is not of the family {args.family}:", fit.problems)
        family = convert.find_family(fit.family)
        _, notes = convert.prepare_state_dict(family, checkpoint.state_dict)
    print(*notes, sep="\n", end="\n" if notes else "")
    template = family.abstract_tree(fit.config)
    if "settings" in fit.untold:
        _print_summary(fit.family, {}, template)
        needed = ", ".join((family.settings_file, *family.copied_files))
        print(f"the shapes do not tell heads and constants: an import needs {needed} beside --src")
        return
    guessed = [name for name in family.options if name not in options]
    sizes = {k: v for k, v in fit.config.to_dict().items() if k not in guessed}
    _print_summary(fit.family, sizes, template)
    for name in guessed:
        needed = "an import needs" if name in fit.untold else "an import may be given"
        print(f"the shapes do not tell {name}: {needed} --{name}")


def _is_directory(source: str) -> bool:
    """Return whether a source is a model directory; on the hub, whatever has no file's suffix."""
    if hub.is_address(source):
        return not source.partition("@")[0].endswith((*SUFFIXES, INDEX))
    return Path(source).is_dir()


def _inspect_directory(args: argparse.Namespace) -> None:
    """Print what a model directory holds, and which layout an export would have."""
    if given := [*_given_options(args), *(n for n in ("family", "sha256") if getattr(args, n))]:
        raise ValueError(
            f"{args.src} is a model directory, which tells everything itself; leave out "
            + ", ".join(f"--{name}" for name in given)
        )
    directory = hub.find_directory(args.src)
    found, path = read_model_dir(directory), directory / "params.safetensors"
    print(f"{args.src}: model directory, {path.name} sha256 {file_sha256(path)}")
    for name, value in found.source.items():
        print(f"source {name}: {value}")
    _print_tensors(flatten_dict(found.params, sep="/"))
    print(f"kind: {found.kind}")
    _print_summary(found.family, found.config, found.params)
    name, config = convert.choose_family(found.family, found.config)
    convert.export_state_dict(name, config, found.params)
    print(f"an export has the layout of {name}")


def _import_flags(family: str, config: Any) -> str:
    """Return the options that an import of the exported file needs to give the same model."""
    values = {
        name: getattr(config, name)
        for name in convert.find_family(family).options
        # Settings were written beside the file.
        if name != "settings" and getattr(config, name) != "none"
    }
    if "grid_size" in values:
        values["grid_size"] = "x".join(map(str, values["grid_size"]))
    return " ".join(f"--{name} {value}" for name, value in values.items())


def _print_file(source: str, checkpoint: Checkpoint) -> None:
    print(f"{source}: sha256 {checkpoint.sha256}")
    if len(checkpoint.files) > 1:
        for name, digest in checkpoint.files.items():
            print(f"  {name}: sha256 {digest}")
    print(f"weights under: {checkpoint.weights_under or '(top level)'}")


def _print_tensors(state: Mapping[str, Any]) -> None:
    dtypes = Counter(str(tensor.dtype) for tensor in state.values())
    listed = ", ".join(f"{dtype} ({count})" for dtype, count in sorted(dtypes.items()))
    elements = sum(math.prod(tensor.shape) for tensor in state.values())
    print(f"tensors: {len(state)}, {elements:,} elements, dtypes {listed or 'none'}")


def _print_summary(family: str, sizes: Mapping[str, Any], params: Mapping[str, Any]) -> None:
    print(f"family: {family}")
    if sizes:
        print("sizes: " + ", ".join(f"{name} {value}" for name, value in sizes.items()))
    print(f"parameters: {_count_parameters(params):,}")


def _count_parameters(params: Any) -> int:
    if isinstance(params, Mapping):
        return sum(_count_parameters(child) for child in params.values())
    return math.prod(params.shape)


@contextlib.contextmanager
def _print_log() -> Iterator[None]:
    """Print what the converters log: prefixes removed, buffers ignored."""
    logger, handler = logging.getLogger("maskgil_jax.convert"), logging.StreamHandler(sys.stdout)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
        logger.propagate = True


@contextlib.contextmanager
def _stop_cleanly() -> Iterator[None]:
    """Leave by an exception at SIGTERM, so that temporary files are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(_STOPPED))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return the exit status, 1 after a refusal with its reason on stderr."""
    args = build_parser().parse_args(arguments)
    commands = {
        "import": import_checkpoint,
        "export": export_checkpoint,
        "inspect": inspect_source,
    }
    try:
        with _print_log(), _stop_cleanly():
            commands[args.command](args)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
