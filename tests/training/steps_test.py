import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references

from maskgil_jax.models.maskgil import MaskGIL
from maskgil_jax.training import steps

CONFIG = references.tiny_config(num_layers=1)
LOSS = dict(mask_token_id=CONFIG.mask_token_id)


def apply_model(params, tokens, labels, dropout_rng):
    logits = MaskGIL(CONFIG).apply({"params": params}, tokens, labels)
    return logits, jnp.mean(logits)


def random_batch(size=8, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "tokens": jnp.asarray(rng.integers(0, CONFIG.codebook_size, (size, *CONFIG.grid_size))),
        "label": jnp.asarray(rng.integers(0, CONFIG.num_classes, size)),
    }


def prepared(mask_draw="exact", size=8):
    config = steps.MaskedLossConfig(**LOSS, mask_draw=mask_draw, mask_schedule="root")
    return corrupt(random_batch(size), 0, config)


def corrupt(batch, seed, config):
    return steps.corrupt_batch(
        batch["tokens"], batch["label"], jax.random.key(seed), config, CONFIG.drop_condition
    )


@functools.cache
def accumulate(config, parts):
    """The jitted `(params, batch, rng) → (gradients, metrics)` of the tiny model."""
    loss_fn = steps.make_masked_loss(apply_model, config)
    return jax.jit(functools.partial(steps.accumulate, loss_fn, parts=parts))


def test_only_masked_tokens_are_hidden_and_targets_are_whole():
    batch, corrupted = random_batch(), prepared()
    mask = np.asarray(corrupted["mask"])
    assert mask.any((1, 2)).all()
    np.testing.assert_array_equal(corrupted["targets"], batch["tokens"])
    np.testing.assert_array_equal(
        corrupted["inputs"], np.where(mask, CONFIG.mask_token_id, batch["tokens"])
    )


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_conditions_are_dropped_at_their_rate(share):
    config = steps.MaskedLossConfig(**LOSS, condition_dropout=share)
    batch = random_batch(2000)
    labels = np.asarray(corrupt(batch, 1, config)["condition"])
    dropped = labels == CONFIG.null_label
    assert dropped.mean() == pytest.approx(share, abs=0.03)
    np.testing.assert_array_equal(labels[~dropped], batch["label"][~dropped])


@pytest.mark.parametrize("loss_tokens", ["masked", "all"])
def test_the_loss_averages_over_the_tokens_it_names(loss_tokens):
    config = steps.MaskedLossConfig(**LOSS, loss_tokens=loss_tokens, label_smoothing=0.2)
    params, batch = references.random_params(CONFIG), prepared()
    _, metrics = accumulate(config, 1)(params, batch, jax.random.key(0))
    logits = references.forward(CONFIG, params, np.asarray(batch["inputs"]), batch["condition"])
    targets, mask = (np.asarray(batch[name]).reshape(8, -1) for name in ("targets", "mask"))
    losses = references.cross_entropy(logits, targets, 0.2)
    chosen = mask if loss_tokens == "masked" else np.ones_like(mask)
    assert metrics["loss"] == pytest.approx(losses[chosen].mean(), rel=1e-5)
    correct = logits.argmax(-1) == targets
    assert metrics["accuracy"] == pytest.approx(correct[mask].mean(), abs=1e-6)


def gradient(parts, mask_draw):
    """Gradient and metrics of one batch of 8 in `parts` parts."""
    batch = prepared(mask_draw)
    if mask_draw == "bernoulli":
        # A part whose draw hid nothing must weigh nothing.
        batch["mask"] = batch["mask"].at[::4].set(False)
    config = steps.MaskedLossConfig(**LOSS)
    return accumulate(config, parts)(references.random_params(CONFIG), batch, jax.random.key(0))


@pytest.mark.parametrize("mask_draw", ["exact", "bernoulli"])
@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_gradients_are_those_of_the_whole_batch(parts, mask_draw):
    whole, metrics = gradient(1, mask_draw)
    summed, summed_metrics = gradient(parts, mask_draw)
    for a, b in zip(jax.tree.leaves(summed), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 * float(np.abs(b).max()) + 1e-8, rtol=1e-4)
    assert summed_metrics["loss"] == pytest.approx(float(metrics["loss"]), rel=1e-5)


def test_a_batch_without_masked_tokens_has_no_gradient():
    batch = prepared()
    batch["mask"] = jnp.zeros_like(batch["mask"])
    step = accumulate(steps.MaskedLossConfig(**LOSS), 1)
    gradients, metrics = step(references.random_params(CONFIG), batch, jax.random.key(0))
    assert metrics["loss"] == 0
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradients))


def scalar_step(**options):
    """A step on one parameter w, whose loss is (w - batch)², that records its randomness."""

    def loss_fn(params, batch, rng):
        loss = jnp.sum((params["w"] - batch) ** 2)
        return steps.Summed(loss=loss, weight=jnp.float32(batch.size), sums={"loss": loss})

    def prepare(batch, rng):
        return batch + jax.random.uniform(rng)

    optimizer = optax.sgd(0.1)
    step = steps.make_train_step(loss_fn, prepare, optimizer, **{"seed": 3} | options)
    metrics = steps.metrics_class(("loss", "grad_norm", "param_norm"))
    state = steps.create_state({"w": jnp.float32(2.0)}, optimizer, "ema_decay" in options)
    return jax.jit(step), state, metrics


def test_the_average_of_the_parameters_follows_its_formula():
    step, state, metrics = scalar_step(ema_decay=0.9)
    average = 2.0
    for _ in range(3):
        state, _ = step(state, metrics.empty(), jnp.zeros(4))
        average = 0.9 * average + 0.1 * float(state.params["w"])
        assert float(state.ema["w"]) == pytest.approx(average, rel=1e-6)
    assert int(state.step) == 3
    assert scalar_step()[1].ema is None


def test_randomness_follows_the_seed_and_the_step_alone():
    step, state, metrics = scalar_step()
    batch = jnp.zeros(4)
    first, _ = step(state, metrics.empty(), batch)
    again, _ = step(state, metrics.empty(), batch)
    later, _ = step(state.replace(step=state.step + 1), metrics.empty(), batch)
    other, _ = scalar_step(seed=4)[0](state, metrics.empty(), batch)
    assert first.params["w"] == again.params["w"]
    assert len({float(s.params["w"]) for s in (first, later, other)}) == 3


def test_metrics_average_over_steps():
    step, state, metrics = scalar_step()
    losses, collected = [], metrics.empty()
    for i in range(3):
        _, single = step(state.replace(step=jnp.int32(i)), metrics.empty(), jnp.zeros(4))
        _, collected = step(state.replace(step=jnp.int32(i)), collected, jnp.zeros(4))
        losses.append(float(single.compute()["loss"]))
    assert len(set(losses)) == 3
    assert collected.compute()["loss"] == pytest.approx(np.mean(losses))
    values = single.compute()
    assert values["grad_norm"] == pytest.approx(2 * np.sqrt(losses[-1]), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_tokens": "mask"}, "loss_tokens 'mask' is unknown; .*Did you mean 'masked'"),
        ({"mask_schedule": "arcos"}, "mask_schedule 'arcos' .*Did you mean 'arccos'"),
        ({"mask_draw": "exakt"}, "mask_draw 'exakt' .*Did you mean 'exact'"),
        ({"label_smoothing": 1.0}, r"label_smoothing 1.0 is not in \[0, 1\)"),
        ({"condition_dropout": 1.5}, r"condition_dropout 1.5 is not in \[0, 1\]"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        steps.MaskedLossConfig(**LOSS | changes)
