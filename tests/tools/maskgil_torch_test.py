"""An exported checkpoint gives the same logits and tokens in PyTorch."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from goldens_lib import load_golden

from maskgil_jax import masking
from maskgil_jax.checkpoints import write_model_dir
from maskgil_jax.convert import export_state_dict, find_family, import_state_dict
from maskgil_jax.convert.files import write_checkpoint
from maskgil_jax.decoding import masked
from maskgil_jax.models.maskgil import MaskGIL, MaskGILConfig
from tools import convert_checkpoint

torch = pytest.importorskip("torch", reason="a PyTorch model: pip install .[torch]")
ROOT = pathlib.Path(__file__).parents[2]
SIZES = dict(num_layers=2, width=32, num_heads=2, mlp_width=48, codebook_size=20, num_classes=5)
VARIANTS = {
    "paper": ({"cond_rope": "zero"}, "pt"),
    "identity": ({"cond_rope": "identity"}, "safetensors"),
    "norms": ({"qk_norm": "layer", "post_norm": "rms", "cond_rope": "identity"}, "safetensors"),
    "other norms": ({"qk_norm": "rms", "post_norm": "layer", "cond_rope": "zero"}, "pth"),
    "released": (dict(find_family("maskgil-released").layout), "pt"),
}


@pytest.fixture(scope="module")
def peer():
    """The file on its own, as it may be copied elsewhere."""
    path = ROOT / "tools" / "maskgil_torch.py"
    spec = importlib.util.spec_from_file_location("maskgil_torch_alone", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_imports_nothing_of_this_repository():
    source = (ROOT / "tools" / "maskgil_torch.py").read_text()
    imports = [line for line in source.splitlines() if line.lstrip().startswith(("import", "from"))]
    assert not any("maskgil_jax" in line for line in imports)


@pytest.fixture(params=VARIANTS)
def both(request, peer, tmp_path):
    """Our config and parameters, and the PyTorch model of the exported file with its options."""
    fields, suffix = VARIANTS[request.param]
    config = MaskGILConfig(**SIZES, grid_size=(3, 4), **fields)
    template = find_family("maskgil").abstract_tree(config)
    rng = np.random.default_rng(0)
    leaves = {
        path: rng.standard_normal(leaf.shape, np.float32) / 4 for path, leaf in template.items()
    }
    params = unflatten_dict(leaves, sep="/")
    write_model_dir(
        tmp_path / "model", kind="model", family="maskgil", config=config.to_dict(), params=params
    )
    path = tmp_path / f"exported.{suffix}"
    command = ["export", "--src", str(tmp_path / "model"), "--dst", str(path)]
    assert convert_checkpoint.main(command) == 0
    options = {"num_heads": 2, "grid_size": (3, 4)}
    norms = {name: fields.get(name, "none") for name in ("qk_norm", "post_norm")}
    options |= {name: kind for name, kind in norms.items() if kind != "none"}
    if fields["cond_rope"] != "table":
        options["cond_rope"] = fields["cond_rope"]
    return config, params, path, options


def our_tokens(config, params, labels, sampler):
    def logits_fn(tokens, labels):
        grid = tokens.reshape(-1, *config.grid_size)
        return MaskGIL(config).apply({"params": params}, grid, labels)

    @jax.jit
    def run(labels):
        return masked.decode(
            logits_fn,
            jnp.full((len(labels), config.seq_len), config.mask_token_id),
            labels,
            jnp.full_like(labels, config.null_label),
            masked.image_keys(0, np.arange(len(labels))),
            sampler,
            mask_token_id=config.mask_token_id,
        )[0]

    return np.asarray(run(jnp.asarray(labels))).reshape(-1, *config.grid_size)


def test_logits_and_greedy_tokens_of_an_exported_file_are_ours(both, peer):
    config, params, path, options = both
    model = peer.load_model(path, **options)
    rng = np.random.default_rng(1)
    tokens = rng.integers(config.codebook_size + 1, size=(3, 3, 4), dtype=np.int32)
    labels = np.array([3, 0, config.null_label], np.int32)
    ours = MaskGIL(config).apply({"params": params}, tokens, labels)
    with torch.inference_mode():
        theirs = model(torch.from_numpy(tokens).long(), torch.from_numpy(labels).long())
    np.testing.assert_allclose(theirs, ours, atol=1e-4)
    assert np.ptp(ours) > 1
    sampler = masked.SamplerConfig(num_steps=5, temperature=0.0, gumbel_temperature=0.0)
    greedy, _ = peer.generate(
        model, torch.tensor([1, 4]), num_steps=5, temperature=0, gumbel_temperature=0
    )
    np.testing.assert_array_equal(greedy, our_tokens(config, params, [1, 4], sampler))


@pytest.mark.parametrize("run", range(4))
def test_greedy_decoding_is_that_of_the_released_code(run, peer, tmp_path):
    golden = load_golden("maskgil_released_tiny_greedy8")
    weights = load_golden("maskgil_released_tiny").state_dict
    config, params = import_state_dict("maskgil-released", weights, num_heads=2, grid_size=(16, 16))
    state = export_state_dict("maskgil-released", config, params)
    write_checkpoint(tmp_path / "golden.safetensors", state, wrapper="")
    model = peer.load_model(tmp_path / "golden.safetensors", num_heads=2)
    settings = golden.config["runs"][run]
    _, history = peer.generate(
        model,
        torch.tensor([settings["label"]]),
        schedule=settings["schedule"],
        guidance_scale=1 + settings["w"],
        temperature=0,
        gumbel_temperature=0,
    )
    codes, still_masked = golden.arrays["codes"][run], golden.arrays["masked"][run]
    expected = np.where(still_masked, config.mask_token_id, codes).reshape(8, 16, 16)
    np.testing.assert_array_equal(torch.cat(history), expected)


@pytest.mark.parametrize("schedule", masking.SCHEDULES)
def test_the_schedule_is_ours(schedule, peer):
    for num_steps in (1, 2, 8, 64):
        ours = masking.reveal_table(schedule, num_steps, 64)[64]
        np.testing.assert_array_equal(peer.reveal_counts(schedule, num_steps, 64), ours)


def test_samples_follow_the_model(peer):
    """With one step and no guidance, codes are drawn from the softmax of the first logits."""
    config = peer.Config(**SIZES, grid_size=(2, 2))
    torch.manual_seed(0)
    model = peer.TorchMaskGIL(config).eval()
    labels = torch.full((4000,), 2)
    tokens, _ = peer.generate(
        model, labels, num_steps=1, guidance_scale=1, generator=torch.Generator().manual_seed(1)
    )
    masked_tokens = torch.full((1, 2, 2), config.codebook_size)
    logits = model(masked_tokens, labels[:1])[0, :, : config.codebook_size].double()
    expected = logits.softmax(-1).detach().numpy()
    found = np.stack([np.bincount(c, minlength=20) / 4000 for c in tokens.flatten(1).T.numpy()])
    np.testing.assert_allclose(found, expected, atol=5 * np.sqrt(0.05 * 0.95 / 4000))


@pytest.mark.parametrize("layout", ["maskgil", "maskgil-released"])
def test_missing_tensors_are_named(layout, peer):
    wide = torch.zeros(6, 4)
    state = {"output.weight": wide, "layers.0.feed_forward.w1.weight": wide}
    if layout == "maskgil":
        state["tok_embeddings.weight"] = wide
        missing = "cls_embedding.embedding_table.weight"
    else:
        state["tok_emb.weight"] = torch.zeros(9, 4)
        missing = "output.weight"
        del state[missing]
    with pytest.raises(ValueError, match=f"no MaskGIL checkpoint: {missing} missing"):
        peer.infer_config(state, num_heads=2)


def test_the_command_line_writes_tokens_or_says_why_not(both, peer, tmp_path, capsys):
    _, _, path, options = both
    begin = f"--weights {path} --num_heads 2 --grid_size 3x4 --out {tmp_path / 'tokens.npz'} "
    begin += " ".join(f"--{k} {v}" for k, v in options.items() if k.endswith(("norm", "rope")))
    assert peer.main([*begin.split(), "--labels", "1,2"]) == 0
    with np.load(tmp_path / "tokens.npz") as saved:
        assert saved["tokens"].shape == (2, 3, 4)
        assert saved["tokens"].max() < SIZES["codebook_size"]
        np.testing.assert_array_equal(saved["labels"], [1, 2])
        first = saved["tokens"]
    assert peer.main([*begin.split(), "--labels", "1,2", "--seed", "1"]) == 0
    with np.load(tmp_path / "tokens.npz") as saved:
        assert (saved["tokens"] != first).any()
    for arguments, message in (
        (["--labels", "5"], r"labels [5] are out of range; allowed: 0 to 4"),
        (["--labels", "1", "--num_steps", "13"], "num_steps 13 is out of range; allowed: 1 to 12"),
    ):
        assert peer.main([*begin.split(), *arguments]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_damaged_file_ends_with_one_line(suffix, peer, tmp_path, capsys):
    path = tmp_path / f"damaged{suffix}"
    path.write_bytes(b"no weights")
    arguments = f"--weights {path} --labels 1 --out {tmp_path / 'tokens.npz'}"
    assert peer.main(arguments.split()) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path} is damaged or holds more than tensors")
    assert not (tmp_path / "tokens.npz").exists()
