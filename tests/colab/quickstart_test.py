"""The notebook, run from its first cell to its last with a smaller model."""

import json
import re
import sys

import nbclient
import nbformat
import pytest
import tiny

NOTEBOOK = tiny.ROOT / "colab" / "quickstart.ipynb"

# Few steps of a narrow model, but many checkpoints: the kill must find one while the run is going.
FLAGS = {
    "model.num_layers": 1,
    "model.width": 32,
    "model.mlp_width": 64,
    "data.cache_copies": 2,
    "training.batch_size": 16,
    "training.num_steps": 160,
    "optimizer.warmup_steps": 5,
    "logging.every": 5,
    "logging.checkpoint_every": 40,
    "logging.sample_every": 0,
    "report.num_samples": 50,
    "report.batch_size": 50,
}


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """A kernel of this interpreter that imports this tree, and nothing from the home directory."""
    spec = tmp_path / "kernels" / "here" / "kernel.json"
    spec.parent.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec.write_text(json.dumps({"argv": argv, "display_name": "here", "language": "python"}))
    for name, value in tiny.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    return "here"


def test_the_notebook_trains_resumes_and_draws(kernel, tmp_path, monkeypatch):
    monkeypatch.setenv("QUICKSTART_WORKDIR", str(tmp_path / "run"))
    monkeypatch.setenv("QUICKSTART_FLAGS", " ".join(f"--config.{k}={v}" for k, v in FLAGS.items()))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    client = nbclient.NotebookClient(
        notebook,
        kernel_name=kernel,
        timeout=300,
        resources={"metadata": {"path": str(NOTEBOOK.parent)}},
    )
    client.execute()
    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    assert "*** killed ***" in text(outputs["train"])
    resumed = re.search(r"resumed from step (\d+)", text(outputs["resume"]))
    assert resumed, text(outputs["resume"])
    assert 0 < int(resumed[1]) < FLAGS["training.num_steps"]
    report = json.loads(text(outputs["resume"]).splitlines()[-1])
    assert report["steps"] == FLAGS["training.num_steps"]
    assert report.keys() >= {"agreement", "precision", "recall", "novelty", "seconds"}
    assert [name for name in outputs if has_picture(outputs[name])] == [
        "progress",
        "sample",
        "python",
    ]


def text(outputs):
    return "".join(output.get("text", "") for output in outputs)


def has_picture(outputs):
    return any("image/png" in output.get("data", {}) for output in outputs)
