import argparse
import pickle
import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from maskgil_jax.convert import ConversionError, files, torch_io

torch = pytest.importorskip("torch")


@pytest.fixture
def extract(tmp_path, monkeypatch, capsys):
    """Run the child's program here, its limits only noted: (status, output, what was read)."""
    limits, times = [], []
    monkeypatch.setattr(torch_io, "_limit_memory", limits.append)
    monkeypatch.setattr(torch_io, "_limit_time", times.append)

    def run(path, *wrappers):
        out = tmp_path / "out.safetensors"
        status = torch_io.main([str(path), str(out), *(wrappers or ("model",))])
        if status != torch_io.EXIT_REFUSED:
            assert limits.pop() == (1 << 30) + 4 * path.stat().st_size
            assert times.pop() == 10 + path.stat().st_size / 2e7
        read = safetensors.numpy.load_file(out) if out.exists() else None
        return status, capsys.readouterr().out, read

    return run


def saved(tmp_path, value, **options):
    path = tmp_path / "some.pt"
    torch.save(value, path, **options)
    return path


def rewrite(path, change=lambda name, data: data, compression=zipfile.ZIP_STORED):
    """Write the archive again with its members changed."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, change(name, data))
    return path


class RunsCode:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_tensors_of_every_dense_layout_are_read_right(tmp_path, extract):
    whole = torch.randn(6, 4)
    state = {
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "transposed": torch.randn(5, 7).t(),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "first_rows": whole[:2],
        "last_rows": whole[2:],
        "half": torch.randn(3).half(),
    }
    status, output, read = extract(saved(tmp_path, {"model": state, "steps": 3}))
    assert (status, output) == (0, "")
    assert read.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(read[name], tensor.detach().numpy(), err_msg=name)


def test_the_first_wrapper_that_holds_a_dict_is_taken(tmp_path, extract):
    one, two = {"w": torch.ones(1)}, {"w": torch.zeros(1)}
    path = saved(tmp_path, {"model": two, "ema": one, "optimizer": {"state": {0: 1}}})
    assert extract(path, "ema", "model")[2]["w"] == 1
    assert extract(path, "model", "ema")[2]["w"] == 0
    status, output, _ = extract(path, "state_dict")
    assert status == torch_io.EXIT_REFUSED
    assert "no weights under state_dict; its entries are: 'model', 'ema', 'optimizer'" in output
    assert extract(saved(tmp_path, one), "ema", "model")[2]["w"] == 1


HUGE = (100_000, 100_000)
REFUSED = {
    "huge": ({"w": torch.zeros(1).expand(HUGE)}, "repeats elements"),
    "strided": ({"w": torch.zeros(8)[::2]}, "skips or repeats"),
    "same": (dict.fromkeys("ab", torch.zeros(4)), "'a' and 'b' share memory"),
    "overlap": ({"a": (whole := torch.zeros(6))[:4], "b": whole[3:]}, "'a' and 'b' share memory"),
    "sparse": ({"w": torch.eye(3).to_sparse()}, "'w' is sparse"),
    "number": ({"w": 3}, "of type int"),
    "meta": ({"w": torch.zeros(3, device="meta")}, "without data"),
    "negated": ({"w": torch.zeros(3, dtype=torch.complex64).conj().imag}, "negated"),
    "key": ({3: torch.zeros(1)}, "key 3 is no string"),
    "namespace": ({"w": argparse.Namespace(lr=1)}, r"more than tensors \(argparse.Namespace\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_anything_but_plain_tensors_is_refused(case, tmp_path, extract):
    state, message = REFUSED[case]
    path = saved(tmp_path, {"model": state})
    assert path.stat().st_size < 4096
    status, output, read = extract(path)
    assert (status, read) == (torch_io.EXIT_REFUSED, None)
    assert len(output.splitlines()) == 1
    assert re.search(message, output)


@pytest.mark.parametrize("shape", [(2, 3), (1 << 14, 1 << 13)])
def test_tensors_that_are_not_in_the_file_are_refused(shape, tmp_path, extract):
    """`torch.Tensor(2, 3)` is allowed in a pickle, and holds whatever was in memory."""

    class Unfilled:
        def __reduce__(self):
            return torch.Tensor, shape

    status, output, read = extract(
        saved(tmp_path, {"model": {"a": torch.ones(3), "w": Unfilled()}})
    )
    assert (status, read) == (torch_io.EXIT_REFUSED, None)
    assert "'w' has values that are not in the file" in output


def test_a_pickle_with_code_runs_none_of_it(tmp_path, extract):
    marker = tmp_path / "marker"
    path = saved(tmp_path, {"model": RunsCode(marker)})
    status, output, _ = extract(path)
    assert status == torch_io.EXIT_REFUSED
    assert "could run code" in output
    assert not marker.exists()
    with zipfile.ZipFile(path) as archive:
        pickle.loads(archive.read("some/data.pkl"))
    assert marker.exists()


def test_damaged_archives_are_refused(tmp_path, extract):
    path = saved(tmp_path, {"model": {"w": torch.arange(1000.0)}})
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(np.float32(777).tobytes())] ^= 1
    for data, message in (
        (whole[: len(whole) // 2], "truncated"),
        (whole[:-1], "truncated"),
        (bytes(flipped), "checksum"),
        (b"", "not a zip archive"),
    ):
        path.write_bytes(data)
        status, output, read = extract(path)
        assert (status, message in output, read) == (torch_io.EXIT_REFUSED, True, None)


def test_archives_that_torch_never_writes_are_refused(tmp_path, extract):
    state = {"model": {"w": torch.arange(4.0)}}
    path = rewrite(saved(tmp_path, state), compression=zipfile.ZIP_DEFLATED)
    assert "compressed" in extract(path)[1]
    path = saved(tmp_path, state, _use_new_zipfile_serialization=False)
    assert "before torch 1.6" in extract(path)[1]

    path = saved(tmp_path, state)
    data = bytearray(path.read_bytes())
    # In the directory, 8 bytes before the name of the member: its attributes.
    data[data.rindex(b"some/data/0") - 8] |= 0x10
    path.write_bytes(data)
    assert "members marked as folders" in extract(path)[1]

    def declare_more(name, data):
        return data.replace(b"K\x04", b"M\xff\x7f") if name.endswith("data.pkl") else data

    path = rewrite(saved(tmp_path, state), declare_more)
    assert "does not match expected size" in extract(path)[1]
    assert extract(rewrite(saved(tmp_path, state)))[0] == 0


def test_the_memory_limit_holds():
    program = (
        "from maskgil_jax.convert.torch_io import _limit_memory\n"
        "import sys\n"
        "_limit_memory(64 << 20)\n"
        "bytearray(int(sys.argv[1]) << 20)\n"
    )
    for mebibytes, message in ((16, ""), (256, "MemoryError")):
        command = [sys.executable, "-c", program, str(mebibytes)]
        child = subprocess.run(command, capture_output=True, text=True, check=False)
        assert child.stderr.strip().endswith(message)
        assert bool(child.stderr) == bool(message)


def test_the_time_limit_holds():
    program = (
        "from maskgil_jax.convert.torch_io import _limit_time\n_limit_time(0.5)\nwhile True: pass\n"
    )
    child = subprocess.run([sys.executable, "-c", program], check=False, timeout=60)
    assert child.returncode == -signal.SIGXCPU


def test_a_reason_is_neither_long_nor_raw(tmp_path, extract):
    status, output, _ = extract(saved(tmp_path, {"model": {"w" * 100_000: 3}}))
    assert (status, len(output) < 5000) == (torch_io.EXIT_REFUSED, True)
    status, output, _ = extract(saved(tmp_path, {"model": {"\x1b[2J": 3}}))
    assert (status, "\x1b" in output) == (torch_io.EXIT_REFUSED, False)


def test_the_child_process_reports_its_refusal(tmp_path):
    path = saved(tmp_path, [torch.zeros(3)])
    with (
        pytest.raises(ConversionError, match=r"some\.pt: the file holds a list"),
        files.open_checkpoint(path, wrappers=("model",)),
    ):
        pass
