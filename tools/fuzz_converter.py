"""Feed damaged and malicious checkpoint files to the importer: one JSON object for each kind.

    python tools/fuzz_converter.py --formats pt,safetensors,hostile --cases 500
    python tools/fuzz_converter.py --full

Every file goes through the import of `tools/convert_checkpoint.py`. It must be refused by a
`ConversionError`, or accepted with the values that the undamaged file has. Where the bytes changed
make another whole file (neither format verifies its contents: a weight of a `.safetensors` file, or
an archive whose checksums were made right), that file's own values may be accepted, under its own
SHA-256. With the SHA-256 of the undamaged file expected, every damaged one must be refused.
Anything else is a violation: code run, another error, other values, output or temporary files left
behind, more memory or time than allowed. The exit status is 1 if there is any.

`--plant` makes the importer faulty on purpose, to see that the violation is found.
"""

import argparse
import contextlib
import dataclasses
import gc
import io
import json
import os
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fuzzing import reader

FULL = {"pt": 10_000, "safetensors": 100_000, "hostile": 2_000}
FORMATS = tuple(FULL)
FAULTS = (*reader.FAULTS, "write_first", "misread", "other_error", "ignore_sha256")
FAMILY = "maskgil-released"
OPTIONS = ("--num_heads", "2", "--grid_size", "2x3")
# Of the process that imports, beyond what it had before the first file.
MOST_MEMORY = 64 << 20
# Of a child that reads a damaged pickle, beyond one that reads the undamaged.
MOST_CHILD_MEMORY = 64 << 20
MOST_SECONDS = 30.0


@dataclasses.dataclass
class Report:
    """What came out of the files of one format."""

    outcomes: Counter = dataclasses.field(default_factory=Counter)
    kinds: Counter = dataclasses.field(default_factory=Counter)
    violations: Counter = dataclasses.field(default_factory=Counter)
    examples: list = dataclasses.field(default_factory=list)
    with_sha256: Counter = dataclasses.field(default_factory=Counter)
    child_peak: int = 0
    longest: float = 0.0

    def violate(self, what: str, kind: str, seed: int, detail: str = "") -> None:
        """Count a violation; the first few are kept as examples."""
        self.violations[what] += 1
        if len(self.examples) < 10:
            self.examples.append({"what": what, "kind": kind, "seed": seed, "detail": detail[:300]})


class Bench:
    """A folder with the undamaged files, and the importer in it.

    Args:
        folder: an empty folder.
        read: stands in for the production's `run_reader`.
        faults: of `FAULTS`, to plant.
    """

    def __init__(self, folder: Path, read: reader.Reader, faults: list[str]):
        import convert_checkpoint
        import numpy as np
        from fuzzing import hostile, mutations

        from maskgil_jax import convert
        from maskgil_jax.convert import files
        from maskgil_jax.models.maskgil import MaskGILConfig

        self.mutations, self.hostile = mutations, hostile
        self.convert, self.files, self.command = convert, files, convert_checkpoint
        self.folder, self.temporary = folder / "work", folder / "tmp"
        self.canary = folder / "canary"
        for made in (self.folder, self.temporary):
            made.mkdir()
        tempfile.tempdir = str(self.temporary)
        self.read = read
        files.run_reader = read
        self.family = convert.find_family(FAMILY)
        layout = dict(self.family.layout)
        config = MaskGILConfig(
            num_layers=1,
            width=16,
            num_heads=2,
            mlp_width=24,
            codebook_size=12,
            num_classes=3,
            grid_size=(2, 3),
            **layout,
        )
        rng = np.random.default_rng(0)
        template = self.family.abstract_tree(config)
        self.params = {p: rng.standard_normal(x.shape, np.float32) for p, x in template.items()}
        self.state = self.convert.export_state_dict(FAMILY, config, self._nest(self.params))
        self.good = {}
        for name in ("good.pt", "good.safetensors"):
            path = folder / name
            files.write_checkpoint(path, self.state, wrapper=self.family.export_wrapper)
            self.good[path.suffix[1:]] = path.read_bytes()
        self.weights = hostile.Weights(self.state, self.family.export_wrapper)
        self.parser = convert_checkpoint.build_parser()
        self.sources: dict[str, str] = {}
        for suffix in ("pt", "safetensors"):
            outcome, detail, values = self.run(self.good[suffix], suffix, None)
            if outcome != "accepted" or not self._equal(values, self.params):
                raise RuntimeError(f"the undamaged .{suffix} file is not imported: {detail}")
            self.sources[suffix] = detail
            self.sweep(accepted=True)
        self.child_base = read.last["peak_bytes"]
        _plant(faults, self)

    @staticmethod
    def _nest(leaves: dict[str, Any]) -> dict[str, Any]:
        from flax.traverse_util import unflatten_dict

        return unflatten_dict(leaves, sep="/")

    @staticmethod
    def _equal(one: dict[str, Any], two: dict[str, Any]) -> bool:
        return one.keys() == two.keys() and all(
            one[key].dtype == two[key].dtype
            and one[key].shape == two[key].shape
            and one[key].tobytes() == two[key].tobytes()
            for key in one
        )

    def run(self, data: bytes, suffix: str, sha256: str | None) -> tuple[str, str, Any]:
        """Import a file; what it leaves behind is not looked at.

        Returns:
            ("accepted", the SHA-256 that was printed, values), ("refused", why, None), or the name
            and text of another error.
        """
        import safetensors.numpy

        source, target = self.folder / f"src.{suffix}", self.folder / "dst"
        source.write_bytes(data)
        options = [*OPTIONS, *(("--sha256", sha256) if sha256 else ())]
        arguments = ["--src", str(source), "--dst", str(target), "--family", FAMILY, *options]
        args = self.parser.parse_args(["import", *arguments])
        out = io.StringIO()
        try:
            with contextlib.redirect_stdout(out):
                self.command.import_checkpoint(args)
        except self.convert.ConversionError as error:
            return "refused", str(error), None
        except BaseException as error:
            return type(error).__name__, str(error), None
        values = safetensors.numpy.load_file(target / "params.safetensors")
        digest = out.getvalue().split("sha256 ", 1)[1][:64]
        return "accepted", digest, values

    def sweep(self, accepted: bool) -> list[str]:
        """Remove what a case left in the folders; return what should not have been there."""
        odd = []
        for path in [*self.folder.iterdir(), *self.temporary.iterdir()]:
            if path.name.startswith("src.") and path.parent == self.folder:
                path.unlink()
                continue
            if not (accepted and path.name == "dst"):
                odd.append(str(path.name))
            _remove(path)
        return odd

    def expected(self, case: Any, suffix: str) -> Any:
        """Return the values of another whole file, True if any are right, None if it is not one."""
        if suffix == "safetensors":
            state = self.mutations.read_safetensors(case.data)
        elif not case.repaired:
            return None
        elif case.kind == "archive pickle":
            return True
        else:
            state = self._read_archive(case.data)
        if state is None:
            return None
        try:
            _, params = self.convert.import_state_dict(FAMILY, state, num_heads=2, grid_size=(2, 3))
        except self.convert.ConversionError:
            return None
        from flax.traverse_util import flatten_dict

        return flatten_dict(params, sep="/")

    def _read_archive(self, data: bytes) -> Any:
        """Read the weights of an archive whose pickle is the undamaged one."""
        import numpy as np

        members = self.mutations.read_members(data)
        state = {}
        for i, (key, value) in enumerate(self.state.items()):
            content = next((c for n, c in members.items() if n.endswith(f"/data/{i}")), b"")
            if len(content) < value.nbytes:
                return None
            state[key] = np.frombuffer(content[: value.nbytes], np.float32).reshape(value.shape)
        return state


def _remove(path: Path) -> None:
    if path.is_dir():
        for child in path.iterdir():
            _remove(child)
        path.rmdir()
    else:
        path.unlink()


def _plant(faults: list[str], bench: Bench) -> None:
    """Make the importer faulty."""
    command: Any = bench.command
    files: Any = bench.files
    if "write_first" in faults:
        open_source = command._open_source

        def write_first(args):
            args.dst.mkdir()
            return open_source(args)

        command._open_source = write_first
    if "misread" in faults:
        right = files.LazyTensor.__array__

        def misread(self, dtype=None, copy=None):
            return right(self, dtype, copy)[::-1]

        files.LazyTensor.__array__ = misread
    if "other_error" in faults:
        files.safetensors.SafetensorError = KeyError
    if "ignore_sha256" in faults:
        open_checkpoint = command.open_checkpoint
        command.open_checkpoint = lambda source, *, wrappers, sha256: open_checkpoint(
            source, wrappers=wrappers
        )


def make_case(bench: Bench, name: str, seed: int) -> tuple[Any, str]:
    """Return a case of a format and the suffix of its file."""
    if name == "hostile":
        kind, data = bench.hostile.write_hostile(bench.weights, seed, str(bench.canary))
        return bench.mutations.Case(kind, data), "pt"
    mutate = {"pt": "mutate_pickle", "safetensors": "mutate_safetensors"}[name]
    return getattr(bench.mutations, mutate)(bench.good[name], seed), name


def try_case(bench: Bench, report: Report, name: str, seed: int) -> None:
    """Try one file in both modes and add to the report."""
    case, suffix = make_case(bench, name, seed)
    report.kinds[case.kind] += 1
    began = time.monotonic()
    bench.read.last = {}
    outcome, detail, values = bench.run(case.data, suffix, None)
    took = time.monotonic() - began
    _judge(bench, report, case, suffix, seed, (outcome, detail, values))
    peak = bench.read.last.get("peak_bytes", 0) - bench.child_base
    report.child_peak = max(report.child_peak, peak)
    report.longest = max(report.longest, took)
    if took > MOST_SECONDS or bench.read.last.get("late"):
        report.violate("time", case.kind, seed, f"{took:.1f} s")
    spare = reader.SPARE_MEMORY if name == "hostile" else MOST_CHILD_MEMORY
    if peak > spare + 4 * len(case.data):
        report.violate("memory", case.kind, seed, f"{peak >> 20} MiB")
    if case.data != bench.good[suffix]:
        outcome, detail, _ = bench.run(case.data, suffix, bench.sources[suffix])
        report.with_sha256[outcome] += 1
        if outcome != "refused":
            report.violate(f"with sha256: {outcome}", case.kind, seed, detail)
        bench.sweep(outcome == "accepted")


def _judge(
    bench: Bench, report: Report, case: Any, suffix: str, seed: int, result: tuple[str, str, Any]
) -> None:
    """Count an outcome, or the violation that it is."""
    outcome, detail, values = result
    if bench.canary.exists():
        report.violate("code run", case.kind, seed)
        _remove(bench.canary)
    if odd := bench.sweep(outcome == "accepted"):
        report.violate("partial output", case.kind, seed, ", ".join(odd))
    if outcome == "refused":
        report.outcomes["refused"] += 1
    elif outcome != "accepted":
        report.violate(f"error {outcome}", case.kind, seed, detail)
    elif bench._equal(values, bench.params):
        report.outcomes["accepted, values of the undamaged file"] += 1
    else:
        expected = bench.expected(case, suffix)
        same = detail == bench.sources[suffix]
        if expected is None or same:
            report.violate("silently wrong values", case.kind, seed)
        elif expected is not True and not bench._equal(values, expected):
            report.violate("values that the file does not have", case.kind, seed)
        else:
            report.outcomes["accepted as another file, under another SHA-256"] += 1


def run_format(bench: Bench, name: str, seeds: range) -> dict[str, Any]:
    """Try the files of a format; return the report as JSON-friendly types."""
    report, began = Report(), time.monotonic()
    gc.collect()
    base = _peak_memory(reset=True)
    for seed in seeds:
        try_case(bench, report, name, seed)
    growth = _peak_memory() - base
    if growth > MOST_MEMORY:
        report.violate("memory of the importer", "all", 0, f"{growth >> 20} MiB")
    return {
        "format": name,
        "cases": len(seeds),
        "first_seed": seeds.start,
        "outcomes": dict(sorted(report.outcomes.items())),
        "with_sha256": dict(report.with_sha256),
        "violations": dict(report.violations),
        "examples": report.examples,
        "kinds": dict(sorted(report.kinds.items())),
        "importer_growth_mib": round(growth / 2**20, 1),
        "reader_growth_mib": round(report.child_peak / 2**20, 1),
        "longest_seconds": round(report.longest, 2),
        "seconds": round(time.monotonic() - began, 1),
    }


def _peak_memory(reset: bool = False) -> int:
    """Return the peak of this process's resident memory in bytes, since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


@contextlib.contextmanager
def _limited_memory(extra: int) -> Iterator[None]:
    """Let this process map only so many more bytes."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + extra, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def run(
    cases: dict[str, int], *, first_seed: int, faults: list[str], say: Callable[[str], Any]
) -> bool:
    """Try files of every format; return whether there was no violation."""
    served = [fault for fault in faults if fault in reader.FAULTS]
    clean = True
    with (
        tempfile.TemporaryDirectory(prefix="fuzz_") as folder,
        reader.start(served) as read,
    ):
        bench = Bench(Path(folder), read, faults)
        with _limited_memory(1 << 30):
            for name, count in cases.items():
                result = run_format(bench, name, range(first_seed, first_seed + count))
                say(json.dumps(result))
                clean = clean and not result["violations"]
    return clean


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--formats", default=",".join(FORMATS), help=f"of {', '.join(FORMATS)}")
    add("--cases", default="500", help="files of each, or one number for each, separated by commas")
    add("--full", action="store_true", help=f"as many as {FULL}")
    add("--first_seed", type=int, default=0, help="of the cases; each is made from its own")
    add("--plant", default="", help=f"make the importer faulty in these ways: {', '.join(FAULTS)}")
    add("--serve", action="store_true", help=argparse.SUPPRESS)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run; return 1 after a violation."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    faults = args.plant.split(",") if args.plant else []
    if unknown := set(faults) - set(FAULTS):
        parser.error(f"faults {sorted(unknown)} are unknown; allowed: {', '.join(FAULTS)}")
    if args.serve:
        reader.serve(faults)
        return 0
    names, counts = args.formats.split(","), args.cases.split(",")
    if unknown := set(names) - set(FORMATS):
        parser.error(f"formats {sorted(unknown)} are unknown; allowed: {', '.join(FORMATS)}")
    if not all(c.isdecimal() for c in counts) or len(counts) not in (1, len(names)):
        parser.error(f"--cases {args.cases}: one number, or one for each of {len(names)} formats")
    counts = counts * len(names) if len(counts) == 1 else counts
    cases = {
        name: FULL[name] if args.full else int(c) for name, c in zip(names, counts, strict=True)
    }
    if sys.platform != "linux":
        parser.error("memory is measured and limited as Linux does it; run it there")
    sys.path.insert(0, str(reader.ROOT))
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    clean = run(
        cases,
        first_seed=args.first_seed,
        faults=faults,
        say=lambda line: print(line, flush=True),
    )
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
