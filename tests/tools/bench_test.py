"""The PyTorch peer computes what we compute, and the benchmark reports what it should."""

import dataclasses
import functools
import json
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from maskgil_jax import convert
from maskgil_jax.build import models as build
from maskgil_jax.evals.extractor import FeatureExtractor
from maskgil_jax.evals.inception import Inception
from maskgil_jax.models.maskgil import MaskGIL, MaskGILConfig
from maskgil_jax.tokenizers.llamagen_vq import LlamaGenVQConfig
from maskgil_jax.tokenizers.maskgit_vq import MaskGITVQConfig
from maskgil_jax.training import steps
from maskgil_jax.training.optimizer import OptimizerConfig, make_optimizer

torch = pytest.importorskip("torch", reason="the peer is a PyTorch model: pip install .[torch]")
TOOLS = pathlib.Path(__file__).parents[2] / "tools"
FIELDS = {"row", "name", "ratio", "goal", "spread", "hardware", "void", "versions", "batch"}


@pytest.fixture(autouse=True)
def _tools_importable(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)


@pytest.fixture(autouse=True)
def _keep_settings(monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    cache = jax.config.jax_enable_compilation_cache
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    jax.config.update("jax_enable_compilation_cache", cache)


@pytest.fixture(autouse=True)
def _small_matmul(monkeypatch, _tools_importable):
    """A ceiling that takes no time: what rate it has means nothing here."""
    from benchmarks import timing

    monkeypatch.setitem(timing.MATMUL_SIDE, "cpu", 64)
    monkeypatch.setitem(timing.COPY_BYTES, "cpu", 4096)


def make_both(**options):
    """Return our config and parameters, and the peer with the same parameters."""
    from benchmarks import torch_peer

    config = MaskGILConfig(
        num_layers=2,
        width=32,
        num_heads=2,
        mlp_width=48,
        codebook_size=20,
        num_classes=5,
        grid_size=(3, 4),
        **options,
    )
    shapes = jax.eval_shape(build.init_model(config), jax.random.key(0))
    rng = np.random.default_rng(0)
    # Random everywhere: a zero head or a unit scale would hide a wrong one.
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), jnp.float32) / 4, shapes)
    params = jax.tree.map(lambda box: box.value, params, is_leaf=lambda x: hasattr(x, "names"))
    model = torch_peer.make_model(config)
    torch_peer.load_flax_params(model, config, params)
    return config, params, model


def draw_inputs(config):
    rng = np.random.default_rng(1)
    tokens = rng.integers(config.codebook_size + 1, size=(2, *config.grid_size), dtype=np.int32)
    return tokens, np.array([3, config.null_label], np.int32)


@pytest.mark.parametrize(
    "options", [{}, {"qk_norm": "layer", "post_norm": "rms"}, {"qk_norm": "rms"}]
)
def test_peer_gives_our_logits(options):
    config, params, model = make_both(**options)
    tokens, labels = draw_inputs(config)
    ours = MaskGIL(config).apply({"params": params}, tokens, labels)
    with torch.inference_mode():
        theirs = model(torch.from_numpy(tokens).long(), torch.from_numpy(labels).long())
    np.testing.assert_allclose(theirs, ours, atol=1e-4)
    assert np.ptp(ours) > 1


def test_peer_refuses_what_it_does_not_implement():
    with pytest.raises(ValueError, match="embedding_dropout 0.1.*only 0.0"):
        make_both(embedding_dropout=0.1)


def test_peer_takes_our_training_step():
    from benchmarks import torch_peer

    config, params, model = make_both()
    settings = OptimizerConfig(learning_rate=0.01, clip_norm=0.5)
    tokens, labels = draw_inputs(config)
    tokens %= config.codebook_size
    mask = np.random.default_rng(2).random(tokens.shape) < 0.6
    inputs = np.where(mask, config.mask_token_id, tokens)
    loss_fn = steps.make_masked_loss(
        build.training_apply(config),
        steps.MaskedLossConfig(mask_token_id=config.mask_token_id),
    )
    batch = {"inputs": inputs, "targets": tokens, "mask": mask, "condition": labels}
    grads, metrics = steps.accumulate(
        loss_fn, params, jax.tree.map(jnp.asarray, batch), jax.random.key(0), 1
    )
    optimizer = make_optimizer(settings, num_steps=1)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    updated = optax.apply_updates(params, updates)

    tensors = [
        torch.from_numpy(x) for x in (tokens.astype(np.int64), labels.astype(np.int64), mask)
    ]
    loss = torch_peer.masked_loss(
        model, *tensors, mask_token_id=config.mask_token_id, smoothing=0.1
    )
    torch_peer.update(model, torch_peer.make_optimizer(model, settings), loss, settings.clip_norm)
    assert float(loss.detach()) == pytest.approx(float(metrics["loss"]), rel=1e-5)
    clip = settings.clip_norm / float(optax.tree.norm(grads))
    assert clip < 1
    np.testing.assert_allclose(model.head.weight.grad.T, grads["head"]["kernel"] * clip, atol=1e-6)
    # The first update of Adam has the gradient's sign, which rounding flips where it is near zero.
    near = np.isclose(model.head.weight.detach().T, updated["head"]["kernel"], atol=1e-5)
    assert near.mean() > 0.99


def test_arithmetic_is_that_of_the_table():
    from benchmarks import ours

    forward, training = {}, {}
    for size in ("b", "l", "xl", "xxl"):
        model = build.model_config(ours.make_config(size, 8, "float32"))
        forward[size] = round(ours.forward_flops(model) / 1e9, 1)
        training[size] = round(ours.training_flops(model) / 1e9, 1)
    assert forward == {"b": 52.5, "l": 173.5, "xl": 398.8, "xxl": 730.9}
    assert training == {"b": 157.6, "l": 520.6, "xl": 1196.5, "xxl": 2192.6}


def test_operations_are_counted_in_loops_and_convolutions():
    from benchmarks import flops, ours

    assert ours.decode_flops(LlamaGenVQConfig(), (16, 16)) / 1e9 == pytest.approx(253, abs=0.5)
    # The model's layers are a scan; its head is computed on padded rows, which earn no credit.
    model = build.model_config(ours.make_config("b", 1, "float32"))
    shapes = jax.eval_shape(build.init_model(model), jax.random.key(0))
    inputs = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, *model.grid_size), (1,)))
    counted = flops.count_flops(
        lambda params, *inputs: model.make_module().apply({"params": params}, *inputs),
        shapes,
        *inputs,
    )
    padding = 2 * model.seq_len * model.width * model.head_padding
    assert counted == ours.forward_flops(model) + padding

    def loop(x):
        return jax.lax.while_loop(lambda x: x.sum() < 1, lambda x: x @ x, x)

    with pytest.raises(ValueError, match="'while' holds matrix products"):
        flops.count_flops(loop, jnp.ones((2, 2)))


def run_bench(*arguments):
    import bench

    return bench.main(["--size", "tiny", "--block_seconds", "0.001", *arguments])


def test_every_line_is_json_with_all_fields(capsys):
    assert run_bench("--rows", "1c,7") == 0
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["row"] for r in results] == ["1c", "7", "7"]
    for result in results:
        assert result.keys() >= FIELDS
        assert result["ratio"] > 0
        assert result["spread"] > 0
        assert isinstance(result["void"], bool)
        assert "cores" in result["hardware"]
        assert result["goal"] is None  # no goal is set for the size that only tries the tool
    for result in results[1:]:
        rate = result["ours_gflops"] / result["torch_gflops"]
        assert rate == pytest.approx(result["torch_seconds"] / result["ours_seconds"], rel=0.01)


def test_encoding_peer_gives_our_tokens():
    from benchmarks import torch_vq

    config = LlamaGenVQConfig(
        codebook_size=50,
        channels=32,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        latent_channels=32,
    )
    images = np.random.default_rng(0).uniform(-1, 1, (3, 12, 8, 3)).astype(np.float32)
    module, rng = config.make_module(), np.random.default_rng(1)
    shapes = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
    # Random everywhere: a zero bias or a unit scale would hide a wrong one.
    params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32) / 8, shapes)

    @jax.jit
    def encode(params, images):
        return [
            module.apply({"params": params}, images, method=m) for m in ("encode_latents", "encode")
        ]

    latents, tokens = encode(params, images)
    assert len(np.unique(tokens)) > 5
    model = torch_vq.TorchEncoder(config)
    torch_vq.load_flax_params(model, params)
    with torch.inference_mode():
        theirs = model.latents(torch.from_numpy(images).permute(0, 3, 1, 2))
    np.testing.assert_allclose(theirs, latents, atol=1e-4)
    for layout in ("nchw", "channels_last"):
        side = torch_vq.TorchVQSide(config, params, images, layout=layout, device="cpu")
        np.testing.assert_array_equal(side.encode(), tokens)
    with pytest.raises(ValueError, match="l2_normalize True only"):
        torch_vq.TorchEncoder(MaskGITVQConfig(channels=32))


def test_encoding_is_reported_in_images_per_second(capsys):
    assert run_bench("--rows", "7e") == 0
    (result,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert result.keys() >= FIELDS
    assert result["goal"] is None
    rates = [result[f"{name}_images_per_second"] for name in ("nchw", "channels_last")]
    assert max(rates) == result[f"{result['torch_layout']}_images_per_second"]
    assert result["ours_images_per_second"] > 0


def test_inception_peer_gives_our_features():
    from benchmarks import ours, torch_inception, torch_vq

    us = ours.OursInception("tiny")
    rng = np.random.default_rng(0)
    # Random everywhere: a zero bias or a unit scale would hide a wrong one.
    us.params = jax.tree.map(
        lambda x: x + rng.uniform(0, 0.3, x.shape).astype(np.float32) * (x.ndim == 1), us.params
    )
    us.images = us.images // np.array([1, 2, 4, 8], np.uint8)[:, None, None, None]
    state = convert.export_state_dict(us.config.family, us.config, us.params)
    net = Inception(config=us.config, params=us.params, sha256="", fingerprint="")
    found = FeatureExtractor(net, features=("pool", "spatial"))(us.images)
    assert np.ptp(found["pool"], axis=0).max() > 1e-3
    for layout in torch_vq.LAYOUTS:
        peer = torch_inception.TorchInceptionSide(
            us.config, state, us.images, layout=layout, device="cpu"
        )
        seen: list = []
        first = peer.model.Mixed_6d.branch1x1
        first.register_forward_hook(lambda *call, seen=seen: seen.append(call[-1]))
        np.testing.assert_allclose(peer.extract(), found["pool"], rtol=1e-4, atol=1e-5)
        spatial = seen[0][:, :7].permute(0, 2, 3, 1).reshape(4, -1)
        np.testing.assert_allclose(spatial, found["spatial"], rtol=1e-4, atol=1e-5)


def test_inception_is_reported_in_images_per_second(capsys):
    assert run_bench("--rows", "7i") == 0
    (result,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert result.keys() >= FIELDS
    rate = result[f"{result['torch_layout']}_images_per_second"]
    assert result["ratio"] == pytest.approx(result["ours_images_per_second"] / rate, rel=0.5)


GREEDY = {
    "num_steps": 4,
    "schedule": "arccos",
    "guidance_scale": 3.0,
    "temperature": 0.0,
    "gumbel_temperature": 0.0,
}


@functools.cache
def sample_greedily():
    """Our sampler without randomness, what peers take of it, its tokens and its images."""
    from benchmarks import ours

    us = ours.OursSampler("tiny", 2, GREEDY)
    rng = np.random.default_rng(0)
    # Random everywhere: a zero head, bias or a unit scale would hide a wrong one.
    us.replace_params(
        *jax.tree.map(
            lambda x: x + rng.normal(size=x.shape).astype(np.float32) / 3, (us.params, us.vq_params)
        )
    )
    inputs = us.model, us.params, us.vq, us.vq_params
    return inputs, us.labels, us.sample_tokens(), us.sample()


def test_sampling_peers_give_our_tokens():
    from benchmarks import torch_sampling

    inputs, labels, tokens, _ = sample_greedily()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    shared = dict(labels=labels, settings=GREEDY, layouts=(), device="cpu")
    torch.compiler.reset()
    peers = [
        torch_sampling.TorchSampler(*inputs, **shared),
        torch_sampling.TorchSampler(*inputs, **shared, compiler=count),
        torch_sampling.ReleasedSampler(*inputs, **shared, autocast=False),
    ]
    assert len(np.unique(tokens)) > 5
    for peer in peers:
        np.testing.assert_array_equal(peer.sample_tokens(), tokens)
    # With and without guidance, each one graph without a fetch; no number of a step recompiles.
    assert len(graphs) == 2


def test_sampling_peer_gives_our_images():
    from benchmarks import torch_sampling, torch_vq

    inputs, labels, tokens, images = sample_greedily()
    shared = dict(labels=labels, settings=GREEDY, layouts=tuple(torch_vq.LAYOUTS), device="cpu")
    peer = torch_sampling.TorchSampler(*inputs, **shared)
    half = torch_sampling.TorchSampler(*inputs, **shared, dtype="bfloat16")
    for layout in torch_vq.LAYOUTS:
        # A rounding in float32 may move a value over the edge between two grey levels.
        assert np.abs(peer.sample(layout).astype(int) - images).max() <= 1
        errors = np.abs(half.decode(torch.from_numpy(tokens), layout).astype(int) - images)
        assert 0 < errors.mean() < 8
    assert np.ptp(images) > 50


def test_each_layout_is_that_of_the_images():
    from benchmarks import torch_vq

    config = LlamaGenVQConfig(codebook_size=9, channels=32, channel_multipliers=(1, 1))
    for memory in torch_vq.LAYOUTS.values():
        decoder = torch_vq.TorchDecoder(config).to(memory_format=memory)
        with torch.inference_mode():
            images = decoder(torch.zeros((2, 4, 4), dtype=torch.long))
        assert images.is_contiguous(memory_format=memory)


@pytest.mark.parametrize("name", ["TorchSampler", "ReleasedSampler"])
def test_sampling_peers_draw_from_the_model(name):
    from benchmarks import torch_sampling

    config, params, model = make_both()
    settings = GREEDY | {"num_steps": 1, "guidance_scale": 1.5, "temperature": 0.2}
    count, label = 400, 3
    vq = LlamaGenVQConfig(codebook_size=config.codebook_size)
    shared = dict(labels=[label] * count, settings=settings, layouts=(), device="cpu")
    options = {"autocast": False} if name == "ReleasedSampler" else {}
    peer = getattr(torch_sampling, name)(config, params, vq, {}, **shared, **options)
    torch.manual_seed(0)
    tokens = peer.sample_tokens().flatten(1).numpy()
    start = torch.full((1, *config.grid_size), config.mask_token_id)
    with torch.inference_mode():
        cond, uncond = (
            model(start, torch.tensor([x]))[0, :, :-1].numpy() for x in (label, config.null_label)
        )
    # A single step of the released ramp is its first, which has no guidance.
    scale = 1.0 if name == "ReleasedSampler" else 1.5
    logits = (uncond + scale * (cond - uncond)).astype(np.float64) / 0.2
    expected = count * np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    seen = np.stack([np.bincount(column, minlength=20) for column in tokens.T])
    # Rare codes count together: alone they have no chi-square distribution.
    rare = expected < 5
    table = [np.append(x[~rare], x[rare].sum()) for x in (seen, expected)]
    assert 0 < rare.mean() < 0.7
    assert stats.chisquare(*table, ddof=len(seen) - 1).pvalue > 1e-3


@pytest.mark.parametrize("row", ["7s", "8", "12c"])
def test_rows_of_the_sampler_are_ratios_of_what_they_report(row, capsys):
    assert run_bench("--rows", row) == 0
    (result,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert result.keys() >= FIELDS - {"batch"}
    parts = {"8": ("tail", "forward"), "12c": ("warm", "cold")}
    if row == "7s":
        ours_rate = result["ours_images_per_second"]
        ratio = ours_rate / result[f"{result['torch_layout']}_images_per_second"]
    else:
        ratio = np.divide(*(result[f"{name}_seconds"] for name in parts[row]))
    # A median of ratios beside a ratio of medians, of very short blocks: on a busy machine they
    # differ by a factor, but not by as much as the inverse of the ratio would.
    assert abs(np.log(result["ratio"] / ratio)) < np.log(4)


def causal_codes(guidance_scale, temperature, spread=1 / 3):
    """Our causal decoder of the trial size, with random parameters everywhere."""
    from benchmarks import ours_causal

    settings = {"guidance_scale": guidance_scale, "temperature": temperature}
    us = ours_causal.Codes("llamagen", "tiny", settings, "float32")
    rng = np.random.default_rng(0)
    us.replace_params(
        jax.tree.map(
            lambda x: np.asarray(x) + spread * rng.normal(size=x.shape).astype(np.float32),
            us.params,
        )
    )
    return us, settings


@pytest.mark.parametrize("guidance_scale", [3.0, 1.0])
def test_causal_peer_gives_our_codes(guidance_scale):
    from benchmarks import torch_causal

    us, settings = causal_codes(guidance_scale, 0.0)
    tokens = us.draw(2)
    assert len(np.unique(tokens)) > 5
    assert (tokens[0] != tokens[1]).any()
    peer = torch_causal.TorchCausalSide(
        us.model, us.params, labels=us.labels(2), settings=settings, device="cpu"
    )
    for reads in torch_causal.READS:
        np.testing.assert_array_equal(peer.sample_tokens(reads), tokens)


def test_causal_peer_draws_from_the_model():
    from benchmarks import torch_causal

    count, label = 2000, 3
    us, settings = causal_codes(1.5, 2.0)
    labels = np.full(count, label, np.int32)
    peer = torch_causal.TorchCausalSide(
        us.model, us.params, labels=labels, settings=settings, device="cpu"
    )
    torch.manual_seed(0)
    seen = np.bincount(peer.sample_tokens("filled_cache")[:, 0, 0], minlength=100)
    nothing = jnp.zeros((2, *us.model.grid_size), jnp.int32)
    both = jnp.array([label, us.model.null_label])
    logits = us.model.make_module().apply({"params": us.params}, nothing, both)[:, 0]
    logits = np.asarray(logits, np.float64)
    weights = np.exp((logits[1] + 1.5 * (logits[0] - logits[1])) / 2.0)
    expected = count * weights / weights.sum()
    # Rare codes count together: alone they have no chi-square distribution.
    rare = expected < 5
    table = [np.append(x[~rare], x[rare].sum()) for x in (seen, expected)]
    assert 0.1 < rare.mean() < 0.9
    assert stats.chisquare(*table).pvalue > 1e-3


def test_causal_peer_refuses_what_it_does_not_implement():
    from benchmarks import torch_causal

    us, _ = causal_codes(1.0, 0.0)
    normed = dataclasses.replace(us.model, qk_norm="layer")
    with pytest.raises(ValueError, match="qk_norm 'layer' and post_norm 'none'.*only 'none'"):
        torch_causal.make_model(normed, us.params)


def test_bytes_read_are_those_of_the_products_of_a_token():
    from benchmarks import flops, ours_causal

    us, _ = causal_codes(1.0, 0.0)
    model, length = us.model, us.model.seq_len
    # A product of one row reads each number of its kernel for one multiply-add.
    cached = model.make_cached(us.params)
    _, cache = cached.start(jnp.zeros(1, jnp.int32), length)
    counted = 0
    for index in range(length):
        step = functools.partial(cached.step, index=index, live=index + 1, cache=cache)
        counted += flops.count_flops(step, jnp.zeros(1, jnp.int32)) // 2
    padding = model.width * model.head_padding
    assert ours_causal.read_bytes(model, rows=1) == 4 * (counted - length * padding)
    half = dataclasses.replace(model, dtype="bfloat16")
    cache_of_one = 2 * model.num_layers * model.width * length * (length + 1)
    assert ours_causal.read_bytes(half, 3) - ours_causal.read_bytes(half, 1) == 2 * cache_of_one


def test_batch_at_which_a_ratio_falls_to_one():
    from benchmarks.rows_causal import break_even

    assert break_even({1: 4.0, 4: 1.0, 16: 0.25}) == pytest.approx(4.0)
    assert break_even({1: 8.0, 8: 1.0 / 8}) == pytest.approx(8**0.5)
    assert break_even({16: 0.5, 8: 2.0}) == pytest.approx(128**0.5)
    assert break_even({1: 3.0, 8: 1.5}) is None
    assert break_even({1: 0.9, 8: 0.5}) is None


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("row", ["5", "6", "7a"])
def test_rows_of_autoregression_are_ratios_of_what_they_report(row):
    from benchmarks import rows, timing

    batches = (1, 2)
    options = {"batch_sizes": batches if row == "7a" else {"cpu": batches}}
    effort = timing.Effort(block_seconds=0.001)
    results = [r.to_dict() for r in rows.ROWS[row].run(row, "tiny", effort, **options)]
    assert tuple(result["batch"] for result in results) == batches
    for result in results:
        assert result.keys() >= FIELDS
        assert (result["goal"], result["dtype"]) == (None, "float32")
        if row == "5":
            ratio = result["llamagen_seconds"] / result["maskgil_seconds"]
            assert "break_even_batch" in result
        elif row == "6":
            rates = [result[f"{name}_gbytes_per_second"] for name in ("decoding", "copy")]
            ratio = rates[0] / rates[1]
        else:
            rate = result[f"{result['torch_layout']}_images_per_second"]
            assert rate == max(result[f"{n}_cache_images_per_second"] for n in ("filled", "whole"))
            ratio = result["ours_images_per_second"] / rate
        # Medians of ratios beside ratios of medians, of very short blocks.
        assert abs(np.log(result["ratio"] / ratio)) < np.log(4)


@pytest.mark.usefixtures("quick_compilation")
def test_text_fusion_is_told_as_a_ratio_of_times():
    from benchmarks import rows, rows_fusion, timing

    side = rows_fusion.TextFusion("tiny", "float32")
    begun, whole = side.begin(rows_fusion.SHARE), side.begin(1.0)
    assert (whole.shape, whole.max() < 100, begun[0, 0].tolist()) == (
        (1, 4, 4),
        True,
        whole[0, 0].tolist(),
    )
    assert (begun[0, 1:] == 100).all()
    fused = side.fuse()
    assert fused[0, 0].tolist() == begun[0, 0].tolist()
    assert fused.max() < 100
    effort = timing.Effort(block_seconds=0.001)
    (result,) = [r.to_dict() for r in rows.ROWS["13"].run("13", "tiny", effort)]
    assert result.keys() >= FIELDS
    assert (result["goal"], result["batch"]) == (None, 1)
    ratio = result["alone_seconds"] / result["fusion_seconds"]
    assert abs(np.log(result["ratio"] / ratio)) < np.log(4)
    assert rows.ROWS["13"].run.keywords["goals"] == {"xl": 3.6}


@pytest.mark.gpu
def test_text_fusion_on_a_gpu():
    (result,) = run_on_gpu("13", "xl")
    check_on_gpu(result)
    assert result["goal"] == 3.6


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    ("row", "options"), [("3", {"compiler": "eager"}), ("3r", {"autocast": False}), ("4", {})]
)
def test_gpu_rows_measure_what_they_say(row, options):
    from benchmarks import rows, timing

    effort = timing.Effort(block_seconds=0.001)
    (result,) = rows.ROWS[row].run(row, "tiny", effort, batch_size=4, **options)
    told = result.to_dict()
    assert told.keys() >= FIELDS
    assert told["dtype"] == "bfloat16"
    if row == "4":
        work = 4 * (16 * told["forward_gflop"] + told["decode_gflop"])
        rate = work / told["sampling_seconds"]
        assert rate == pytest.approx(told["sampling_gflops"], rel=0.01)
        assert told["ratio"] == pytest.approx(rate / told["ceiling_gflops"], rel=0.5)
    else:
        peers = {"3": ["nchw", "channels_last"], "3r": ["nchw"]}[row]
        fastest = max(told[f"{layout}_images_per_second"] for layout in peers)
        assert fastest == told[f"{told['torch_layout']}_images_per_second"]
        assert told["ratio"] == pytest.approx(told["ours_images_per_second"] / fastest, rel=0.5)


def test_sizes_have_the_goals_of_the_table():
    from benchmarks import rows

    def goals(row):
        options = rows.ROWS[row].run.keywords
        return options["goals"] if "goals" in options else options["goal"]

    assert goals("3") == {"b": 1.15, "l": 1.10, "xl": 1.10, "xxl": 1.10}
    assert goals("3r") == 2.0
    assert goals("4") == {"b": 0.48, "l": 0.56, "xl": 0.62, "xxl": 0.64}
    assert goals("11") == goals("11t") == 1.05
    assert goals("5") == {"l": {1: 6.0, 8: 1.3}}
    assert goals("6") == {"l": {1: 0.35, 64: 0.45}}
    assert set(goals("7a").values()) == {1.2}


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("row", ["11", "11t"])
def test_growth_is_told_over_that_of_the_operations(row, capsys):
    assert run_bench("--rows", row) == 0
    time, memory = map(json.loads, capsys.readouterr().out.splitlines())
    for result, unit in ((time, "seconds"), (memory, "temp_bytes")):
        assert result.keys() >= FIELDS
        assert result["better"] == "lower"
        grew = result[f"{unit}_64_tokens"] / result[f"{unit}_16_tokens"]
        assert result["ratio"] == pytest.approx(grew / result["flops_ratio"], rel=0.5)
    # No faster machine and no quieter one changes what a program needs.
    assert "ceiling_drift" not in memory
    assert (memory["void"], memory["spread"]) == (False, 0)
    assert memory["ratio"] * memory["flops_ratio"] == pytest.approx(
        memory["memory_ratio"], rel=0.01
    )
    assert memory["memory_ratio"] > 1


def test_operations_of_xl_grow_as_the_table_says():
    from benchmarks import ours

    small = ours.model_config(ours.make_config("xl", 1, "float32"))
    large = dataclasses.replace(small, grid_size=(32, 32))
    ratio = ours.forward_flops(large) / ours.forward_flops(small)
    assert ratio == pytest.approx(4.35, abs=0.005)


def run_on_gpu(row, size):
    # A process of its own, as a user runs it: it leaves the GPU's memory to the next.
    command = [sys.executable, str(TOOLS / "bench.py"), "--rows", row, "--size", size]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_on_gpu(result):
    assert result.keys() >= FIELDS
    assert result["hardware"].startswith("one NVIDIA")
    assert not result["void"]
    assert result["ratio"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("row", ["1", "2", "3", "3r", "4"])
def test_row_on_a_gpu(row):
    (result,) = run_on_gpu(row, "b")
    check_on_gpu(result)
    assert result["goal"] is not None


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("row", "batches", "with_goal"), [("5", [1, 8, 16, 32, 64], [1, 8]), ("6", [1, 64], [1, 64])]
)
def test_row_of_autoregression_on_a_gpu(row, batches, with_goal):
    results = run_on_gpu(row, "l")
    assert [result["batch"] for result in results] == batches
    assert [result["batch"] for result in results if result["goal"] is not None] == with_goal
    for result in results:
        check_on_gpu(result)


def test_drift_voids_a_result():
    from benchmarks import results, timing

    times = dict(seconds={}, ceilings=np.array([1e9]), before=1e9)
    fields = dict(row="x", name="x", ratio=2.0, goal=1.5, spread=0.1, figures={})
    good = results.Result(times=timing.Times(after=0.96e9, **times), **fields).to_dict()
    bad = results.Result(times=timing.Times(after=0.94e9, **times), **fields).to_dict()
    assert (good["void"], bad["void"]) == (False, True)
    assert good["met"] is True
    lower = results.Result(times=timing.Times(after=1e9, **times), better="lower", **fields)
    assert lower.to_dict()["met"] is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--rows", "7,77"],
            "rows 77 are unknown; allowed: 1, 1c, 2, 3, 3r, 4, 5, 6, 7, 7a, 7e, 7i, 7s",
        ),
        (
            ["--rows", "1,2,3,3r,4"],
            "rows 1, 2, 3, 3r, 4 need a GPU.*allowed here: 1c, 5, 6, 7, 7a, 7e, 7i, 7s, 8",
        ),
        (
            ["--rows", "7", "--size", "m"],
            "size 'm' is unknown; allowed: b, l, xl, xxl, xxxl, 1b, 3b, 7b, tiny",
        ),
        (["--rows", "7", "--size", "3b"], r"size '3b' has no MaskGIL .configs/3b.py."),
        (["--rows", "7", "--blocks", "4"], "blocks 4 must be at least 5"),
    ],
)
def test_bad_input_is_refused(arguments, message, capsys):
    assert run_bench(*arguments) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert re.search(message, output.err)
