"""A Hugging Face hub on this machine, with one repository and one that is gated."""

import contextlib
import hashlib
import http.server
import json
import os
import threading

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NEXT_COMMIT = "fedcba9876543210fedcba9876543210fedcba98"
REPO, GATED = "someone/some-model", "someone/gated-model"


class Handler(http.server.BaseHTTPRequestHandler):
    """The hub's protocol for files, `/owner/repo/resolve/revision/path`, and for lists of them."""

    hub: "Hub"

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        body = self.answer()
        if body is not None:
            self.wfile.write(body)
            self.hub.served(self.path)

    def answer(self):
        address = self.path.partition("?")[0].strip("/").removeprefix("api/models/")
        owner, name, task, revision, *path = [*address.split("/"), "", "", ""]
        commit, path = self.hub.refs.get(revision, revision), "/".join(path).strip("/")
        files = self.hub.commits.get(commit)
        error, body = None, None
        if f"{owner}/{name}" == GATED:
            error = (403, "GatedRepo")
        elif f"{owner}/{name}" != REPO or task not in ("resolve", "tree"):
            error = (404, "RepoNotFound")
        elif files is None:
            error = (404, "RevisionNotFound")
        elif task == "tree":
            body = self.list_folder(files, path)
        else:
            body = files.get(path)
        if error or body is None:
            error = error or (404, "EntryNotFound")
            self.send_response(error[0])
            self.send_header("X-Error-Code", error[1])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        kind = hashlib.sha256 if path in self.hub.large else hashlib.sha1
        self.send_response(200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{kind(body).hexdigest()}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        return body

    def list_folder(self, files, path):
        prefix = f"{path}/" if path else ""
        rest = [name.removeprefix(prefix) for name in files if name.startswith(prefix)]
        entry = {"size": 1, "oid": "0" * 40}
        entries = [{"type": "file", "path": f"{prefix}{n}"} | entry for n in rest if "/" not in n]
        folders = sorted({name.split("/")[0] for name in rest if "/" in name})
        entries += [{"type": "directory", "path": f"{prefix}{n}"} | entry for n in folders]
        return json.dumps(entries).encode() if entries else None

    def log_message(self, *args):
        pass


class Hub:
    """What a fake hub holds.

    Attributes:
        commits: commit -> path -> contents.
        refs: branch or tag -> commit.
        large: paths of files that are stored under their SHA-256, like Git LFS files.
        served: called with the address of every file that was sent.
        endpoint: address of the hub.
    """

    def __init__(self, files, large=()):
        self.commits = {COMMIT: dict(files)}
        self.refs = {"main": COMMIT, "v1": COMMIT}
        self.large = set(large)
        self.served = lambda path: None


@contextlib.contextmanager
def serve(files, large=()):
    """Yield a `Hub` that answers until the block ends."""
    hub = Hub(files, large)
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def environment(home, search=(), **changes):
    """Return an environment whose hub and cache are none of the user's."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    path = os.pathsep.join(map(str, search))
    return kept | {"HF_HOME": str(home), "PYTHONPATH": path} | changes
