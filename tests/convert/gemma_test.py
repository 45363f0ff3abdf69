"""Gemma's checkpoints: published layouts in, model directories out, and back again."""

import json
import weakref

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_text
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from maskgil_jax.checkpoints import file_sha256, read_model_dir
from maskgil_jax.convert import (
    ConversionError,
    detect_family,
    export_state_dict,
    files,
    import_state_dict,
)
from tools import convert_checkpoint


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run a command line in tmp_path: (exit status, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def call(command):
        status = convert_checkpoint.main(command.split())
        return status, *capsys.readouterr()

    return call


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].dtype == two[name].dtype, name
        np.testing.assert_array_equal(one[name], two[name])


@pytest.mark.parametrize("generation", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_repository_in_shards_comes_back_bit_for_bit(generation, dtype, run, tmp_path):
    config = tiny_text.gemma_config(generation, param_dtype=dtype)
    index = tiny_text.write_repository(tmp_path / "repo", config, shards=3)
    status, out, err = run(f"import --src {index} --dst dir")
    assert (status, err) == (0, "")
    assert "removed the prefix 'model.' from every key" in out
    found = read_model_dir(tmp_path / "dir")
    assert (found.kind, found.family) == ("text-encoder", "gemma")
    assert found.config == config.to_dict()
    params = tiny_text.make_params(config)
    assert_same(flatten_dict(found.params), flatten_dict(params))
    assert found.hashes["tokenizer.json"] == file_sha256(tmp_path / "repo/tokenizer.json")
    assert file_sha256(tmp_path / "dir/tokenizer.json") == found.hashes["tokenizer.json"]

    status, out, err = run("export --src dir --dst back/model.safetensors")
    assert (status, err) == (0, "")
    names = {path.name for path in (tmp_path / "back").iterdir()}
    assert names == {"model.safetensors", "config.json", "tokenizer.json"}
    state = load_file(tmp_path / "back/model.safetensors")
    assert_same(state, export_state_dict(tiny_text.family_of(config), config, params))
    assert run("import --src back/model.safetensors --dst again")[0] == 0
    again, first = tmp_path / "again/params.safetensors", tmp_path / "dir/params.safetensors"
    assert again.read_bytes() == first.read_bytes()


@pytest.mark.parametrize("generation", [1, 2])
def test_transformers_reads_an_export(generation, run, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = tiny_text.gemma_config(generation)
    source = tiny_text.write_repository(tmp_path / "repo", config)
    assert run(f"import --src {source} --dst dir")[0] == 0
    assert run("export --src dir --dst back/model.safetensors")[0] == 0
    model = transformers.AutoModel.from_pretrained(
        tmp_path / "back", attn_implementation="eager", local_files_only=True
    ).eval()
    ids = np.arange(1, 11, dtype=np.int32)[None]
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(ids.astype(np.int64))).last_hidden_state
    module = config.make_module()
    found = module.apply({"params": tiny_text.make_params(config)}, ids, np.array([10]))
    np.testing.assert_allclose(np.asarray(found), expected.numpy(), atol=1e-4)


def test_one_file_is_open_and_one_tensor_read_at_a_time(run, tmp_path, monkeypatch):
    config = tiny_text.gemma_config()
    index = tiny_text.write_repository(tmp_path / "repo", config, shards=3)
    opened, arrays, most = [], [], 0
    read = files.LazyTensor.__array__

    def watch(self, *args, **kwargs):
        nonlocal most
        array = read(self, *args, **kwargs)
        opened.append((self.path, self.reader))
        arrays.append(weakref.ref(array))
        most = max(most, sum(one() is not None for one in arrays))
        return array

    monkeypatch.setattr(files.LazyTensor, "__array__", watch)
    assert run(f"import --src {index} --dst dir")[0] == 0
    assert len({path for path, _ in opened}) == 3
    assert len({id(reader) for _, reader in opened}) == 1
    weights = json.loads(index.read_text())["weight_map"]
    assert len(opened) == len(weights), "every tensor is read once"
    assert most <= 2, "of what was read before, no more than one tensor is left"


def test_a_head_and_old_buffers_are_left_out_and_said(caplog):
    config = tiny_text.gemma_config(1)
    params = tiny_text.make_params(config)
    state = {f"model.{k}": v for k, v in export_state_dict("gemma", config, params).items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    with caplog.at_level("INFO", "maskgil_jax.convert"):
        found, back = import_state_dict("gemma", state, settings=config.to_hugging_face())
    assert found == config
    assert_same(flatten_dict(back), flatten_dict(params))
    assert "ignored the head of the language model" in caplog.text
    assert "ignored 1 buffers of rotary frequencies" in caplog.text


def test_the_type_of_the_weights_is_kept_unless_widened():
    narrow = tiny_text.gemma_config(2, param_dtype="bfloat16")
    params = tiny_text.make_params(narrow)
    state, settings = export_state_dict("gemma2", narrow, params), narrow.to_hugging_face()
    assert import_state_dict("gemma2", state, settings=settings)[0] == narrow
    wide, back = import_state_dict("gemma2", state, settings=settings, widen=True)
    assert wide.param_dtype == "float32"
    expected = {k: v.astype(np.float32) for k, v in flatten_dict(params).items()}
    assert_same(flatten_dict(back), expected)
    state["norm.weight"] = state["norm.weight"].astype(np.float32)
    with pytest.raises(ConversionError, match="dtype of norm.weight: float32, expected bfloat16"):
        import_state_dict("gemma2", state, settings=settings)
    halves = {key: value.astype(np.float16) for key, value in state.items()}
    with pytest.raises(ConversionError, match="gemma2 would fit, but tensors are float16"):
        detect_family(halves)


def test_settings_of_another_model_are_refused():
    config = tiny_text.gemma_config(2)
    state = export_state_dict("gemma2", config, tiny_text.make_params(config))
    settings = config.to_hugging_face()

    def attempt(**changes):
        import_state_dict("gemma2", state, settings=settings | changes)

    with pytest.raises(ConversionError, match="config.json does, which must lie beside"):
        import_state_dict("gemma2", state)
    with pytest.raises(ConversionError, match="model_type 'gemma3'; allowed: gemma, gemma2"):
        attempt(model_type="gemma3")
    with pytest.raises(ConversionError, match="model_type 'gemma', but .* those of 'gemma2'"):
        attempt(model_type="gemma")
    with pytest.raises(ConversionError, match=r"wrong shape of layers.0.self_attn.q_proj.weight"):
        attempt(num_attention_heads=8)
    with pytest.raises(ConversionError, match=r"missing layers.3"):
        attempt(num_hidden_layers=4, layer_types=None)
    with pytest.raises(ConversionError, match=r"unexpected layers.2"):
        attempt(num_hidden_layers=2, layer_types=None)
    # Other heads of the same shapes fit: nothing but the file tells.
    attempt(num_attention_heads=8, num_key_value_heads=4, head_dim=4)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_file_that_is_not_beside_the_weights_is_named(name, run, tmp_path):
    source = tiny_text.write_repository(tmp_path / "repo", tiny_text.gemma_config())
    (tmp_path / "repo" / name).unlink()
    status, _, err = run(f"import --src {source} --dst dir")
    assert status == 1
    assert f"{name} is missing; " in err
    assert not (tmp_path / "dir").exists()


def test_damage_is_refused_and_nothing_written(run, tmp_path):
    config = tiny_text.gemma_config()
    index = tiny_text.write_repository(tmp_path / "repo", config, shards=2)
    (tmp_path / "repo/config.json").write_text("[]")
    status, _, err = run(f"import --src {index} --dst dir")
    assert (status, "holds a list, not the model's settings" in err) == (1, True)
    (tmp_path / "repo/config.json").write_text("{")
    assert "is not valid JSON" in run(f"import --src {index} --dst dir")[2]
    (tmp_path / "repo/config.json").write_text(json.dumps(config.to_hugging_face()))
    shard = tmp_path / "repo/model-00002-of-00002.safetensors"
    held = load_file(shard)
    save_file({key: held[key] for key in sorted(held)[1:]}, shard)
    status, _, err = run(f"import --src {index} --dst dir")
    assert (status, "model-00002-of-00002.safetensors lacks model." in err) == (1, True)
    shard.unlink()
    assert "missing model-00002-of-00002.safetensors" in run(f"import --src {index} --dst dir")[2]
    assert not (tmp_path / "dir").exists()


def test_inspect_tells_with_and_without_settings(run, tmp_path):
    source = tiny_text.write_repository(tmp_path / "repo", tiny_text.gemma_config())
    status, out, err = run(f"inspect --src {source}")
    assert (status, err) == (0, "")
    assert "num_heads 4, num_kv_heads 2, head_dim 8" in out
    (tmp_path / "repo/config.json").unlink()
    status, out, err = run(f"inspect --src {source}")
    assert (status, err) == (0, "")
    assert "family: gemma2" in out
    assert "num_heads" not in out
    assert "an import needs config.json, tokenizer.json beside --src" in out
    assert run("import --src repo/model.safetensors --dst dir")[0] == 1


def test_an_export_overwrites_nothing_else(run, tmp_path):
    source = tiny_text.write_repository(tmp_path / "repo", tiny_text.gemma_config())
    assert run(f"import --src {source} --dst dir")[0] == 0
    (tmp_path / "config.json").write_text("mine")
    status, _, err = run("export --src dir --dst model.safetensors")
    assert (status, "config.json exists and is another; choose another folder" in err) == (1, True)
    assert (tmp_path / "config.json").read_text() == "mine"
    assert not (tmp_path / "model.safetensors").exists()
    assert not (tmp_path / "tokenizer.json").exists()


def test_bfloat16_goes_through_pickles(run, tmp_path):
    torch = pytest.importorskip("torch")
    config = tiny_text.gemma_config(1, param_dtype="bfloat16")
    source = tiny_text.write_repository(tmp_path / "repo", config)
    assert run(f"import --src {source} --dst dir")[0] == 0
    assert run("export --src dir --dst back/model.pt")[0] == 0
    saved = torch.load(tmp_path / "back/model.pt", weights_only=True)["state_dict"]
    assert saved["norm.weight"].dtype == torch.bfloat16
    expected = export_state_dict("gemma", config, tiny_text.make_params(config))
    for key, tensor in saved.items():
        found = tensor.float().numpy()
        np.testing.assert_array_equal(found, np.asarray(jnp.asarray(expected[key]), np.float32))
    assert run("import --src back/model.pt --dst again")[0] == 0
    assert read_model_dir(tmp_path / "again").config == config.to_dict()
