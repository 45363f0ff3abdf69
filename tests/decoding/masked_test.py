import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens_lib import load_golden

from maskgil_jax import masking
from maskgil_jax.convert import import_state_dict
from maskgil_jax.decoding import masked, prediction
from maskgil_jax.decoding.masked import SamplerConfig
from maskgil_jax.models.maskgil import MaskGIL

# Programs are many and small here; the model's, held against goldens, is optimised (below).
quick = pytest.mark.usefixtures("quick_compilation")
MASK, LENGTH, NULL = 11, 12, 9
PLAIN = dict(guidance_scale=1.0, gumbel_temperature=0.0)


def toy_logits(tokens, labels):
    """Logits that depend on the sequence, the position and the label; the mask's is enormous."""
    place, word = (jax.random.normal(jax.random.key(i), (13, MASK + 1)) for i in range(2))
    context = jnp.mean(word[tokens], axis=1, keepdims=True)
    logits = place[None, :LENGTH] * 2 + context + jnp.sin(word[labels] * 3)[:, None]
    return logits.at[..., MASK].set(1e9)


def start_tokens(*unknown):
    """One row per number of unknown tokens, at scattered places; the rest are codes."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, MASK, (len(unknown), LENGTH)).astype(np.int32)
    for row, count in zip(tokens, unknown, strict=True):
        row[rng.permutation(LENGTH)[:count]] = MASK
    return jnp.asarray(tokens)


@functools.partial(jax.jit, static_argnames=("logits_fn", "sampler", "null"))
def run(tokens, labels, rngs, *, logits_fn, sampler, null):
    nothing = jnp.full_like(labels, NULL) if null else None
    options = dict(mask_token_id=MASK, grid_size=(3, 4), return_trace=True)
    return masked.decode(logits_fn, tokens, labels, nothing, rngs, sampler, **options)


def decode(tokens, sampler, *, logits_fn=toy_logits, seed=0, null=True, first=0):
    """Tokens and trace, each as NumPy, of images `first`, `first` + 1, …, with labels to match."""
    indices = np.arange(first, first + len(tokens))
    rngs = masked.image_keys(seed, indices)
    result = run(tokens, indices % NULL, rngs, logits_fn=logits_fn, sampler=sampler, null=null)
    return jax.tree.map(np.asarray, result)


def make_batch(tokens, sampler, condition=None, null_condition=None, *, mask=2, counts=None):
    """A batch of images 0, 1, … whose steps reveal as many tokens as told, or as the sampler says.

    The schedule has no place for `counts` of more tokens than there are.
    """
    if counts is None:
        plan = sampler.plan(jnp.sum(tokens == mask, axis=1), tokens.shape[1])
    else:
        enough = jnp.full(len(tokens), sampler.num_steps)
        plan = dataclasses.replace(sampler.plan(enough, sampler.num_steps), counts=counts)
    return masked.Batch(
        tokens=tokens,
        condition=condition,
        null_condition=null_condition,
        rngs=masked.image_keys(0, np.arange(len(tokens))),
        plan=plan,
    )


@quick
@pytest.mark.parametrize("num_steps", [1, 5, LENGTH])
@pytest.mark.parametrize(
    "changes",
    [{}, {"rescale": False, "schedule_form": "mask_ratio"}, {"temperature": 0.0, **PLAIN}],
    ids=["default", "mask_ratio", "greedy"],
)
def test_known_tokens_stay_and_every_unknown_one_becomes_a_code(num_steps, changes):
    tokens = start_tokens(LENGTH, 7, 1, 0)
    result, trace = decode(tokens, SamplerConfig(num_steps=num_steps, **changes))
    np.testing.assert_array_equal(result, trace.tokens[-1])
    assert result.min() >= 0
    assert result.max() < MASK
    before = np.asarray(tokens)
    for after in trace.tokens:
        np.testing.assert_array_equal(after[before != MASK], before[before != MASK])
        before = after


@quick
@pytest.mark.parametrize("form", masking.FORMS)
@pytest.mark.parametrize("schedule", ["root", "arccos"])
def test_each_step_reveals_its_share_of_the_unknown_tokens(schedule, form):
    unknown = [LENGTH, 7, 3, 0]
    sampler = SamplerConfig(num_steps=4, schedule=schedule, schedule_form=form)
    _, trace = decode(start_tokens(*unknown), sampler)
    left = (trace.tokens == MASK).sum(-1).T
    table = masking.reveal_table(schedule, 4, LENGTH, form)[unknown]
    np.testing.assert_array_equal(left, np.array(unknown)[:, None] - np.cumsum(table, 1))


@quick
def test_without_rescaling_the_counts_are_those_of_a_whole_image():
    whole = masking.reveal_table("linear", 4, LENGTH)[LENGTH]
    sampler = SamplerConfig(num_steps=4, schedule="linear", rescale=False)
    _, trace = decode(start_tokens(LENGTH, 7, 2), sampler)
    left = (trace.tokens == MASK).sum(-1).T
    for row, unknown in zip(left, (LENGTH, 7, 2), strict=True):
        expected = np.maximum(unknown - np.cumsum(whole), 0)
        np.testing.assert_array_equal(row, [*expected[:-1], 0])
    assert tuple(left[1]) != tuple(7 - np.cumsum(masking.reveal_table("linear", 4, LENGTH)[7]))


@pytest.mark.parametrize("run", range(4))
def test_greedy_decoding_is_that_of_the_released_code(run):
    golden = load_golden("maskgil_released_tiny_greedy8")
    weights = load_golden("maskgil_released_tiny").state_dict
    config, params = import_state_dict("maskgil-released", weights, num_heads=2, grid_size=(16, 16))
    settings = golden.config["runs"][run]
    sampler = SamplerConfig(
        num_steps=8,
        schedule=settings["schedule"],
        guidance_scale=1 + settings["w"],
        temperature=0.0,
        gumbel_temperature=0.0,
    )

    @jax.jit
    def generate(params):
        return masked.decode(
            lambda t, c: MaskGIL(config).apply({"params": params}, t.reshape(-1, 16, 16), c),
            jnp.full((1, 256), config.mask_token_id),
            jnp.array([settings["label"]]),
            jnp.array([config.null_label]),
            masked.image_keys(0, [0]),
            sampler,
            mask_token_id=config.mask_token_id,
            return_trace=True,
        )

    _, trace = generate(params)
    codes = golden.arrays["codes"][run].reshape(8, 256)
    still_masked = golden.arrays["masked"][run].reshape(8, 256)
    expected = np.where(still_masked, config.mask_token_id, codes)
    np.testing.assert_array_equal(trace.tokens[:, 0], expected)


@quick
@pytest.mark.parametrize(
    ("changes", "guided"),
    [
        ({"guidance_schedule": "linear", "guidance_scale": 3.0}, [False, True, True, True]),
        ({"guidance_schedule": "constant", "guidance_scale": 3.0}, [True] * 4),
        ({"guidance_schedule": "power_cosine", "guidance_scale": 3.0}, [True] * 4),
        ({"guidance_schedule": "constant", "guidance_scale": 1.0}, [False] * 4),
    ],
)
def test_the_unconditional_pass_runs_only_where_it_has_weight(changes, guided):
    rows = []

    def counting_logits(tokens, labels):
        jax.debug.callback(lambda tokens: rows.append(len(tokens)), tokens, ordered=True)
        return toy_logits(tokens, labels)

    sampler = SamplerConfig(num_steps=4, **changes)
    _, trace = decode(start_tokens(12, 12, 12), sampler, logits_fn=counting_logits)
    jax.effects_barrier()
    assert rows == [6 if both else 3 for both in guided]
    np.testing.assert_array_equal(trace.scales != 1, guided)


@quick
def test_a_broken_unconditional_pass_cannot_reach_an_unguided_step():
    def broken_logits(tokens, labels):
        return jnp.where((labels == NULL)[:, None, None], jnp.nan, toy_logits(tokens, labels))

    ramp = SamplerConfig(num_steps=4, guidance_scale=3.0)
    none = dataclasses.replace(ramp, guidance_scale=1.0)
    tokens = start_tokens(12, 12)
    _, broken = decode(tokens, ramp, logits_fn=broken_logits)
    _, unguided = decode(tokens, none, null=False)
    _, whole = decode(tokens, ramp)
    np.testing.assert_array_equal(broken.tokens[0], unguided.tokens[0])
    np.testing.assert_array_equal(whole.tokens[0], unguided.tokens[0])
    assert np.any(whole.tokens[1:] != unguided.tokens[1:])


@quick
def test_a_single_step_is_fully_guided_and_has_no_noise():
    sampler = SamplerConfig(num_steps=1, guidance_scale=3.0, temperature=0.0)
    tokens = start_tokens(LENGTH, LENGTH)
    result, trace = decode(tokens, sampler)
    np.testing.assert_array_equal(trace.scales, [3.0])
    cond = toy_logits(tokens, jnp.arange(2))[..., :MASK]
    uncond = toy_logits(tokens, jnp.full(2, NULL))[..., :MASK]
    np.testing.assert_array_equal(result, np.argmax(uncond + 3 * (cond - uncond), -1))


@quick
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_images_do_not_depend_on_the_batch_they_are_drawn_in(batch_size):
    sampler = SamplerConfig(num_steps=4)
    tokens = start_tokens(12, 12, 5, 12, 8, 12)
    together, _ = decode(tokens, sampler)
    for first in range(0, 6, batch_size):
        part, _ = decode(tokens[first : first + batch_size], sampler, first=first)
        np.testing.assert_array_equal(part, together[first : first + batch_size])
    other, _ = decode(tokens, sampler, seed=1)
    assert np.any(other != together)


@quick
def test_two_images_of_one_label_differ():
    labels = jnp.zeros(2, jnp.int32)
    result, _ = masked.decode(
        toy_logits,
        start_tokens(12, 12),
        labels,
        labels + NULL,
        masked.image_keys(0, [0, 1]),
        SamplerConfig(num_steps=2),
        mask_token_id=MASK,
    )
    assert np.any(result[0] != result[1])


@quick
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"order": "halton", "halton_roll": True, "remasking": "rescale"},
        {"order": "random", "remasking": "cap", "remasking_choice": "confidence"},
    ],
    ids=["default", "halton", "random"],
)
def test_any_loop_may_drive_the_step(changes):
    sampler = SamplerConfig(num_steps=5, remasking_strength=0.5, **changes)
    tokens, labels = start_tokens(12, 7), jnp.arange(2)
    fused, trace = decode(tokens, sampler)
    batch = make_batch(tokens, sampler, labels, jnp.full_like(labels, NULL), mask=MASK)
    step = masked.make_step(
        prediction.whole(toy_logits),
        batch,
        sampler.program(),
        mask_token_id=MASK,
        grid_size=(3, 4),
    )
    step, state = jax.jit(step), masked.start_state(tokens)
    for i in range(5):
        state = step(i, state)
        np.testing.assert_array_equal(state.tokens, trace.tokens[i])
    np.testing.assert_array_equal(state.tokens, fused)


@functools.cache
def reveal_rates(images=6000):
    """How often the likelier of two tokens is revealed first, in each of three steps."""
    probability = jnp.array([[0.8, 0.2], [0.6, 0.4]])

    def logits_fn(tokens, _):
        logits = jnp.log(jnp.pad(probability, ((0, 0), (0, 1)), constant_values=0.5))
        return jnp.broadcast_to(logits, (len(tokens), 2, 3))

    sampler = SamplerConfig(
        num_steps=3, temperature=0.0, guidance_scale=1.0, gumbel_temperature=0.5
    )
    tokens, counts = jnp.full((images, 2), 2), jnp.ones((images, 3), jnp.int32)
    batch = make_batch(tokens, sampler, counts=counts)
    step = masked.make_step(prediction.whole(logits_fn), batch, sampler.program(), mask_token_id=2)
    state = masked.start_state(tokens)
    return [float(np.mean(step(i, state).tokens[:, 0] == 0)) for i in range(3)]


@quick
@pytest.mark.parametrize(("step", "fade"), [(0, 1.0), (1, 0.5)])
def test_confidence_has_gumbel_noise_that_fades(step, fade):
    # The difference of two Gumbel variables is logistic.
    gap = np.log(0.8) - np.log(0.6)
    expected = 1 / (1 + np.exp(-gap / (0.5 * fade)))
    assert reveal_rates()[step] == pytest.approx(expected, abs=0.02)


@quick
def test_the_last_step_has_no_noise():
    assert reveal_rates()[2] == 1


@functools.cache
def coin_tosses(step, reveal, images=4000):
    """Tokens [images, 2] after one step that reveals `reveal` of two fair coins."""
    sampler = SamplerConfig(num_steps=3, guidance_scale=1.0)
    tokens, counts = jnp.full((images, 2), 2), jnp.full((images, 3), reveal)
    toss = masked.make_step(
        prediction.whole(lambda tokens, _: jnp.zeros((*tokens.shape, 3))),
        make_batch(tokens, sampler, counts=counts),
        sampler.program(),
        mask_token_id=2,
    )
    return np.asarray(jax.jit(toss)(step, masked.start_state(tokens)).tokens)


@quick
def test_steps_images_and_positions_draw_independently():
    first, second = coin_tosses(0, 2), coin_tosses(1, 2)
    for a, b in [(first, second), (first[:, 0], first[:, 1]), (first[1:], first[:-1])]:
        assert np.mean(a == b) == pytest.approx(0.5, abs=0.04)


@quick
def test_which_token_is_revealed_does_not_depend_on_what_was_drawn():
    tokens = coin_tosses(0, 1)
    for position in range(2):
        codes = tokens[:, position][tokens[:, position] < 2]
        assert len(codes) == pytest.approx(2000, abs=150)
        assert np.mean(codes) == pytest.approx(0.5, abs=0.05)


@quick
def test_temperature_divides_the_logits():
    def logits_fn(tokens, _):
        return jnp.broadcast_to(jnp.array([0.0, 1.0, 5.0]), (*tokens.shape, 3))

    tokens = jnp.full((4, 2000), 2)
    for temperature in (1e-4, 0.25, 1.0, 4.0):
        sampler = SamplerConfig(num_steps=1, temperature=temperature, guidance_scale=1.0)
        result, _ = masked.decode(
            logits_fn, tokens, None, None, masked.image_keys(0, range(4)), sampler, mask_token_id=2
        )
        expected = 1 / (1 + np.exp(-1 / temperature))
        assert np.mean(result) == pytest.approx(expected, abs=0.02)


def test_image_keys_do_not_depend_on_their_neighbours():
    data = jax.random.key_data
    keys = masked.image_keys(7, np.arange(6))
    np.testing.assert_array_equal(data(keys[3]), data(masked.image_keys(7, [3])[0]))
    assert len(np.unique(data(keys), axis=0)) == 6
    assert np.any(data(keys) != data(masked.image_keys(8, np.arange(6))))


def test_more_steps_than_tokens_are_refused():
    with pytest.raises(ValueError, match="num_steps 13 is out of range; allowed: 1 to 12"):
        decode(start_tokens(3), SamplerConfig(num_steps=13))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 0}, "num_steps 0 is out of range; allowed: 1 or more"),
        ({"schedule": "cosin"}, "schedule 'cosin' is unknown; .*Did you mean 'cosine'"),
        ({"schedule_form": "ratio"}, "schedule_form 'ratio' is unknown; .*'mask_ratio'"),
        ({"guidance_schedule": "const"}, "Did you mean 'constant'"),
        ({"guidance_scale": -1.0}, "guidance_scale -1.0 is out of range"),
        ({"temperature": -1.0}, "temperature -1.0 is out of range; allowed: 0 or more, finite"),
        ({"temperature": 1e-30}, "temperature 1e-30 is too small .* 0 .* or at least 0.0001"),
        ({"gumbel_temperature": float("inf")}, "gumbel_temperature inf is out of range"),
        ({"temperature_annealing": -0.5}, "temperature_annealing -0.5 is out of range"),
        ({"temperature": 0.0, "temperature_annealing": 0.8}, "annealing 0.8 has no meaning"),
        ({"temperature": 0.0, "top_k": 5}, "top_k 5 has no meaning at temperature 0"),
        ({"temperature": 0.0, "top_p": 0.5}, "top_p 0.5 has no meaning .* leave it at 1"),
        ({"top_k": -1}, "top_k -1 is out of range; allowed: 0 .all codes. or more"),
        ({"top_p": 0.0}, "top_p 0.0 is out of range; allowed: more than 0, up to 1"),
        ({"top_p": 1.5}, "top_p 1.5 is out of range"),
        ({"order": "haltn"}, "order 'haltn' is unknown; .*Did you mean 'halton'"),
        ({"guidance_start": 0.5, "guidance_stop": 0.5}, "from 0.5 to 0.5 is no interval"),
        ({"guidance_stop": 1.1}, "from 0.0 to 1.1 is no interval"),
        ({"remasking": "conf"}, "remasking 'conf' is unknown; allowed: none, cap, rescale"),
        ({"remasking_strength": 1.5}, "remasking_strength 1.5 is out of range; allowed: 0 to 1"),
        ({"remasking_choice": "conf"}, "remasking_choice 'conf' is unknown"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**changes)
