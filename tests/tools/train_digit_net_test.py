"""The net of digits learns to read them, and is written as the package reads it."""

import json

import numpy as np
import pytest

from maskgil_jax.checkpoints import read_model_dir
from tools import train_digit_net


def test_one_pass_teaches_something(tmp_path, capsys):
    train_digit_net.main(["--epochs=1", f"--out={tmp_path / 'net'}"])
    printed = json.loads(capsys.readouterr().out)
    stored = read_model_dir(tmp_path / "net")
    assert (stored.kind, stored.family) == ("evaluator", "digit-net")
    assert stored.source["accuracy"] == printed["accuracy"]
    assert printed["accuracy"]["test"] > 0.5  # a tenth by chance
    shipped = read_model_dir("maskgil_jax/assets/digit_net")
    assert {k: v["kernel"].shape for k, v in stored.params.items()} == {
        k: v["kernel"].shape for k, v in shipped.params.items()
    }
    assert all(np.isfinite(layer["kernel"]).all() for layer in stored.params.values())


def test_no_passes_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="--epochs 0 must be at least 1"):
        train_digit_net.main(["--epochs=0", f"--out={tmp_path / 'net'}"])
