"""Convert checkpoints between PyTorch files and model directories.

    python tools/convert_checkpoint.py import --family llamagen-vq --src vq_ds16_c2i.pt --dst DIR
    python tools/convert_checkpoint.py export --src DIR --dst FILE.pt

Sizes are inferred from the shapes; what they do not tell is an option. Every problem of a file is
reported at once, and nothing is written unless all of it fits.
"""

import argparse
import contextlib
import logging
import math
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from maskgil_jax import convert
from maskgil_jax.checkpoints import file_sha256, read_model_dir, write_model_dir
from maskgil_jax.convert.files import SUFFIXES, check_suffix, open_checkpoint, write_checkpoint

_OPTIONS = ("num_heads", "grid_size", "cond_rope", "qk_norm", "post_norm")


def parse_grid(text: str) -> tuple[int, int]:
    """Read `16x16` as (rows, columns)."""
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no grid size; write rows x columns: 16x16")
    return int(match.group(1)), int(match.group(2))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of both commands."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    files = f"one of {', '.join(SUFFIXES)}"

    add = commands.add_parser("import", help="PyTorch file -> model directory").add_argument
    add("--family", required=True, choices=convert.FAMILIES, help="whose checkpoint it is")
    add("--src", required=True, type=Path, help=f"checkpoint file, {files}")
    add("--dst", required=True, type=Path, help="model directory to create")
    add("--sha256", help="refuse the file unless it has this SHA-256")
    add("--num_heads", type=int, help="attention heads, where the size is no published one")
    add("--grid_size", type=parse_grid, help="rows x columns of tokens (default 16x16)")
    add("--cond_rope", choices=("zero", "identity"), help="rotary row of the class token")
    add("--qk_norm", choices=("layer", "rms"), help="kind of the query and key norms in the file")
    add("--post_norm", choices=("layer", "rms"), help="kind of the post-norms in the file")

    add = commands.add_parser("export", help="model directory -> PyTorch file").add_argument
    add("--src", required=True, type=Path, help="model directory")
    add("--dst", required=True, type=Path, help=f"file to create, {files}")
    return parser


def import_checkpoint(args: argparse.Namespace) -> None:
    """Convert a PyTorch file into a model directory."""
    family = convert.find_family(args.family)
    if args.dst.exists() and (not args.dst.is_dir() or any(args.dst.iterdir())):
        raise FileExistsError(f"{args.dst} exists and is not empty; choose another path")
    options = {name: getattr(args, name) for name in _OPTIONS if getattr(args, name) is not None}
    with open_checkpoint(args.src, wrappers=family.wrappers, sha256=args.sha256) as checkpoint:
        print(f"{args.src}: sha256 {checkpoint.sha256}")
        print(f"weights under: {checkpoint.weights_under or '(top level)'}")
        config, params = convert.import_state_dict(args.family, checkpoint.state_dict, **options)
    write_model_dir(
        args.dst,
        kind=family.kind,
        family=family.architecture,
        config=config.to_dict(),
        params=params,
        source={
            "file": args.src.name,
            "sha256": checkpoint.sha256,
            "weights_under": checkpoint.weights_under,
            "converted_from": args.family,
        },
    )
    _print_summary(args.family, config, params)
    print(f"wrote {args.dst}")


def export_checkpoint(args: argparse.Namespace) -> None:
    """Convert a model directory into a PyTorch file."""
    check_suffix(args.dst)
    if args.dst.exists():
        raise FileExistsError(f"{args.dst} exists; choose another path or remove it")
    source = read_model_dir(args.src)
    name, config = convert.choose_family(source.family, source.config)
    state = convert.export_state_dict(name, config, source.params)
    write_checkpoint(args.dst, state, wrapper=convert.find_family(name).export_wrapper)
    _print_summary(name, config, source.params)
    print(f"wrote {args.dst}: sha256 {file_sha256(args.dst)}")
    if flags := _import_flags(name, config):
        print(f"the file does not tell everything; import it with: --family {name} {flags}")


def _import_flags(family: str, config: Any) -> str:
    """Return the options that an import of the exported file needs to give the same model."""
    values = {
        name: getattr(config, name)
        for name in convert.find_family(family).options
        if getattr(config, name) != "none"
    }
    if "grid_size" in values:
        values["grid_size"] = "x".join(map(str, values["grid_size"]))
    return " ".join(f"--{name} {value}" for name, value in values.items())


def _print_summary(family: str, config: Any, params: Mapping[str, Any]) -> None:
    print(f"family: {family}")
    print("sizes: " + ", ".join(f"{name} {value}" for name, value in config.to_dict().items()))
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


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return the exit status, 1 after a refusal with its reason on stderr."""
    args = build_parser().parse_args(arguments)
    command = {"import": import_checkpoint, "export": export_checkpoint}[args.command]
    try:
        with _print_log():
            command(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
