import json
import pathlib
import re
import shutil
import signal
import socket
import subprocess

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny

import maskgil_jax
from maskgil_jax import checkpoints, workdir
from maskgil_jax.build.models import MODELS
from maskgil_jax.models.base import ClassModelConfig
from maskgil_jax.train import train
from maskgil_jax.training.loop import NonFiniteError


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return folder, tiny.make_inputs(folder)


@pytest.fixture
def config(inputs):
    folder, _ = inputs
    config = tiny.get_config()
    config.tokenizer.path = str(folder / "tokenizer")
    config.data.path = str(folder / "images")
    config.training.num_steps = 4
    return config


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """A run of 12 steps that nothing disturbed, on one device."""
    path = tmp_path_factory.mktemp("finished") / "run"
    result = tiny.run(*inputs[1], f"--workdir={path}")
    assert result.returncode == 0, result.stderr
    return path, result.stdout


def final_state(path: pathlib.Path, step: int = 12) -> dict[str, np.ndarray]:
    """Read every tensor of a checkpoint as it lies on disk."""
    trees = {}
    with ocp.PyTreeCheckpointer() as reader:
        for name in ("params", "ema", "progress"):
            folder = path / "checkpoints" / str(step) / name
            metadata = reader.metadata(folder).item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata)
            trees[name] = reader.restore(folder, restore_args=as_numpy)
    leaves = jax.tree_util.tree_flatten_with_path(trees)[0]
    return {jax.tree_util.keystr(key): np.asarray(value) for key, value in leaves}


def losses(output: str) -> dict[int, float]:
    return {int(a): float(b) for a, b in re.findall(r"step (\d+)/\d+ .*?\bloss (\S+)", output)}


def tree_bytes(path: pathlib.Path) -> dict[str, bytes]:
    files = (p for p in path.rglob("*") if p.is_file() and p.name != "lock")
    return {str(p): p.read_bytes() for p in files}


def test_a_run_leaves_a_picture_curves_and_a_json_line(finished):
    path, output = finished
    assert (path / "samples" / "0000012.png").is_file()
    assert list((path / "tensorboard").glob("events*"))
    assert json.loads(output.splitlines()[-1])["steps"] == 12
    assert losses(output).keys() == {2, 4, 6, 8, 10, 12}
    for word in ("accuracy", "output_norm", "images/s", "ETA", "learning_rate"):
        assert word in output


def test_killed_runs_end_with_the_same_bits(inputs, finished, tmp_path):
    path, resumed = tmp_path / "run", []
    arguments = [*inputs[1], f"--workdir={path}", "--config.logging.every=1"]
    for stop in ("step 9/", "step 11/"):
        with subprocess.Popen(
            tiny.command(*arguments),
            env=tiny.environment(),
            cwd=tiny.ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process:
            for line in process.stdout:
                resumed += re.findall(r"resumed from step (\d+)", line)
                if line.startswith(stop):
                    process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
    result = tiny.run(*arguments)
    assert result.returncode == 0, result.stderr
    resumed += re.findall(r"resumed from step (\d+)", result.stdout)
    # Saving step 8 has waited for step 4 to be on disk; its own save the kill may have cut short.
    assert len(resumed) == 2
    assert set(resumed) <= {"4", "8"}
    expected, actual = final_state(finished[0]), final_state(path)
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=name)


def test_two_processes_compute_what_one_does(inputs, finished, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    arguments = [
        *inputs[1],
        f"--workdir={tmp_path / 'run'}",
        f"--coordinator=localhost:{port}",
        "--num_processes=2",
    ]
    processes = [
        subprocess.Popen(
            tiny.command(*arguments, f"--process_id={index}"),
            env=tiny.environment(),
            cwd=tiny.ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "step" not in outputs[1][0]
    one, two = losses(finished[1]), losses(outputs[0][0])
    assert one.keys() == two.keys()
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=2e-3)
    expected, actual = final_state(finished[0]), final_state(tmp_path / "run")
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    "family", [name for name, kind in MODELS.items() if issubclass(kind, ClassModelConfig)]
)
def test_a_damaged_checkpoint_is_set_aside_and_the_run_still_ends_alike(
    config, family, tmp_path, capsys
):
    tiny.set_family(config, family)
    config.training.num_steps, config.logging.checkpoint_every = 6, 2
    train(config, tmp_path / "whole")
    config.training.num_steps = 4
    train(config, tmp_path / "run")
    victim = max((tmp_path / "run/checkpoints/4/params").rglob("*"), key=lambda p: p.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    config.training.num_steps = 6
    train(config, tmp_path / "run")
    assert "resumed from step 2" in capsys.readouterr().out
    assert (tmp_path / "run/damaged/4").is_dir()
    expected, actual = final_state(tmp_path / "whole", 6), final_state(tmp_path / "run", 6)
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=name)


@pytest.mark.parametrize(("item", "expected"), [("progress", 12), ("ema", 8)])
def test_loading_verifies_what_it_reads(finished, tmp_path, item, expected):
    shutil.copytree(finished[0], tmp_path / "run")
    files = (tmp_path / "run/checkpoints/12" / item).rglob("*")
    victim = max(files, key=lambda path: path.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-1] + b"\0")
    loaded = maskgil_jax.load_model(tmp_path / "run")
    kept = final_state(finished[0], expected)
    np.testing.assert_array_equal(
        loaded.params["head"]["kernel"], kept["['ema']['head']['kernel']"]
    )


def test_loaded_model_and_tokenizer_work_together(inputs, finished):
    model = maskgil_jax.load_model(finished[0])
    tokenizer = maskgil_jax.load_tokenizer(inputs[0] / "tokenizer")
    assert tokenizer.spec.codebook_size == model.config.codebook_size
    tokens = tokenizer.encode(np.zeros((2, 16, 16, 3), np.float32))
    logits = model.logits(tokens, np.array([0, model.config.num_classes]))
    assert logits.shape == (2, 16, 33)
    assert logits.dtype == np.float32
    # The average of the parameters is what is loaded.
    np.testing.assert_array_equal(
        model.params["head"]["kernel"], final_state(finished[0])["['ema']['head']['kernel']"]
    )
    with pytest.raises(ValueError, match=r"label 3 is out of range; allowed: 0 to 2"):
        model.logits(tokens, np.array([0, 3]))
    with pytest.raises(ValueError, match=r"token 34 is out of range"):
        model.logits(np.full((1, 4, 4), 34), np.array([0]))


def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(config, tmp_path):
    config.optimizer.learning_rate = 1e30
    config.optimizer.clip_norm = 0.0
    config.logging.every, config.logging.checkpoint_every = 3, 1
    config.training.num_steps = 12
    with pytest.raises(NonFiniteError, match=r"not finite in steps .*learning_rate"):
        train(config, tmp_path / "run")
    for step in (tmp_path / "run" / "checkpoints").glob("[0-9]*"):
        assert all(np.isfinite(x).all() for x in final_state(tmp_path / "run", step.name).values())


BAD_VALUES = {
    "training.batch_size": (6, r"training.batch_size 6 is not divisible by 4"),
    "model.grid_size": ((8, 8), r"model.grid_size \(8, 8\) must be \(4, 4\)"),
    "model.codebook_size": (64, r"model.codebook_size 64 must be the tokenizer's 32"),
    "model.num_classes": (10, r"model.num_classes 10 must be the dataset's 2"),
    "training.mask_schedule": ("arcos", r"mask_schedule 'arcos'.*Did you mean 'arccos'"),
    "sampler.schedule": ("cosin", r"schedule 'cosin'.*Did you mean 'cosine'"),
    "sampler.num_steps": (17, r"num_steps 17 is out of range; allowed: 1 to 16"),
    "data.split": ("val", r"val"),
    "data.name": ("folders", r"data.name 'folders'.*Did you mean 'folder'"),
    "data.path": ("/nowhere", r"/nowhere"),
    "tokenizer.path": ("/nowhere", r"/nowhere"),
    "mesh.tensor": (3, r"devices"),
    "seed": (-1, r"seed -1 is out of range"),
    "logging.keep_checkpoints": (0, r"logging.keep_checkpoints 0 must be at least 1"),
    "report.batch_size": (0, r"report.batch_size 0 must be at least 1"),
    "report.name": ("digits", r"report.name 'digits' needs data.name 'digits'"),
    "data.cache_copies": (2, r"data.cache_copies 2 needs data.cache_tokens true"),
    "model.attention": ("cudnn", r"attention 'cudnn' needs"),
    "kind": ("tokeniser", r"kind 'tokeniser'.*Did you mean 'tokenizer'"),
    "optimizer.rate_schedule": ("linear", r"rate_schedule 'linear' is unknown; allowed: constant"),
    "model.rope": ("3d", r"rope '3d' is unknown; allowed: 2d, 1d"),
}


@pytest.mark.parametrize("field", BAD_VALUES)
def test_bad_values_are_named_before_anything_is_written(config, field, tmp_path):
    value, message = BAD_VALUES[field]
    config.update_from_flattened_dict({field: value})
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_zero_steps_and_a_truncated_image_are_named(config, inputs, tmp_path):
    config.sampler.num_steps = 0
    with pytest.raises(ValueError, match="num_steps 0 is out of range; allowed: 1 or more"):
        train(config, tmp_path / "run")
    config.sampler.num_steps = 2
    images = tiny.make_image_folder(tmp_path / "images", count=8)
    for victim in (images / "train").rglob("*.png"):
        victim.write_bytes(victim.read_bytes()[:200])
    config.data.path = str(images)
    with pytest.raises(ValueError, match=r"\.png"):
        train(config, tmp_path / "run")


def test_a_workdir_of_another_run_is_left_alone(config, finished):
    before = tree_bytes(finished[0])
    config.model.width, config.training.num_steps = 64, 12
    with pytest.raises(ValueError, match=r"another configuration:\s+model.width: 32 → 64"):
        train(config, finished[0])
    assert tree_bytes(finished[0]) == before


def test_a_checkpoint_of_another_architecture_lists_every_tensor(config, tmp_path):
    train(config, tmp_path / "run")
    config.model.mlp_width = 96
    checkpoints.write_text_atomically(
        tmp_path / "run" / workdir.RUN_CONFIG, maskgil_jax.config.to_json(config)
    )
    config.training.num_steps = 6
    with pytest.raises(checkpoints.CheckpointError) as error:
        train(config, tmp_path / "run")
    for name in ("params/transformer/layers/mlp/down/kernel", "ema/transformer/layers/mlp/gate_up"):
        assert name in str(error.value)
    assert "float32[1, 64, 32], this run has float32[1, 96, 32]" in str(error.value)


def test_the_command_line_ends_with_one_line_and_a_status(inputs, tmp_path):
    result = tiny.run(*inputs[1], f"--workdir={tmp_path / 'run'}", "--config.model.widht=8")
    assert result.returncode != 0
    assert "width" in result.stderr.splitlines()[-1]
    result = tiny.run(*inputs[1], f"--workdir={tmp_path / 'run'}", "--config.model.width=33")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: width 33")
    assert not (tmp_path / "run").exists()
