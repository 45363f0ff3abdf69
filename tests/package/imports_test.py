"""The table of rooms and the rooms they may import, held against the source."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = ROOT / "maskgil_jax"

COMMANDS = ("train", "sample", "evaluate", "app")
FOUNDATIONS = {"config", "masking", "sharding", "checkpoints", "pictures", "cli"}
FOUNDATIONS |= {"editing", "compilation", "processes", "memory"}
ROOMS = {
    "assets": set(),
    **{name: set() for name in FOUNDATIONS},
    **{name: set() for name in ("models", "tokenizers", "data", "text", "speech")},
    "evals": {"sharding"},
    "hub": {"checkpoints"},
    "workdir": {"checkpoints", "config"},
    "bulk": {"stores", "data.token_dataset", "processes", "workdir", "checkpoints"},
    "stores": {"pictures", "data", "checkpoints"},
    "photo_edit": {"generator", "data"},
    "asked": {"loading", "models", "text"},
    "drafts": {"loading", "generation", "programs", "build.models", "models", "tokenizers"}
    | {"text", "decoding", "masking", "lumina", "sharding", "checkpoints", "hub"},
    "lumina": {"models", "text", "decoding", "sharding", "checkpoints", "hub"},
    "training": {"masking"},
    "decoding": {"masking"},
    "convert": {"models", "tokenizers", "text", "evals", "checkpoints", "hub"},
    "build": {"config", "masking", "sharding", "models", "tokenizers", "text", "decoding", "data"}
    | {"training"},
    "report": {"generation", "build", "data", "evals", "text", "tokenizers", "pictures"},
    "monitor": {"evaluation", "generator", "loading", "build.models", "models", "tokenizers"}
    | {"workdir", "masking", "checkpoints", "config"},
    "loading": {"build.models", "models", "tokenizers", "text", "evals", "convert", "checkpoints"}
    | {"hub", "workdir", "config"},
    "programs": {"build.models", "models", "tokenizers", "decoding", "sharding", "pictures"},
    "generation": {"programs", "build.models", "models", "tokenizers", "decoding", "sharding"}
    | {"pictures"},
    "generator": {"build.models", "build.sizes", "models", "tokenizers", "text", "decoding"}
    | {"masking", "generation", "loading", "drafts", "editing", "sharding", "pictures"},
    "evaluation": {"generator", "generation", "loading", "bulk", "workdir", "checkpoints"}
    | {"build.models", "tokenizers", "decoding", "data", "evals", "masking", "sharding"},
}
EVERYTHING = set(ROOMS)
ROOMS |= {name: EVERYTHING for name in COMMANDS}
# The names that the package gives away lazily, spelled out for type checkers.
ROOMS["__init__"] = {"generation", "generator", "loading", "lumina", "decoding", "models"}

# Packages from outside that a room must do without.
FORBIDDEN = {
    "models": {"optax", "ml_collections", "absl"},
    "tokenizers": {"optax", "ml_collections", "absl"},
    "decoding": {"flax", "optax", "ml_collections"},
    "training": {"ml_collections", "grain", "absl"},
    "data": {"ml_collections", "flax"},
    "evals": {"ml_collections", "optax", "absl"},
    "text": {"ml_collections", "optax", "absl"},
    **{name: {"optax", "absl"} for name in ("loading", "generation", "generator")},
    "build": {"absl"},
}


def find_imports(path):
    """Dotted names that a file imports, wherever in it the statement stands."""
    here = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level] if node.level else ()
            source = ".".join([*base, *([node.module] if node.module else [])])
            # `from maskgil_jax import x` may name a module or a value; both spellings count.
            yield from (f"{source}.{alias.name}" for alias in node.names)


def is_module(name):
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def modules():
    """Every source file with its room and what it imports, cut down to modules of the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        names = set(find_imports(path))
        inside = {name for name in names if name.split(".")[0] == "maskgil_jax"}
        inside = {name if is_module(name) else name.rpartition(".")[0] for name in inside}
        yield path, room, inside, {name.split(".")[0] for name in names}


def test_the_walk_sees_the_package():
    found = {path.name: inside for path, _, inside, _ in modules()}
    assert "maskgil_jax.models.transformer" in found["maskgil.py"]
    assert "maskgil_jax.masking" in found["masked.py"]
    assert len(found) > 30


def test_rooms_import_only_what_the_table_allows():
    wrong = []
    for path, room, inside, _ in modules():
        assert room in ROOMS, f"{path}: room {room!r} is not in the table"
        for name in inside:
            target = name.removeprefix("maskgil_jax").removeprefix(".")
            allowed = {room} | ROOMS[room]
            if target and not any(f"{target}.".startswith(f"{entry}.") for entry in allowed):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_nobody_imports_a_command_line():
    for path, room, inside, outside in modules():
        commands = {f"maskgil_jax.{name}" for name in COMMANDS if name != room}
        assert not inside & commands, path
        assert not outside & {"tools", "tests", "configs"}, path


def test_rooms_do_without_the_packages_of_others():
    wrong = [
        f"{path.relative_to(ROOT)} imports {package}"
        for path, room, _, outside in modules()
        for package in outside & FORBIDDEN.get(room, set())
    ]
    assert not wrong, "\n".join(wrong)


def test_torch_is_imported_by_three_files_and_tensorflow_by_none():
    users = {path.name for path, _, _, outside in modules() if "torch" in outside}
    assert users <= {"torch_io.py", "clip_score.py", "transformers_encoder.py"}
    assert not any("tensorflow" in outside for _, _, _, outside in modules())


@pytest.mark.parametrize("room", ["models", "tokenizers", "text", "decoding", "training", "evals"])
def test_importing_a_room_loads_neither_torch_nor_tensorflow(room):
    names = [f"maskgil_jax.{room}.{path.stem}" for path in sorted((PACKAGE / room).glob("*.py"))]
    script = f"""
import importlib, sys
for name in {names!r}:
    importlib.import_module(name)
print(sorted({{'torch', 'tensorflow', 'transformers', 'tokenizers'}} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_importing_the_package_loads_next_to_nothing():
    script = "import sys, maskgil_jax; print(sorted({'jax', 'flax', 'numpy'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
