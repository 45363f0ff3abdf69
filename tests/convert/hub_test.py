import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from goldens_lib import load_golden

from maskgil_jax.checkpoints import read_model_dir
from maskgil_jax.convert import ConversionError, import_state_dict
from maskgil_jax.convert.files import write_checkpoint
from maskgil_jax.convert.hub import HubFile, _explain

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO, GATED = "someone/some-model", "someone/gated-model"
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


class Hub(http.server.BaseHTTPRequestHandler):
    """The hub's protocol for files: `/owner/repo/resolve/revision/path`."""

    files: dict[str, bytes]
    large: set[str]  # stored under their SHA-256, like Git LFS files

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        body = self.answer()
        if body is not None:
            self.wfile.write(body)

    def answer(self):
        owner, name, resolve, revision, *path = self.path.strip("/").split("/")
        path = "/".join(path)
        error = None
        if f"{owner}/{name}" == GATED:
            error = (403, "GatedRepo")
        elif f"{owner}/{name}" != REPO or resolve != "resolve":
            error = (404, "RepoNotFound")
        elif revision not in ("main", COMMIT, "v1"):
            error = (404, "RevisionNotFound")
        elif path not in self.files:
            error = (404, "EntryNotFound")
        if error:
            self.send_response(error[0])
            self.send_header("X-Error-Code", error[1])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        body = self.files[path]
        kind = hashlib.sha256 if path in self.large else hashlib.sha1
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{kind(body).hexdigest()}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        return body

    def log_message(self, *args):
        pass


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
    handler = type("Handler", (Hub,), {"files": files, "large": {"a/b/one.safetensors"}})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", files
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(tmp_path):
    """Run command lines, one after the other, in a process with the given environment."""

    def call(*commands, search=(), **environment):
        child = subprocess.run(
            [sys.executable, "-c", RUN, *commands],
            env={
                **{k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))},
                "HF_HOME": str(tmp_path / "hf"),
                "PYTHONPATH": os.pathsep.join([*map(str, search), str(ROOT)]),
                **environment,
            },
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


def test_a_connection_that_breaks_off_is_our_error():
    errors = pytest.importorskip("huggingface_hub.errors")
    # As ReadError and RemoteProtocolError of its HTTP library, which may be no OSError.
    broken = type("Broken", (errors.HfHubHTTPError.__bases__[0],), {})("peer closed connection")
    with (
        pytest.raises(ConversionError, match="could not be downloaded: peer closed connection"),
        _explain(HubFile(REPO, "one.pt")),
    ):
        raise broken


def test_without_the_client_the_error_names_the_extra(run, tmp_path):
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "huggingface_hub.py").write_text("raise ImportError\n")
    command = f"{IMPORT} hf://{REPO}/one.safetensors --dst new"
    ((status, _, err),) = run(command, search=[tmp_path / "path"])
    assert (status, 'pip install "maskgil_jax[hub]"' in err) == (1, True)


def test_addresses():
    file = HubFile.parse("hf://someone/some-model/a/b.pt@refs/pr/1")
    assert (file.repo, file.path, file.revision) == ("someone/some-model", "a/b.pt", "refs/pr/1")
    assert str(file.sibling("c.pt")) == "hf://someone/some-model/a/c.pt@refs/pr/1"
    assert HubFile.parse("hf://someone/some-model/b.pt").sibling("c").path == "c"
    for address in ("hf://a/b", "hf://a/b/", "hf://a/b/../c.pt", "hf://a b/c/d.pt", "http://a/b/c"):
        with pytest.raises(ConversionError, match="is no file of the hub"):
            HubFile.parse(address)
