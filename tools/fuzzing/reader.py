"""Read pickles in forks of one process that has PyTorch loaded.

The production reader is a fresh process for every file, of which importing torch takes two seconds.
Here one process imports it once and forks for every file; the fork runs the same
`maskgil_jax.convert.torch_io.main` under the same limits, and is judged by the same code.
"""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FAULTS = ("skip_checksums", "unsafe_load", "no_limits")
SPARE_MEMORY, SPARE_SECONDS = 256 << 20, 1


def serve(faults: list[str]) -> None:
    """Answer requests on the standard input, one JSON line each, until it ends.

    What a file may take beyond its size is `SPARE_MEMORY` and `SPARE_SECONDS`, less than in
    production, where the process may have many threads and a slow machine.

    Args:
        faults: those of `FAULTS` to plant.
    """
    import zipfile

    import safetensors.torch
    import torch

    from maskgil_jax.convert import torch_io

    torch_io._SPARE_MEMORY, torch_io._SPARE_SECONDS = SPARE_MEMORY, SPARE_SECONDS
    if "skip_checksums" in faults:
        zipfile.ZipFile.testzip = lambda self: None  # type: ignore[method-assign]
        torch_io._check_storages = lambda state, members: None
    if "unsafe_load" in faults:
        torch_io._load = lambda path: torch.load(path, weights_only=False)
    if "no_limits" in faults:
        limit = torch_io._limit_memory
        torch_io._limit_memory = lambda extra: limit(3 << 30)  # spare the machine
        torch_io._check_tensor = lambda name, tensor: None
        torch_io._check_overlap = lambda state: None
        torch_io._check_storages = lambda state, members: None
    del safetensors
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(_answer(torch_io.main, request)), flush=True)


def _answer(main, request) -> dict:
    with tempfile.TemporaryFile("w+b") as out, tempfile.TemporaryFile("w+b") as err:
        began = time.monotonic()
        pid = os.fork()
        if pid == 0:
            _run_child(main, request["arguments"], out.fileno(), err.fileno())
        late = signal.sigtimedwait([signal.SIGCHLD], request["seconds"]) is None
        if late:
            os.kill(pid, signal.SIGKILL)
        _, status, usage = os.wait4(pid, 0)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read(1 << 20).decode("utf-8", "replace"))
    return {
        "returncode": os.waitstatus_to_exitcode(status),
        "stdout": texts[0],
        "stderr": texts[1],
        "late": late,
        "seconds": time.monotonic() - began,
        "peak_bytes": usage.ru_maxrss * 1024,
    }


def _run_child(main, arguments: list[str], out: int, err: int) -> None:
    status = 1
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdin = open(os.devnull)  # noqa: SIM115
        status = main(arguments)
        sys.stdout.flush()
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}"[:1000].encode("utf-8", "replace"))
    finally:
        os._exit(status)


class Reader:
    """The other end: stands in for `maskgil_jax.convert.files.run_reader`.

    Attributes:
        last: what the last answer said beside its output: `seconds`, `peak_bytes`, `late`.
    """

    def __init__(self, process: subprocess.Popen):
        self._process = process
        self.last: dict = {}

    def __call__(self, arguments: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
        """Have a file read; the arguments are those of `run_reader`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"arguments": arguments, "seconds": seconds}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        self.last = json.loads(self._process.stdout.readline())
        if self.last["late"]:
            raise subprocess.TimeoutExpired(arguments, seconds)
        return subprocess.CompletedProcess(
            arguments, self.last["returncode"], self.last["stdout"], self.last["stderr"]
        )


@contextlib.contextmanager
def start(faults: list[str]) -> Iterator[Reader]:
    """Start the process that forks; it ends with the block."""
    program = Path(__file__).parents[1] / "fuzz_converter.py"
    command = [sys.executable, str(program), "--serve", "--plant", ",".join(faults)]
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        if process.stdout.readline().strip() != "ready":
            raise RuntimeError("the process that reads pickles did not start")
        yield Reader(process)
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()
