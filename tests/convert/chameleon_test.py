"""Chameleon's checkpoints: shards in, model directories out, and back again."""

import weakref

import numpy as np
import pytest
import tiny_text
from flax.traverse_util import flatten_dict
from goldens_lib import load_golden
from safetensors.numpy import load_file

from maskgil_jax.checkpoints import file_sha256, read_model_dir
from maskgil_jax.convert import ConversionError, export_state_dict, files, import_state_dict
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


@pytest.mark.parametrize("num_kv_heads", [2, 6])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_repository_in_shards_comes_back_bit_for_bit(num_kv_heads, dtype, run, tmp_path):
    config = tiny_text.chameleon_config(num_kv_heads=num_kv_heads, dtype=dtype, param_dtype=dtype)
    index = tiny_text.write_chameleon(tmp_path / "repo", config, shards=3)
    assert run(f"import --src {index} --dst dir")[::2] == (0, "")
    found = read_model_dir(tmp_path / "dir")
    assert (found.kind, found.family) == ("language-model", "chameleon")
    assert found.config == config.to_dict()
    params = tiny_text.make_params(config)
    assert_same(flatten_dict(found.params), flatten_dict(params))
    assert file_sha256(tmp_path / "dir/tokenizer.json") == found.hashes["tokenizer.json"]

    assert run("export --src dir --dst back/model.safetensors")[::2] == (0, "")
    names = {path.name for path in (tmp_path / "back").iterdir()}
    assert names == {"model.safetensors", "config.json", "tokenizer.json"}
    state = load_file(tmp_path / "back/model.safetensors")
    assert_same(state, export_state_dict("chameleon", config, params))
    assert run("import --src back/model.safetensors --dst again")[0] == 0
    again, first = tmp_path / "again/params.safetensors", tmp_path / "dir/params.safetensors"
    assert again.read_bytes() == first.read_bytes()


def test_one_shard_is_open_and_one_tensor_read_at_a_time(run, tmp_path, monkeypatch):
    index = tiny_text.write_chameleon(tmp_path / "repo", tiny_text.chameleon_config(), shards=3)
    readers, arrays, most = set(), [], 0
    read = files.LazyTensor.__array__

    def watch(self, *args, **kwargs):
        nonlocal most
        array = read(self, *args, **kwargs)
        readers.add(id(self.reader))
        arrays.append(weakref.ref(array))
        most = max(most, sum(one() is not None for one in arrays))
        return array

    monkeypatch.setattr(files.LazyTensor, "__array__", watch)
    assert run(f"import --src {index} --dst dir")[0] == 0
    assert len(readers) == 1
    assert len(arrays) == 3 + 3 * 13, "every tensor is read once"
    assert most <= 2, "of what was read before, no more than one tensor is left"


def test_the_encoder_of_images_and_buffers_are_left_out_and_said(caplog):
    golden = load_golden("chameleon_lm_tiny")
    images = [key for key in golden.state_dict if key.startswith("model.vqmodel.")]
    settings = golden.config | {"model_type": "chameleon", "max_position_embeddings": 64}
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8, np.float32)}
    with caplog.at_level("INFO", "maskgil_jax.convert"):
        import_state_dict("chameleon", golden.state_dict | buffer, settings=settings)
    told = f"ignored {len(images)} tensors of the image tokenizer under 'model.vqmodel.'; "
    assert told + "ignored 1 buffers of rotary frequencies" in caplog.text


def test_settings_of_another_model_are_refused():
    config = tiny_text.chameleon_config()
    state = export_state_dict("chameleon", config, tiny_text.make_params(config))
    settings = config.to_hugging_face()

    def attempt(**changes):
        return import_state_dict("chameleon", state, settings=settings | changes)

    assert attempt()[0] == config
    with pytest.raises(ConversionError, match="config.json does, which must lie beside"):
        import_state_dict("chameleon", state)
    with pytest.raises(ConversionError, match="model_type 'gemma'; allowed: 'chameleon'"):
        attempt(model_type="gemma")
    with pytest.raises(ConversionError, match="wrong shape of .*q_norm.weight"):
        attempt(num_attention_heads=12)
    with pytest.raises(ConversionError, match="wrong shape of .*k_proj.weight"):
        attempt(num_key_value_heads=3)
    with pytest.raises(ConversionError, match="missing model.layers.3"):
        attempt(num_hidden_layers=4)
    with pytest.raises(ConversionError, match="what is not implemented: swin_norm is True"):
        attempt(swin_norm=True)


def test_transformers_reads_an_export(run, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = tiny_text.chameleon_config()
    source = tiny_text.write_chameleon(tmp_path / "repo", config)
    assert run(f"import --src {source} --dst dir")[0] == 0
    assert run("export --src dir --dst back/model.safetensors")[0] == 0
    settings = transformers.ChameleonConfig.from_pretrained(tmp_path / "back")
    # The encoder of images is no part of ours; a small one.
    settings.vq_config = transformers.ChameleonVQVAEConfig(
        base_channels=32, channel_multiplier=[1], num_res_blocks=1, latent_channels=8, embed_dim=8
    )
    model = transformers.ChameleonForConditionalGeneration.from_pretrained(
        tmp_path / "back", config=settings, attn_implementation="eager", local_files_only=True
    ).eval()
    ids = np.arange(1, 11, dtype=np.int32)[None]
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(ids.astype(np.int64))).logits
    found = config.make_module().apply({"params": tiny_text.make_params(config)}, ids)
    np.testing.assert_allclose(np.asarray(found), expected.numpy(), atol=1e-4)


def test_an_epsilon_that_transformers_would_not_use_is_refused():
    config = tiny_text.chameleon_config(norm_eps=1e-6)
    with pytest.raises(ConversionError, match="norm_eps is 1e-06, the layout has 1e-05"):
        export_state_dict("chameleon", config, tiny_text.make_params(config))
