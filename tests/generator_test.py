import dataclasses

import jax
import jaxtyping
import numpy as np
import pytest
import tiny

import maskgil_jax
from maskgil_jax import generation, pictures
from maskgil_jax.models import conditioning

quick = pytest.mark.usefixtures("quick_compilation")
FAMILIES = ("maskgil", "bidirectional-transformer")
LABELS = [0, 1, 0]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny.make_tokenizer_dir(tmp_path_factory.mktemp("tokenizer") / "vq")


@pytest.fixture(scope="module")
def generators(directory):
    """One per family, on one device, four images at a time; their programs are compiled once."""
    return {family: tiny.make_generator(directory, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def generator(generators):
    return generators["maskgil"]


def test_a_tokenizer_computes_in_the_type_asked_for(directory):
    stored = maskgil_jax.load_tokenizer(directory)
    half = maskgil_jax.load_tokenizer(directory, dtype="bfloat16")
    assert (stored.config.dtype, half.config.dtype) == ("float32", "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {np.dtype(np.float32)}
    assert half.fingerprint == stored.fingerprint
    tokens = np.random.default_rng(0).integers(0, 32, (2, 4, 4))
    exact, near = np.asarray(stored.decode(tokens)), np.asarray(half.decode(tokens))
    assert 0 < np.abs(near - exact).max() < 0.1 * np.abs(exact).max()
    with pytest.raises(ValueError, match="float16.*float32, bfloat16"):
        maskgil_jax.load_tokenizer(directory, dtype="float16")


@quick
@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_images_do_not_depend_on_the_batches(directory, batch_size):
    tokenizer = maskgil_jax.load_tokenizer(directory)
    tokens = np.random.default_rng(0).integers(0, 32, (3, 4, 6))
    images = maskgil_jax.decode_images(tokenizer, tokens)
    assert (images.shape, images.dtype) == ((3, 16, 24, 3), np.uint8)
    batched = maskgil_jax.decode_images(tokenizer, tokens, batch_size=batch_size)
    # A rounding in float32 may move a value over the edge between two grey levels.
    assert np.abs(batched.astype(int) - images).max() <= 1
    assert maskgil_jax.decode_images(tokenizer, tokens[:0]).shape == (0, 16, 24, 3)


def test_wrong_tokens_are_refused_before_decoding(directory):
    tokenizer = maskgil_jax.load_tokenizer(directory)
    with pytest.raises(ValueError, match="code 32"):
        maskgil_jax.decode_images(tokenizer, np.full((1, 4, 4), 32))
    with pytest.raises(ValueError, match="batch_size 0"):
        maskgil_jax.decode_images(tokenizer, np.zeros((1, 4, 4), int), batch_size=0)


@quick
def test_a_call_is_the_tokens_decoded(generator):
    images, tokens = generator(LABELS, seed=3), generator.tokens(LABELS, seed=3)
    assert (images.shape, images.dtype) == ((3, 16, 16, 3), np.uint8)
    assert (tokens.shape, tokens.min() >= 0, tokens.max() < 32) == ((3, 4, 4), True, True)
    np.testing.assert_array_equal(images, generator.decode(tokens))
    assert len({grid.tobytes() for grid in tokens}) == 3
    assert (tokens != generator.tokens(LABELS, seed=4)).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_traced_and_host_driven_loops_agree(generators, family, request):
    if family != "maskgil":
        # One family, optimised as it is for users, costs seconds enough.
        request.getfixturevalue("quick_compilation")
    generator, seen = generators[family], []
    # Five labels: a whole batch and a padded one.
    labels = [0, 1, 2, 1, 0]
    fused = generator.tokens(labels, num_steps=3)
    traced = generator(labels, num_steps=3, return_trace=True)
    driven = generator(
        labels, num_steps=3, callback=lambda *step: seen.append(step), return_trace=True
    )
    for made in (traced, driven):
        np.testing.assert_array_equal(made.tokens, fused)
        np.testing.assert_array_equal(made.trace, traced.trace)
        np.testing.assert_array_equal(made.images, traced.images)
    assert traced.trace.shape == (3, 5, 4, 4)
    np.testing.assert_array_equal(traced.trace[-1], fused)
    left = (traced.trace == 32).sum((2, 3))
    assert (np.diff(left, axis=0) < 0).all()
    assert left[0].max() < 16
    assert [step for step, _ in seen] == [0, 1, 2, 0, 1, 2]
    first, second = np.stack([grid for _, grid in seen[:3]]), np.stack([g for _, g in seen[3:]])
    np.testing.assert_array_equal(np.concatenate([first, second], axis=1), traced.trace)


@quick
def test_a_callback_that_raises_ends_the_generation(generator):
    steps = []

    def stop(step, tokens):
        steps.append(step)
        if step == 1:
            raise InterruptedError("enough")

    with pytest.raises(InterruptedError, match="enough"):
        generator(LABELS, num_steps=3, callback=stop)
    assert steps == [0, 1]


@quick
def test_an_image_does_not_depend_on_the_others_the_batches_or_the_devices(generator, directory):
    labels = [0, 1, 2, 1, 0, 0, 1, 1, 2, 0]
    ten = generator.tokens(labels)
    np.testing.assert_array_equal(generator.tokens(labels[:9]), ten[:9])
    together = tiny.make_generator(directory, devices=4, batch_size=64)
    np.testing.assert_array_equal(together.tokens(labels), ten)
    # Equal labels: nothing but its place tells one image from another.
    assert len({grid.tobytes() for grid in generator.tokens([1] * 4)}) == 4


@quick
def test_no_labels_give_no_images(generator):
    made = generator([], return_trace=True)
    assert made.images.shape == (0, 16, 16, 3)
    assert (made.tokens.shape, made.trace.shape) == ((0, 4, 4), (2, 0, 4, 4))


@quick
def test_settings_are_the_runs_unless_changed(generator):
    assert generator.sampler() == generator.sampler(num_steps=None)
    assert generator.sampler().num_steps == 2
    changed = generator.sampler(num_steps=3, order="halton", top_k=5)
    assert (changed.num_steps, changed.order, changed.top_k) == (3, "halton", 5)
    assert changed.schedule == generator.sampler().schedule
    greedy = dict(temperature=0.0, gumbel_temperature=0.0)
    first, second = generator.tokens(LABELS, **greedy), generator.tokens(LABELS, seed=9, **greedy)
    np.testing.assert_array_equal(first, second)
    assert (first != generator.tokens(LABELS)).any()


@pytest.mark.parametrize(
    ("request_", "match"),
    [
        (dict(labels=[0], num_step=3), "'num_step' is unknown.*Did you mean 'num_steps'"),
        (dict(labels=[0], order="haltom"), "order 'haltom' is unknown.*Did you mean 'halton'"),
        (dict(labels=[0], num_steps=17), "num_steps 17 is out of range; allowed: 1 to 16"),
        (dict(labels=[0], top_p=0.0), "top_p 0.0 is out of range"),
        (dict(labels=[0], guidance_scale=-1.0), "guidance_scale -1.0 is out of range"),
        (dict(labels=[3]), "label 3 is out of range; allowed: 0 to 2"),
        (dict(labels=[-1]), "label -1 is out of range"),
        (dict(labels=np.array([0.5])), "labels have type float64; give integers 0 to 2"),
        (dict(labels=np.zeros((1, 1, 1), int)), r"labels have shape \(1, 1, 1\)"),
        (dict(labels=[0], seed=-1), "seed -1 is out of range"),
        (dict(labels=[0], seed=2**32), "seed 4294967296 is out of range; allowed: 0 to 4294967295"),
        (dict(labels=[0], size=(16, 18)), "image width 18 is not a multiple.* 4; .* to 16"),
        (dict(labels=[0], size=(0, 16)), "image height 0 is not a multiple"),
    ],
)
def test_bad_requests_are_refused(generator, request_, match):
    with pytest.raises(ValueError, match=match):
        generator(**request_)


def test_a_generator_needs_the_tokenizer_of_its_model(generator):
    model = generator.model
    other = dataclasses.replace(model.config, codebook_size=31)
    with pytest.raises(ValueError, match="predicts 31 codes, but the tokenizer has 32"):
        maskgil_jax.ImageGenerator(
            dataclasses.replace(model, config=other), generator.tokenizer, batch_size=1
        )
    with pytest.raises(ValueError, match="batch_size 0"):
        maskgil_jax.ImageGenerator(model, generator.tokenizer, batch_size=0)


@quick
def test_size_asks_for_another_grid(generator):
    made = generator(LABELS, size=(8, 24), num_steps=2, return_trace=True)
    assert (made.tokens.shape, made.images.shape) == ((3, 2, 6), (3, 8, 24, 3))
    assert made.tokens.max() < 32
    # More steps than the trained grid has tokens, but not more than this one.
    assert generator.sampler((4, 6), num_steps=24).num_steps == 24
    with pytest.raises(ValueError, match=r"num_steps 13 is out of range.* 12, .* a 2×6 grid"):
        generator(LABELS, size=(8, 24), num_steps=13)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(size=32), r"size 32: give \(height, width\)"),
        (dict(size="32x48"), "size '32x48': give"),
        (dict(size=(24.0, 24)), "size .*whole numbers"),
        (dict(order="halton", halton_roll="no"), "halton_roll 'no' is neither True nor False"),
        (dict(rescale=1), "rescale 1 is neither"),
        (dict(top_k=5.0), "top_k 5.0 is no whole number"),
    ],
)
def test_values_of_another_type_are_refused(generator, monkeypatch, options, message):
    # As for users, whose calls no annotation checks.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        generator([1], **options)


@pytest.mark.parametrize("name", ["start", "decode", "grid_size"])
def test_what_is_no_setting_is_refused_by_name(generator, name):
    images, masks = np.zeros((1, 16, 16, 3), np.uint8), np.zeros((1, 16, 16), bool)
    masks[:, 4:8] = True
    calls = [
        lambda **given: generator([1], **given),
        lambda **given: generator.tokens([1], **given),
        lambda **given: generator.edit(images, masks, [1], **given),
        lambda **given: generator.vary(images, [1], **given),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"sampler setting '{name}' is unknown"):
            call(**{name: None})


@quick
def test_settings_that_are_numbers_are_not_compiled_anew(generator, caplog):
    settings = dict(num_steps=4, guidance_scale=2.0, guidance_schedule="linear", top_p=0.9)
    generator(LABELS, **settings)
    numbers = dict(
        guidance_scale=3.0,
        temperature=0.7,
        temperature_annealing=0.2,
        gumbel_temperature=1.0,
        top_p=0.5,
        schedule="cosine",
        schedule_form="mask_ratio",
    )
    with jax.log_compiles():
        images = generator([1, 1, 0], seed=5, **settings | numbers)
        assert "jit(run)" not in caplog.text
        assert (images != generator(LABELS, num_steps=3)).any()
    assert "jit(run)" in caplog.text


@quick
def test_images_that_begin_alike_are_computed_together_at_first(generator):
    tokens, labels = np.full((8, 16), 32), np.array([0, 1, 1, 0, 0, 0, 1, 1])
    shared = generation.find_shared(tokens, labels, shards=1)
    np.testing.assert_array_equal(shared.rows, [0, 1])
    np.testing.assert_array_equal(shared.groups, labels)
    np.testing.assert_array_equal(generation.find_shared(tokens, labels * 0, 2).rows, [0, 0])
    # Too many kinds, rows that the devices cannot share, too few images.
    tokens[2, 3] = 5
    assert generation.find_shared(tokens, labels, 1) is None
    assert generation.find_shared(tokens[3:], labels[3:], 2) is None
    assert generation.find_shared(tokens[:3], labels[:3], 1) is None
    wide = maskgil_jax.ImageGenerator(
        generator.model, generator.tokenizer, batch_size=8, mesh=generator.mesh
    )
    expected = generator(labels, seed=2, guidance_scale=2.0)
    alike = wide(labels, seed=2, guidance_scale=2.0, return_trace=True)
    assert np.abs(alike.images.astype(int) - expected).max() <= 1
    seen = []
    by_hand = wide(labels, seed=2, guidance_scale=2.0, callback=lambda i, x: seen.append(x))
    np.testing.assert_array_equal(np.stack(seen), alike.trace)
    np.testing.assert_array_equal(by_hand, alike.images)


@quick
def test_large_images_pass_the_tokenizer_in_tiles(generator, directory):
    small = generator(LABELS, seed=1)
    tiled = maskgil_jax.load_tokenizer(directory, tile_size=16)
    other = maskgil_jax.ImageGenerator(generator.model, tiled, batch_size=4, mesh=generator.mesh)
    np.testing.assert_array_equal(other(LABELS, seed=1), small)
    whole = generator(LABELS, seed=1, size=(16, 36), return_trace=True)
    parts = other(LABELS, seed=1, size=(16, 36), return_trace=True)
    # The codes are the model's, which knows of no tiles; pixels and what is encoded are not.
    np.testing.assert_array_equal(parts.tokens, whole.tokens)
    tokens = whole.tokens
    np.testing.assert_array_equal(parts.images, maskgil_jax.decode_images(tiled, tokens))
    assert (parts.images != whole.images).any()
    np.testing.assert_array_equal(parts.images, other.show_steps(parts.trace)[-1])
    expected = tiled.encode(pictures.to_float(whole.images), batch_size=4)
    np.testing.assert_array_equal(other.encode(whole.images), expected)
    assert (expected != generator.encode(whole.images)).any()


def test_learned_positions_serve_the_trained_size_only(generators):
    with pytest.raises(ValueError, match="4×6 tokens has no learned positions.*serves 4×4"):
        generators["bidirectional-transformer"](LABELS, size=(16, 24))


@quick
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixture_of_one_class_is_the_class(generators, family):
    pure = np.eye(3, dtype=np.float32)[[0, 1, 2]]
    generator = generators[family]
    np.testing.assert_array_equal(generator.tokens(pure), generator.tokens([0, 1, 2]))


def test_mixtures_lie_between_two_classes():
    mixed = maskgil_jax.mix_labels(0, 2, np.array([0, 0.25, 1]), num_classes=2)
    np.testing.assert_array_equal(mixed, [[1, 0, 0], [0.75, 0, 0.25], [0, 0, 1]])
    assert mixed.dtype == np.float32
    with pytest.raises(ValueError, match="label 3 is out of range; allowed: 0 to 2"):
        maskgil_jax.mix_labels(0, 3, [0.5], num_classes=2)
    for share in (-0.25, 1.5, float("nan")):
        with pytest.raises(ValueError, match=f"share {share:g} of the second class is out of"):
            maskgil_jax.mix_labels(0, 1, [0.5, share], num_classes=2)


@pytest.mark.parametrize(
    "mixture", [[[0.5, 0.4, 0.0]], [[0.5, 0.5]], [[0.2] * 5], [[np.nan, 0.5, 0.5]], [[np.inf] * 3]]
)
def test_wrong_mixtures_are_refused(mixture):
    with pytest.raises(ValueError, match=r"give \[b, 3\].* rows that sum to 1"):
        conditioning.check_labels(np.array(mixture), 2)


def test_a_mixture_has_no_negative_weight():
    with pytest.raises(ValueError, match="has the weight -0.5; weights are 0 or more"):
        conditioning.check_labels(np.array([[0.5, 0.5, 0.0], [1.5, -0.5, 0.0]]), 2)


@quick
def test_steps_are_shown_as_they_will_look_and_grey_where_masked(generator):
    # Drawn by hand: a token is taken back and becomes another.
    tokens = np.random.default_rng(0).integers(0, 32, (2, 4, 4))
    trace = np.stack([tokens] * 4)
    trace[:2, :, 1, 2] = trace[2, 0, 3, 3] = 32
    trace[:2, 0, 3, 3] = (tokens[0, 3, 3] + 1) % 32
    shown = generator.show_steps(trace)
    assert (shown.shape, shown.dtype) == ((4, 2, 16, 16, 3), np.uint8)
    np.testing.assert_array_equal(shown[3], generator.decode(tokens))
    assert (shown[:2, :, 4:8, 8:12] == 128).all()
    assert (shown[2, 0, 12:, 12:] == 128).all()
    np.testing.assert_array_equal(shown[2, 0, :12], shown[3, 0, :12])
    np.testing.assert_array_equal(shown[:3, 1, 8:], shown[1:, 1, 8:])
    assert (shown[1, 0, 12:, 12:] != shown[3, 0, 12:, 12:]).any()
    # As a callback sees them, unfinished.
    assert (generator.show_steps(trace[:1])[0, :, 4:8, 8:12] == 128).all()


@pytest.mark.parametrize(
    ("trace", "match"),
    [
        (np.full((1, 1, 4, 4), 33), "token 33 is out of range"),
        (np.zeros((0, 1, 4, 4), int), r"shape \(0, 1, 4, 4\); give \[t b gh gw\], t at least 1"),
    ],
)
def test_what_is_no_trace_is_not_shown(generator, trace, match):
    with pytest.raises(ValueError, match=match):
        generator.show_steps(trace)


def test_codes_come_without_a_trace(generator):
    with pytest.raises(ValueError, match="return_trace has no meaning here"):
        generator.tokens([1], return_trace=True)


@pytest.mark.parametrize("order", ["confidence", "halton", "random"])
def test_a_model_that_gives_no_numbers_is_refused(generator, order):
    broken = dataclasses.replace(
        generator.model, params=jax.tree.map(lambda x: x * np.nan, generator.model.params)
    )
    with pytest.raises(ValueError, match="no numbers .NaN. for image 5"):
        maskgil_jax.ImageGenerator(broken, generator.tokenizer)([1, 0], order=order, first_index=5)


@pytest.mark.parametrize(
    "settings",
    [
        {"halton_roll": True},
        {"order": "halton", "gumbel_temperature": 1.0},
        {"remasking_strength": 0.5},
        {"remasking_choice": "confidence"},
        {"guidance_schedule": "linear", "guidance_power": 2.0},
    ],
)
def test_settings_without_effect_are_refused(generator, settings):
    name = list(settings)[-1]
    with pytest.raises(ValueError, match=f"{name} .* has no meaning with"):
        generator.tokens([1], **settings)


def test_numbers_of_images_that_wrap_around_are_refused(generator):
    with pytest.raises(ValueError, match="first_index 4294967296 is out of range"):
        generator([1], first_index=2**32)
