import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import linen as nn
from jax.experimental.compilation_cache import compilation_cache

from maskgil_jax import checkpoints, sharding
from maskgil_jax.build import tokenizers as build
from maskgil_jax.tokenizers.lpips import LPIPSConfig
from maskgil_jax.train import train
from maskgil_jax.training import adversarial, steps
from maskgil_jax.training.adversarial import AdversarialConfig, AdversarialFns

RATE, WEIGHT = 0.1, 0.7


class Outputs(NamedTuple):
    """As those of a tokenizer: floats, integers and a part without arrays."""

    reconstruction: Any
    tokens: Any
    hidden: Any
    codebook: Any = None


def forward(params, images, rng):
    hidden = jnp.tanh(images * params["first"])
    return Outputs(hidden * params["last"], jnp.int32(images > 0), hidden)


def base_loss(outputs, images):
    error = jnp.mean(jnp.square(outputs.reconstruction - images))
    return error + 0.1 * jnp.mean(outputs.hidden**2), {"error": error}


def discriminate(params, images):
    return params["slope"] * (images - jnp.mean(images)) + params["offset"]


def cross_entropy(real, fake):
    return jnp.mean(jax.nn.softplus(-real)) + jnp.mean(jax.nn.softplus(fake))


FNS = AdversarialFns(
    forward=forward,
    loss=base_loss,
    discriminate=discriminate,
    discriminator_loss=cross_entropy,
    generator_loss=lambda fake: -jnp.mean(fake**3),
    last_layer=lambda params: params["last"],
)


@pytest.fixture
def toy():
    images = jnp.asarray(np.random.default_rng(0).normal(0, 1, (4, 3)), jnp.float32)
    params = {"first": jnp.float32(0.8), "last": jnp.float32(1.3)}
    judge = {"slope": jnp.float32(0.5), "offset": jnp.float32(0.2)}
    return images, params, judge


def run_toy(toy, config, *, active, fns=FNS, ema=0.9):
    images, params, judge = toy
    optimizer = optax.sgd(RATE)
    state = adversarial.create_state(params, optimizer, judge, optimizer, ema=True)
    names = ("loss", "error", "grad_norm", "param_norm", *adversarial.metric_names(config))
    step = adversarial.make_adversarial_step(
        fns, config, optimizer, optimizer, active=active, seed=0, ema_decay=ema
    )
    state, metrics = jax.jit(step)(state, steps.metrics_class(names).empty(), {"image": images})
    return state, {name: float(x) for name, x in metrics.compute().items()}


@pytest.mark.parametrize("adaptive", [False, True])
def test_both_nets_move_along_their_own_gradients(toy, adaptive):
    images, params, judge = toy
    config = AdversarialConfig(weight=WEIGHT, adaptive=adaptive)
    state, values = run_toy(toy, config, active=True)

    def term(params):
        return FNS.generator_loss(discriminate(judge, forward(params, images, None).reconstruction))

    def error(params):
        return jnp.mean(jnp.square(forward(params, images, None).reconstruction - images))

    ratio = 1.0
    if adaptive:
        ours, theirs = (jnp.abs(jax.grad(f)(params)["last"]) for f in (error, term))
        ratio = float(ours / (theirs + 1e-4))
        assert ratio != pytest.approx(1.0, abs=0.05)
        assert values["adaptive_weight"] == pytest.approx(ratio, rel=1e-5)

    def total(params):
        return base_loss(forward(params, images, None), images)[0] + WEIGHT * ratio * term(params)

    loss, grads = jax.value_and_grad(total)(params)
    fake = forward(params, images, None).reconstruction

    def judged(judge):
        return cross_entropy(discriminate(judge, images), discriminate(judge, fake))

    lost, pushes = jax.value_and_grad(judged)(judge)
    for name in params:
        moved = params[name] - RATE * grads[name]
        np.testing.assert_allclose(state.params[name], moved, rtol=1e-5)
        np.testing.assert_allclose(state.ema[name], 0.9 * params[name] + 0.1 * moved, rtol=1e-5)
    for name in judge:
        moved = judge[name] - RATE * WEIGHT * pushes[name]
        assert abs(pushes[name]) > 1e-3
        np.testing.assert_allclose(state.discriminator["params"][name], moved, rtol=1e-5)
    assert values["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert values["adversarial"] == pytest.approx(float(term(params)), rel=1e-5)
    assert values["discriminator_loss"] == pytest.approx(float(lost), rel=1e-5)
    assert values["grad_norm"] == pytest.approx(float(optax.tree.norm(grads)), rel=1e-5)
    real, made = (float(jnp.mean(discriminate(judge, x))) for x in (images, fake))
    assert values["logits_real"] == pytest.approx(real, abs=1e-6)
    assert values["logits_fake"] == pytest.approx(made, abs=1e-6)
    assert state.step == 1


def test_the_adaptive_weight_is_clipped(toy):
    blind = dataclasses.replace(FNS, generator_loss=lambda fake: 0.0 * jnp.mean(fake))
    loud = dataclasses.replace(
        blind, loss=lambda outputs, images: (1e6 * jnp.mean(outputs.reconstruction), {"error": 0.0})
    )
    config = AdversarialConfig(weight=WEIGHT, adaptive=True)
    assert run_toy(toy, config, active=True, fns=loud)[1]["adaptive_weight"] == 1e4
    small = run_toy(toy, config, active=True, fns=blind)[1]["adaptive_weight"]
    assert 0 < small < 1e4


def test_before_the_start_the_step_is_that_without_a_discriminator(toy):
    images, params, judge = toy

    def absent(*_):
        raise AssertionError("the discriminator was computed")

    fns = dataclasses.replace(FNS, discriminate=absent)
    config = AdversarialConfig(weight=WEIGHT, start_step=3)
    state, values = run_toy(toy, config, active=False, fns=fns)

    def loss_fn(params, batch, rng):
        loss, means = base_loss(forward(params, batch["image"], rng), batch["image"])
        return steps.Summed(loss=loss, weight=jnp.ones(()), means={**means, "loss": loss})

    optimizer = optax.sgd(RATE)
    plain = steps.make_train_step(loss_fn, lambda b, _: b, optimizer, seed=0, ema_decay=0.9)
    metrics = steps.metrics_class(("loss", "error", "grad_norm", "param_norm")).empty()
    start = steps.create_state(params, optimizer, ema=True)
    expected, metrics = jax.jit(plain)(start, metrics, {"image": images})
    for name in params:
        assert state.params[name] == expected.params[name]
        assert state.ema[name] == expected.ema[name]
    assert state.discriminator["params"] == judge
    assert {name: values[name] for name in metrics.compute()} == metrics.compute()
    assert all(values[name] == 0 for name in adversarial.metric_names(config))


@pytest.fixture(autouse=True)
def quick_compilation(tmp_path_factory):
    """Convolutions compile slowly on a CPU: optimise less, and compile equal programs once."""
    settings = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(tmp_path_factory.getbasetemp() / "programs"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures, and a perceptual net with random weights."""
    path = tmp_path_factory.mktemp("inputs")
    tiny.make_image_folder(path / "images")
    shape = LPIPSConfig(widths=(2, 2, 2, 2, 2))
    pair = jnp.zeros((2, 1, 16, 16, 3))
    params = jax.jit(shape.make_module().init)(jax.random.key(0), *pair)["params"]
    params["heads"] = jax.tree.map(jnp.abs, params["heads"])
    checkpoints.write_model_dir(
        path / "lpips", kind="perceptual", family="lpips", config=shape.to_dict(), params=params
    )
    return path


@pytest.fixture
def config(folder):
    config = tiny.get_config()
    config.kind = "tokenizer"
    config.vq.update(
        codebook_size=32,
        channels=32,
        channel_multipliers=(1,),
        num_res_blocks=1,
        latent_channels=32,
        level_attention=False,
    )
    config.vq_loss.update(
        perceptual=0.5,
        lpips_path=str(folder / "lpips"),
        adversarial=0.5,
        discriminator_start=2,
        discriminator_layers=1,
        discriminator_channels=4,
    )
    config.data.path = str(folder / "images")
    config.training.num_steps = 5
    config.logging.every = config.logging.checkpoint_every = 1
    return config


def update(config, mesh, first, last, perceptual=None, state=None):
    """Do updates `first` to `last` on random images; the state and the metrics of each."""
    side, found = config.data.image_size[0], []
    with jax.set_mesh(mesh):
        task = build.make_tokenizer_task(config, mesh, perceptual)
        if state is None:
            state = task.init()
        else:
            state = jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), state, task.abstract)
        for index in range(first, last):
            rng = np.random.default_rng(index)
            images = rng.uniform(-1, 1, (8, side, side, 3)).astype(np.float32)
            batch = sharding.put_batch({"image": images}, mesh)
            state, metrics = task.step(state, task.empty_metrics(), batch)
            found.append({name: float(x) for name, x in metrics.compute().items()})
    return state, found


def assert_equal(one, other, **tolerance):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), **tolerance)


def read_lpips(folder):
    found = checkpoints.read_model_dir(folder / "lpips")
    return LPIPSConfig.from_dict(found.config).make_module(), found.params


class Distance(nn.Module):
    """Stands for LPIPS, which needs larger images."""

    @nn.compact
    def __call__(self, images, others):
        scale = self.param("scale", nn.initializers.ones, ())
        return scale * jnp.mean(jnp.abs(images - others), axis=(1, 2, 3))


PERCEPTUAL = (Distance(), {"scale": np.float32(0.7)})


@pytest.fixture
def lookup_free(config):
    """A net of few convolutions, whose updates are in proportion to its gradients."""
    for name in ("embed_dim", "latent_channels", "level_attention"):
        config.vq[name] = None
    config.vq.family = "open-magvit2"
    config.vq_loss.update(codebook=0.0, discriminator_start=1)
    config.data.image_size = (8, 8)
    # Or rounding would be blown up where a gradient is all but 0.
    config.optimizer.update(epsilon=1.0, learning_rate=1.0)
    return config


def test_devices_agree_and_the_start_is_that_of_a_run_without(lookup_free):
    config = lookup_free
    one = sharding.make_mesh({"data": 1}, jax.devices()[:1])
    four = sharding.make_mesh({"data": 2, "fsdp": 2})
    # The state is donated to the next update.
    before, early = update(config, one, 0, 1, PERCEPTUAL)
    before = jax.tree.map(np.asarray, before)
    state, late = update(config, one, 1, 2, PERCEPTUAL, before)
    split, shared = update(config, four, 1, 2, PERCEPTUAL, before)
    assert shared[0] == pytest.approx(late[0], rel=1e-3, abs=1e-5)
    for name in ("params", "ema", "discriminator"):
        pairs = [jax.tree.leaves(getattr(s, name)) for s in (before, state, split)]
        moved = max(float(np.abs(a - b).max()) for a, b in zip(*pairs[:2], strict=True))
        assert moved > 1e-3
        assert_equal(*pairs[1:], rtol=1e-3, atol=1e-3 * moved)
    assert (early[0]["discriminator_loss"], early[0]["adversarial"]) == (0, 0)
    assert late[0]["discriminator_loss"] > 0
    assert late[0]["adversarial"] != 0
    assert min(early[0]["perceptual"], late[0]["perceptual"]) > 0

    config.vq_loss.adversarial = 0.0
    plain, without = update(config, one, 0, 1, PERCEPTUAL)
    assert not isinstance(plain, adversarial.AdversarialState)
    assert {name: early[0][name] for name in without[0]} == without[0]
    assert_equal((plain.params, plain.ema), (before.params, before.ema), rtol=0, atol=0)


def test_perceptual_weights_are_no_constants_of_the_program(config, folder):
    mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
    module, params = read_lpips(folder)
    config.vq_loss.adaptive_weight = True
    marked = jax.tree.map(lambda x: np.full_like(x, 0.7654321), params)
    with jax.set_mesh(mesh):
        task = build.make_tokenizer_task(config, mesh, (module, marked))
        batch = {"image": jax.ShapeDtypeStruct((8, 16, 16, 3), "float32")}
        program = task.step.lower(task.abstract, task.empty_metrics(), batch).as_text()
    assert "0.7654321" not in program
    assert program.count("tensor<3x3x3x2xf32>") > 0


def test_a_resumed_run_ends_with_the_same_bits(lookup_free, tmp_path, capsys):
    config = lookup_free
    config.vq_loss.update(adaptive_weight=True, perceptual=0.0, lpips_path="")
    config.training.num_steps = 3
    assert train(config, tmp_path / "whole")["steps"] == 3
    output = capsys.readouterr().out
    for name in ("adaptive_weight", "discriminator_loss", "logits_real", "logits_fake"):
        assert name in output
    for steps_done in (2, 3):
        config.training.num_steps = steps_done
        train(config, tmp_path / "parts")
    assert "resumed from step 2\n" in capsys.readouterr().out
    mesh = sharding.make_mesh(config.mesh.to_dict())
    with jax.set_mesh(mesh):
        abstract = build.make_tokenizer_task(config, mesh, None).abstract
    trees = {
        "params": abstract.params,
        "ema": abstract.ema,
        "progress": {"step": abstract.step, "opt_state": abstract.opt_state},
        "discriminator": abstract.discriminator,
    }
    ends = []
    for name in ("whole", "parts"):
        store = checkpoints.Checkpoints(tmp_path / name, read_only=True)
        ends.append(store.restore(3, trees))
    assert_equal(*ends, rtol=0, atol=0)
    counts = [x for x in jax.tree.leaves(ends[0]["discriminator"]["opt_state"]) if x.ndim == 0]
    # The discriminator's optimiser has counted the updates since its start.
    assert counts
    assert all(int(count) == 2 for count in counts)


BAD_VALUES = {
    "adversarial": (-0.5, r"adversarial weight -0.5 must be more than 0"),
    "discriminator_start": (-1, r"discriminator_start -1 must be 0 or more"),
    "discriminator_layers": (3, r"discriminator layers is 3: an image height of 16 .*at most 2"),
    "discriminator_channels": (0, r"discriminator channels is 0"),
    "discriminator_loss": ("hing", r"discriminator_loss 'hing' .*Did you mean 'hinge'"),
    "perceptual": (0.0, r"lpips_path .* would not be used: vq_loss.perceptual is 0"),
    "lpips_path": ("", r"needs vq_loss.lpips_path: .*vgg16-397923af.pth.*--heads vgg.pth"),
}


@pytest.mark.parametrize("field", BAD_VALUES)
def test_bad_values_are_named_before_anything_is_written(config, field, tmp_path):
    value, message = BAD_VALUES[field]
    config.vq_loss[field] = value
    with pytest.raises(ValueError, match=message):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_images_too_small_for_the_perceptual_term_are_named(config, tmp_path):
    config.data.image_size = (8, 8)
    with pytest.raises(ValueError, match=r"image_size \(8, 8\) .*LPIPS needs sides of at least 16"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_does_not_go_with_a_discriminator_is_named(config, folder, tmp_path):
    config.training.accumulation_steps = 2
    with pytest.raises(ValueError, match="accumulation_steps 2 with vq_loss.adversarial 0.5: the"):
        train(config, tmp_path / "run")
    config.training.accumulation_steps = 1
    tokenizer = tiny.make_tokenizer_dir(tmp_path / "tokenizer")
    config.vq_loss.lpips_path = str(tokenizer)
    with pytest.raises(ValueError, match="holds a tokenizer of family 'llamagen-vq'; give"):
        train(config, tmp_path / "run")
    config = tiny.get_config()
    config.kind, config.vq.family = "tokenizer", "open-magvit2"
    config.data.path = str(folder / "images")
    with pytest.raises(ValueError, match="weight codebook is 1.0, but a lookup-free"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
