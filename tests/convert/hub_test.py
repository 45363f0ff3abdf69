import hashlib
import json
import subprocess
import sys
from pathlib import Path

import fake_hub
import numpy as np
import pytest
from fake_hub import COMMIT, GATED, REPO
from flax.traverse_util import flatten_dict
from goldens_lib import load_golden

from maskgil_jax.checkpoints import read_model_dir
from maskgil_jax.convert import import_state_dict
from maskgil_jax.convert.files import write_checkpoint

ROOT = Path(__file__).parents[2]
IMPORT = "import --family maskgil-released --num_heads 2 --src"
RUN = """
import contextlib, io, json, sys
from tools import convert_checkpoint
for line in sys.argv[1:]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = convert_checkpoint.main(line.split())
    print(json.dumps([status, out.getvalue(), err.getvalue()]))
"""


@pytest.fixture(scope="module")
def released():
    return load_golden("maskgil_released_tiny").state_dict


@pytest.fixture(scope="module")
def hub(released, tmp_path_factory):
    """A hub on this machine: (address, its files)."""
    torch = pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("hub")
    write_checkpoint(folder / "one.safetensors", released, wrapper="")
    names = sorted(released)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2])):
        shard = f"part-{i + 1}-of-2.safetensors"
        write_checkpoint(folder / shard, {key: released[key] for key in part}, wrapper="")
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "parts.safetensors.index.json").write_text(json.dumps(index))
    tensors = {key: torch.from_numpy(value) for key, value in released.items()}
    torch.save({"model_state_dict": tensors}, folder / "one.pt")
    (folder / "config.json").write_text("{}")
    files = {f"a/b/{path.name}": path.read_bytes() for path in folder.iterdir()}
    with fake_hub.serve(files, large={"a/b/one.safetensors"}) as served:
        yield served.endpoint, files


@pytest.fixture
def run(tmp_path):
    """Run command lines, one after the other, in a process with the given environment."""

    def call(*commands, search=(), **environment):
        child = subprocess.run(
            [sys.executable, "-c", RUN, *commands],
            env=fake_hub.environment(tmp_path / "hf", [*search, ROOT], **environment),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert child.returncode == 0, child.stderr
        return [json.loads(line) for line in child.stdout.splitlines()]

    return call


def assert_imported(folder, released):
    _, params = import_state_dict("maskgil-released", released, num_heads=2)
    expected, found = flatten_dict(params), flatten_dict(read_model_dir(folder).params)
    assert expected.keys() == found.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(found[path], leaf)


def test_files_of_the_hub_are_imported_and_kept(hub, released, run, tmp_path):
    endpoint, files = hub
    source = f"hf://{REPO}/a/b"
    digest = hashlib.sha256(files["a/b/one.safetensors"]).hexdigest()
    parts = [n for n in sorted(files) if "part" in n]
    lines = "".join(f"{hashlib.sha256(files[n]).hexdigest()}  {Path(n).name}\n" for n in parts)
    lines = hashlib.sha256(lines.encode()).hexdigest()
    one, two, three, four, five = run(
        f"{IMPORT} {source}/one.safetensors --dst one --sha256 {digest}",
        f"{IMPORT} {source}/one.pt@v1 --dst two",
        f"{IMPORT} {source}/parts.safetensors.index.json@{COMMIT} --dst three --sha256 {lines}",
        f"{IMPORT} {source}/one.safetensors --dst four --sha256 {'0' * 64}",
        f"inspect --src {source}/parts.safetensors.index.json",
        HF_ENDPOINT=endpoint,
    )
    for result, folder in ((one, "one"), (two, "two"), (three, "three")):
        assert (result[0], result[2]) == (0, "")
        assert_imported(tmp_path / folder, released)
    assert read_model_dir(tmp_path / "two").source["file"] == f"{source}/one.pt@v1"
    assert (four[0], f"SHA-256 {digest}, expected 000" in four[2]) == (1, True)
    assert not (tmp_path / "four").exists()
    assert five[0] == 0
    assert "family: maskgil-released" in five[1]
    assert (
        f"part-1-of-2.safetensors: sha256 {hashlib.sha256(files[parts[0]]).hexdigest()}" in five[1]
    )

    blob = (tmp_path / "hf").rglob(digest)
    next(blob).write_bytes(files["a/b/one.safetensors"][:-1] + b"!")
    again, damaged = run(
        f"{IMPORT} {source}/one.pt --dst again",
        f"{IMPORT} {source}/one.safetensors --dst damaged",
        HF_HUB_OFFLINE="1",
    )
    assert again[0] == 0
    assert (damaged[0], "the copy in the cache is damaged" in damaged[2]) == (1, True)
    assert not (tmp_path / "damaged").exists()


def test_what_the_hub_does_not_give_is_said(hub, run, tmp_path):
    endpoint, _ = hub
    cases = {
        f"hf://{REPO}/none.safetensors": "someone/some-model has no file 'none.safetensors'",
        f"hf://{REPO}/a/b/one.safetensors@v9": "has no revision 'v9'",
        "hf://someone/none/one.safetensors": "the hub has no repository 'someone/none'",
        f"hf://{GATED}/one.safetensors": "is gated; accept its terms on the hub and set HF_TOKEN",
        f"hf://{REPO}/a/b/config.json": "has the suffix '.json'; allowed: .pt",
        f"hf://{REPO}": "write hf://owner/repo/path/in/repo[@revision]",
    }
    results = run(*(f"{IMPORT} {source} --dst new" for source in cases), HF_ENDPOINT=endpoint)
    for (status, _, err), message in zip(results, cases.values(), strict=True):
        assert (status, err.count("\n"), message in err) == (1, 1, True), err
    command = f"{IMPORT} hf://{REPO}/a/b/one.safetensors --dst new"
    ((status, _, err),) = run(command, HF_HUB_OFFLINE="1")
    assert (status, "the hub cannot be reached and the cache has no copy" in err) == (1, True)
    assert not (tmp_path / "new").exists()


def test_without_the_client_the_error_names_the_extra(run, tmp_path):
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "huggingface_hub.py").write_text("raise ImportError\n")
    command = f"{IMPORT} hf://{REPO}/one.safetensors --dst new"
    ((status, _, err),) = run(command, search=[tmp_path / "path"])
    assert (status, 'pip install "maskgil_jax[hub]"' in err) == (1, True)
