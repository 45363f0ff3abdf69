"""Training from stored tokens: the same as from the images, and refused where they do not fit."""

import json
import re

import jax
import numpy as np
import pytest
import tiny

from maskgil_jax import checkpoints, sharding
from maskgil_jax.build import data as build
from maskgil_jax.data.errors import DatasetError
from maskgil_jax.train import _open_batches, _open_tokenizer, train


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tokenizer, pictures, and their tokens with one and with two crops."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny.make_inputs(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tiny.ROOT / "tools")
        import extract_tokens

        for crops in ("center", "center_flip"):
            flags = {"tokenizer": folder / "tokenizer", "data": "folder", "image_size": 16}
            flags |= {"path": folder / "images", "crops": crops, "out": folder / crops}
            flags |= {"num_shards": 2, "batch_size": 8}
            assert extract_tokens.main([f"--{k}={v}" for k, v in flags.items()]) == 0
    return folder


@pytest.fixture
def config(inputs):
    config = tiny.get_config()
    config.tokenizer.path = str(inputs / "tokenizer")
    config.data.name = "tokens"
    config.data.path = str(inputs / "center")
    config.data.flip = False
    config.training.num_steps = 4
    config.logging.every = 1
    config.logging.checkpoint_every = 2
    return config


def test_a_run_on_tokens_ends_with_samples(config, inputs, tmp_path, capsys):
    config.data.path = str(inputs / "center_flip")
    train(config, tmp_path / "run")
    output = capsys.readouterr().out
    assert json.loads(output.splitlines()[-1])["steps"] == 4
    assert len(re.findall(r"step \d/4 .*?\bloss \d", output)) == 4
    assert (tmp_path / "run" / "samples" / "0000004.png").is_file()


def take_batches(config, count):
    """Return the first batches that a run would train on."""
    sources, mesh = build.make_sources(config), sharding.make_mesh({"data": -1})
    tokenizer = _open_tokenizer(config, sources)
    batches = _open_batches(config, sources, tokenizer, None, mesh)
    return [jax.tree.map(np.asarray, next(batches)) for _ in range(count)]


def test_batches_of_tokens_are_those_of_their_images(config, inputs):
    stored = take_batches(config, 6)
    config.data.path = str(inputs / "center_flip")
    mirrored = take_batches(config, 6)
    config.data.name, config.data.path = "folder", str(inputs / "images")
    encoded = take_batches(config, 6)
    assert stored[0]["tokens"].shape == (8, 4, 4)
    differ = []
    for one, other, either in zip(stored, encoded, mirrored, strict=True):
        np.testing.assert_array_equal(one["tokens"], other["tokens"])
        for batch in (other, either):
            np.testing.assert_array_equal(one["label"], batch["label"])
        assert one["tokens"].dtype == other["tokens"].dtype == np.int32
        differ += (one["tokens"] != either["tokens"]).any((1, 2)).tolist()
    # Half of the records give their mirrored crop.
    assert 12 <= sum(differ) <= 36


BAD_VALUES = {
    "data.flip": (True, r"data.flip True must be False\. Crops and flips are chosen when tokens"),
    "data.shift_px": (1.0, r"data.shift_px 1.0 must be 0.0"),
    "data.scale_range": ((0.9, 1.1), r"data.scale_range \(0.9, 1.1\) must be \(1.0, 1.0\)"),
    "data.split": ("val", r"data.split 'val' must be 'train'"),
    "data.max_bad_images": (1, r"data.max_bad_images 1 must be 0"),
    "data.cache_tokens": (True, r"data.cache_tokens True must be False"),
    "data.path": ("/nowhere", r"/nowhere holds no token records: dataset.json is missing"),
    "data.image_size": ((32, 32), r"data.image_size \(32, 32\) must be \(16, 16\)"),
    "model.grid_size": ((8, 8), r"model.grid_size \(8, 8\) must be \(4, 4\)"),
    "model.codebook_size": (64, r"model.codebook_size 64 must be 32"),
    "model.num_classes": (10, r"model.num_classes 10 must be the dataset's 2"),
    "kind": ("tokenizer", r"data.name 'tokens' is for kind 'maskgil': a tokenizer needs images"),
    "data.name": ("folder", r"data.check_records False is for data.name 'tokens', not 'folder'"),
}


@pytest.mark.parametrize("field", BAD_VALUES)
def test_what_would_be_ignored_or_does_not_fit_is_refused(config, field, tmp_path):
    value, message = BAD_VALUES[field]
    if field == "data.name":
        config.data.check_records = False
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError, match=message):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_tokenizer_is_refused(config, inputs, tmp_path):
    stored = checkpoints.read_model_dir(inputs / "tokenizer")
    stored.params["quantizer"]["codebook"] = np.array(stored.params["quantizer"]["codebook"])
    stored.params["quantizer"]["codebook"][5, 0] += 1e-3
    fields = {"kind": stored.kind, "family": stored.family, "config": stored.config}
    checkpoints.write_model_dir(tmp_path / "other", params=stored.params, **fields)
    config.tokenizer.path = str(tmp_path / "other")
    with pytest.raises(ValueError, match=r"do not fit: they were made by another tokenizer \(llam"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_damage_is_an_error_before_the_first_step(config, inputs, tmp_path):
    folder = tmp_path / "tokens"
    folder.mkdir()
    for path in (inputs / "center").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    victim = folder / "tokens-00001-of-00002.array_record"
    content = bytearray(victim.read_bytes())
    content[len(content) // 3] ^= 1
    victim.write_bytes(content)
    config.data.path = str(folder)
    with pytest.raises(DatasetError, match=r"tokens-00001-of-00002.array_record: its SHA-256"):
        train(config, tmp_path / "run")
    victim.write_bytes(content[:-4])
    config.data.check_records = False
    with pytest.raises(DatasetError, match=r"tokens-00001-of-00002.array_record: it has .* bytes"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
