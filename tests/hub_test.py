"""Model directories of the hub: read like those on this machine, at one commit, or refused."""

import json
import pathlib
import subprocess
import sys
import time

import fake_hub
import jax
import numpy as np
import pytest
import tiny
import tiny_text
from fake_hub import COMMIT, GATED, NEXT_COMMIT, REPO

from maskgil_jax import checkpoints, load_tokenizer
from maskgil_jax.hub import HubError, HubFile, HubFolder, _explain, find_directory, is_address

VQ = "tokenizers/vq"
# Runs statements one after the other; prints what each printed, or its error.
RUN = """
import contextlib, io, json, sys
for line in sys.argv[1:]:
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            exec(line, globals())
    except Exception as error:
        print(json.dumps(f"{type(error).__name__}: {error}"))
    else:
        print(json.dumps(out.getvalue().strip()))
"""
IMPORTS = "import pathlib; import maskgil_jax; from maskgil_jax import *"


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A folder with `model` and `vq`, directories as the converter writes them."""
    folder = tmp_path_factory.mktemp("local")
    generator = tiny.make_generator(tiny.make_tokenizer_dir(folder / "vq"))
    config = generator.model.config
    checkpoints.write_model_dir(
        folder / "model",
        kind="model",
        family=config.family,
        config=config.to_dict(),
        params=jax.tree.map(np.asarray, generator.model.params),
    )
    gemma = tiny_text.gemma_config()
    checkpoints.write_model_dir(
        folder / "text",
        kind="text-encoder",
        family="gemma",
        config=gemma.to_dict(),
        params=tiny_text.make_params(gemma),
        files=[tiny_text.make_tokenizer_file(folder / "tokenizer.json")],
    )
    return folder


@pytest.fixture
def hub(local):
    """A hub: the model at the top, its tokenizer in a folder, other things beside them."""
    files = {path.name: path.read_bytes() for path in (local / "model").iterdir()}
    files |= {f"{VQ}/{path.name}": path.read_bytes() for path in (local / "vq").iterdir()}
    files |= {"torch/config.json": b"{}", "torch/model.pt": b"?", "torch/model.safetensors": b"?"}
    files |= {"run/run.json": b"{}", "docs/read.md": b"hello", "half/config.json": b"{}"}
    files |= {f"text/{path.name}": path.read_bytes() for path in (local / "text").iterdir()}
    with fake_hub.serve(files, large={"params.safetensors"}) as served:
        yield served


@pytest.fixture
def run(hub, tmp_path):
    """Run statements in a process that knows the hub, or what `changes` name instead."""

    def call(*statements, search=(), **changes):
        changes = {"HF_ENDPOINT": hub.endpoint, "JAX_PLATFORMS": "cpu"} | changes
        child = subprocess.run(
            [sys.executable, "-c", RUN, IMPORTS, *statements],
            env=fake_hub.environment(tmp_path / "hf", [*search, tiny.ROOT], **changes),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert child.returncode == 0, child.stderr
        first, *others = map(json.loads, child.stdout.splitlines())
        assert first == "", first
        return others

    return call


def test_a_generator_comes_from_the_top_of_a_repository_and_from_a_folder(run, local, tmp_path):
    model, vq = f"hf://{REPO}", f"hf://{REPO}/{VQ}"

    def load(path, tokenizer):
        made = f"ImageGenerator.from_checkpoint({path}, tokenizer={tokenizer})"
        return f"g = {made}; print(g.model.fingerprint, g.tokenizer.fingerprint)"

    here, there, short = run(
        load(f"r'{local / 'model'}'", f"r'{local / 'vq'}'"),
        load(f"'{model}@v1'", f"'{vq}/@{COMMIT}'"),
        load(f"pathlib.Path('{model}')", f"pathlib.Path('{vq}')"),
    )
    assert len(here) == 2 * 64 + 1
    assert here == there == short
    # From the cache alone; the address of the tokenizer as a run's configuration has it.
    opened, refused = run(
        f"model = load_model('{model}'); model.run.tokenizer.path = '{vq}'; "
        f"from maskgil_jax import loading; vq = loading.open_tokenizer(model, '{model}'); "
        "print(model.fingerprint, vq.fingerprint)",
        f"load_tokenizer('{model}')",
        HF_HUB_OFFLINE="1",
    )
    assert opened == here
    assert refused == f"ValueError: {model} holds a model, but a tokenizer is needed"
    assert not list(tmp_path.glob("hf:*"))


def test_a_text_encoder_comes_with_its_tokenizer(run, local):
    load = "from maskgil_jax import loading; e = loading.load_text_encoder({!r}, max_length=32)"
    show = "; print(e.name, e.tokenize(['a red dog']).lengths, e.fingerprint)"
    here, there = run(
        load.format(str(local / "text")) + show, load.format(f"hf://{REPO}/text") + show
    )
    assert here.startswith("text [")
    assert here == there


def test_command_lines_take_addresses(run, local, tmp_path):
    model, vq = f"hf://{REPO}", f"hf://{REPO}/{VQ}"
    sample = "from maskgil_jax.sample import sample; sample({!r}, {!r}, tokenizer={!r}, labels=[0])"
    tool = "from tools import {0}; print('status', {0}.main({1!r}))"
    reconstruct = ["--images", "digits", "--num_images", "2", "--out"]
    said = run(
        "import sys; sys.path.insert(0, 'tools')",
        sample.format(model, "hub.npz", vq),
        sample.format(str(local / "model"), "local.npz", str(local / "vq")),
        tool.format("reconstruct", ["--tokenizer", vq, *reconstruct, "hub.png"]),
        tool.format("reconstruct", ["--tokenizer", str(local / "vq"), *reconstruct, "local.png"]),
        tool.format("convert_checkpoint", ["export", "--src", vq, "--dst", "hub.safetensors"]),
        tool.format(
            "convert_checkpoint", ["export", "--src", str(local / "vq"), "--dst", "l.safetensors"]
        ),
        tool.format("convert_checkpoint", ["inspect", "--src", model]),
    )
    assert all(line.endswith("status 0") for line in said[3:]), said
    for one, other in (
        ("hub.npz", "local.npz"),
        ("hub.png", "local.png"),
        ("hub.safetensors", "l.safetensors"),
    ):
        assert (tmp_path / one).read_bytes() == (tmp_path / other).read_bytes()
    assert f"{model}: model directory, params.safetensors sha256" in said[-1]


def test_all_files_are_of_one_commit(hub, run, local, tmp_path):
    newer = {
        name: contents.replace(b'"source": {}', b'"source": {"new": 1}')
        for name, contents in hub.commits[COMMIT].items()
    }
    other = checkpoints.read_model_dir(local / "vq")
    other.params["quantizer"]["codebook"] = other.params["quantizer"]["codebook"] + 1
    fields = {"kind": "tokenizer", "family": other.family, "config": other.config}
    checkpoints.write_model_dir(tmp_path / "new", params=other.params, **fields)
    newer |= {f"{VQ}/{path.name}": path.read_bytes() for path in (tmp_path / "new").iterdir()}

    def move(path):
        if path.endswith("config.json"):
            hub.commits[NEXT_COMMIT], hub.refs["main"] = newer, NEXT_COMMIT

    hub.served = move
    address = f"hf://{REPO}/{VQ}"
    config = f"c = maskgil_jax.config.default(); c.tokenizer.path = '{address}'"
    resolve = "from maskgil_jax import train; print(train._resolve(c).tokenizer.path)"
    old, new, path, kept = run(
        f"print(load_tokenizer('{address}').fingerprint)",
        f"print(load_tokenizer('{address}').fingerprint)",
        f"import maskgil_jax.config; {config}; {resolve}",
        f"c.tokenizer.path = '{address}@v1'; {resolve}; c.tokenizer.path = 'x'; {resolve}",
    )
    folders = (local / "vq", tmp_path / "new")
    assert [old, new] == [load_tokenizer(folder).fingerprint for folder in folders]
    # A run is resumed with the tokenizer that it began with.
    assert path == f"{address}@{NEXT_COMMIT}"
    assert kept.split("\n") == [f"{address}@{COMMIT}", str(tmp_path / "x")]


def test_what_is_no_model_directory_is_said(hub, run):
    def load(address):
        return f"load_model('hf://{address}')"

    cases = {
        "someone/none": "the hub has no repository 'someone/none'",
        GATED: "is gated; accept its terms on the hub and set HF_TOKEN",
        f"{REPO}@v9": "has no revision 'v9'",
        f"{REPO}/none": "it has no config.json (expected config.json and params.safetensors",
        f"{REPO}/docs": "it has no config.json (expected",
        f"{REPO}/half": "it has no params.safetensors (expected",
        f"{REPO}/torch": "it has no params.safetensors, but checkpoints of another program "
        "(model.pt, model.safetensors); convert the one you need, and give DIR: python "
        f"tools/convert_checkpoint.py import --dst DIR --src hf://{REPO}/torch/model.pt",
        f"{REPO}/torch/model.pt@v1": "is a checkpoint file, not a model directory; convert it "
        "first, and give DIR: python tools/convert_checkpoint.py import --dst DIR --src "
        f"hf://{REPO}/torch/model.pt@v1",
        f"{REPO}/run": "is a training run, of which no checkpoint is read from the hub",
        REPO.split("/")[0]: "write hf://owner/repo[/folder][@revision]",
    }
    for said, message in zip(run(*map(load, cases)), cases.values(), strict=True):
        assert said.startswith("HubError: "), said
        assert message in said

    hub.commits[COMMIT]["params.safetensors"] = b"damaged"
    (damaged,) = run(load(REPO))
    assert damaged.startswith("CheckpointError: "), damaged
    assert "the file is damaged or was replaced" in damaged


def test_without_a_connection_the_error_comes_at_once(run):
    began = time.monotonic()
    # Nothing listens there.
    (said,) = run(f"load_tokenizer('hf://{REPO}/{VQ}')", HF_ENDPOINT="http://127.0.0.1:9")
    assert "the hub cannot be reached and the cache has no copy" in said
    assert time.monotonic() - began < 20


def test_without_the_client_the_error_names_the_extra(run, tmp_path):
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "huggingface_hub.py").write_text("raise ImportError\n")
    missing = f"load_model('hf://{REPO}')"
    (said,) = run(missing, search=[tmp_path / "path"])
    assert said.startswith("ImportError: ")
    assert 'pip install "maskgil_jax[hub]"' in said


def test_a_connection_that_breaks_off_is_our_error():
    errors = pytest.importorskip("huggingface_hub.errors")
    # As ReadError and RemoteProtocolError of its HTTP library, which may be no OSError.
    broken = type("Broken", (errors.HfHubHTTPError.__bases__[0],), {})("peer closed connection")
    with (
        pytest.raises(HubError, match="could not be downloaded: peer closed connection"),
        _explain(HubFile(REPO, "one.pt")),
    ):
        raise broken


def test_addresses_of_files():
    file = HubFile.parse("hf://someone/some-model/a/b.pt@refs/pr/1")
    assert (file.repo, file.path, file.revision) == ("someone/some-model", "a/b.pt", "refs/pr/1")
    assert str(file.sibling("c.pt")) == "hf://someone/some-model/a/c.pt@refs/pr/1"
    assert HubFile.parse("hf://someone/some-model/b.pt").sibling("c").path == "c"
    for address in ("hf://a/b", "hf://a/b/", "hf://a/b/../c.pt", "hf://a b/c/d.pt", "http://a/b/c"):
        with pytest.raises(HubError, match="is no file of the hub"):
            HubFile.parse(address)


def test_addresses_of_folders(tmp_path):
    for address, fields in {
        "hf://a/b": ("a/b", None, None),
        "hf://a/b/": ("a/b", None, None),
        "hf://a/b@v1": ("a/b", None, "v1"),
        "hf://a/b/c/d.e/@refs/pr/1": ("a/b", "c/d.e", "refs/pr/1"),
        pathlib.Path("hf://a/b/c@v1"): ("a/b", "c", "v1"),
    }.items():
        assert is_address(address)
        assert HubFolder.parse(address) == HubFolder(*fields)
    assert str(HubFolder.parse(pathlib.Path("hf://a/b/c/@v1"))) == "hf://a/b/c@v1"
    assert str(HubFolder("a/b").file("x")) == "hf://a/b/x"
    for address in ("hf://a", "hf://a/b/../c", "hf://a/b//c", "hf://a/b@", "hf:///a/b", "hf:a/b"):
        with pytest.raises(HubError, match="is no folder of the hub"):
            HubFolder.parse(address)
    assert not any(map(is_address, (tmp_path, "asset:x", "hf", "runs/hf:/x", "")))
    assert find_directory("hf") == pathlib.Path("hf")
