"""Generation by a causal model, and by one that begins what a masked model completes."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from maskgil_jax import generation
from maskgil_jax.build import models as build
from maskgil_jax.generator import ImageGenerator

LABELS = [0, 1, 2, 1, 0]
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny.make_tokenizer_dir(tmp_path_factory.mktemp("tokenizer") / "vq")


@pytest.fixture(scope="module")
def causal(directory):
    return tiny.make_generator(directory, "llamagen")


def make_fused(directory, causal, **options):
    return tiny.make_generator(directory, ar_model=causal.model, **options)


@pytest.fixture(scope="module")
def fused(directory, causal):
    return make_fused(directory, causal)


@pytest.fixture
def calls(monkeypatch):
    """How often each model is run, counted while the program runs."""
    counts = {"causal": 0, "masked": 0}

    def count(name):
        counts[name] += 1

    def spied(make, name, method):
        def spy(*args):
            predictor = make(*args)

            def call(*given):
                jax.debug.callback(lambda: count(name))
                return getattr(predictor, method)(*given)

            return dataclasses.replace(predictor, **{method: call})

        return spy

    generation.make_generate_fn.cache_clear()
    causal = spied(build.make_causal_predictor, "causal", "step")

    def also_start(*args):
        predictor = causal(*args)

        def start(*given):
            jax.debug.callback(lambda: count("causal"))
            return predictor.start(*given)

        return dataclasses.replace(predictor, start=start)

    monkeypatch.setattr(build, "make_causal_predictor", also_start)
    monkeypatch.setattr(build, "make_predictor", spied(build.make_predictor, "masked", "features"))
    yield counts
    generation.make_generate_fn.cache_clear()


def test_a_causal_model_generates_and_depends_on_label_seed_and_number(causal):
    images = causal(LABELS, seed=1)
    assert images.shape == (5, 16, 16, 3)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(causal(LABELS[3:], seed=1, first_index=3), images[3:])
    tokens = causal.tokens([0] * 4, seed=1)
    assert len({grid.tobytes() for grid in tokens}) == 4
    assert (causal.tokens([1] * 4, seed=1) != tokens).any()
    assert (causal.tokens([0] * 4, seed=2) != tokens).any()


def test_images_computed_alone_are_the_same_in_any_batch(directory):
    made = [
        tiny.make_generator(
            directory, "llamagen", batch_invariant=True, devices=devices, batch_size=size
        )(LABELS)
        for devices, size in ((1, 1), (1, 8), (2, 4))
    ]
    for images in made[1:]:
        np.testing.assert_array_equal(images, made[0])


def test_the_causal_model_begins_and_the_masked_one_completes(causal, fused):
    whole = causal.tokens(LABELS, seed=1).reshape(5, 16)
    for share, count in ((0.25, 4), (0.5, 8), (1.0, 16)):
        tokens = fused.tokens(LABELS, seed=1, ar_share=share).reshape(5, 16)
        np.testing.assert_array_equal(tokens[:, :count], whole[:, :count])
        assert count == 16 or (tokens[:, count:] != whole[:, count:]).any()
        assert tokens.max() < 32
    default = fused.tokens(LABELS, seed=1).reshape(5, 16)
    np.testing.assert_array_equal(default[:, :4], whole[:, :4])


def test_no_share_is_the_masked_model_alone(directory, fused):
    alone = tiny.make_generator(directory)
    np.testing.assert_array_equal(
        fused.tokens(LABELS, seed=1, ar_share=0.0), alone.tokens(LABELS, seed=1)
    )


def test_the_masked_model_sees_what_the_causal_one_drew(fused):
    made = fused(LABELS, seed=1, ar_share=0.5, num_steps=1, temperature=0.0, return_trace=True)
    start = np.where(np.arange(16) < 8, made.tokens.reshape(5, 16), 32).reshape(5, 4, 4)
    alone = fused._complete(LABELS, start, seed=1, num_steps=1, temperature=0.0)
    np.testing.assert_array_equal(alone.tokens, made.tokens)
    assert (start[:, :2] < 32).all()
    assert (made.trace[-1] == made.tokens).all()


def test_steps_on_the_host_are_those_of_one_program(fused):
    seen = []
    made = fused(
        LABELS,
        seed=1,
        ar_share=0.5,
        num_steps=3,
        callback=lambda i, tokens: seen.append(tokens),
        return_trace=True,
    )
    np.testing.assert_array_equal(made.images, fused(LABELS, seed=1, ar_share=0.5, num_steps=3))
    assert len(seen) == 6  # two batches
    np.testing.assert_array_equal(np.concatenate(seen[2::3]), made.tokens)


def test_settings_of_both_decoders_are_told_apart(causal, fused):
    greedy = causal.tokens(LABELS, temperature=0.0).reshape(5, 16)
    made = fused.tokens(LABELS, ar_share=0.5, ar_temperature=0.0).reshape(5, 16)
    np.testing.assert_array_equal(made[:, :8], greedy[:, :8])
    assert (fused.tokens(LABELS, ar_share=0.5).reshape(5, 16)[:, :8] != greedy[:, :8]).any()


@pytest.mark.parametrize(
    ("share", "steps"), [(0.75, (192, 8)), (0.5, (128, 8)), (0.25, (64, 8)), (0.0, (0, 8))]
)
def test_steps_of_a_fusion_are_those_of_the_paper(directory, calls, share, steps):
    fields = {"grid_size": (16, 16), "num_classes": 3}
    model = tiny.make_generator(directory, "llamagen", fields).model
    generator = tiny.make_generator(directory, fields=fields, ar_model=model, batch_size=1)
    generator.tokens([0], ar_share=share, num_steps=8)
    jax.effects_barrier()
    assert (calls["causal"], calls["masked"]) == steps


def test_models_that_do_not_go_together_are_told_apart(directory, causal):
    with pytest.raises(ValueError, match=r"codebook_size is 32 and 16.*grid_size is .4, 4. and .2"):
        make_fused_from(causal, codebook_size=16, grid_size=(2, 2))
    with pytest.raises(ValueError, match="conditioned on 2 classes and on 3 classes"):
        make_fused_from(causal, num_classes=3)
    with pytest.raises(ValueError, match="is causal"):
        ImageGenerator(causal.model, causal.tokenizer, ar_model=causal.model)
    masked = tiny.make_generator(directory)
    with pytest.raises(ValueError, match="'maskgil', is not causal"):
        ImageGenerator(masked.model, masked.tokenizer, ar_model=masked.model)


def make_fused_from(causal, **changes):
    from maskgil_jax.drafts import check_together
    from maskgil_jax.models.maskgil import MaskGILConfig

    fields = causal.model.config.to_dict()
    check_together(causal.model.config, MaskGILConfig.from_dict(fields | changes))


def test_what_has_no_meaning_is_refused(directory, causal, fused):
    with pytest.raises(ValueError, match="sampler setting 'num_steps' is unknown"):
        causal([0], num_steps=4)
    with pytest.raises(ValueError, match="no steps to call back"):
        causal([0], return_trace=True)
    with pytest.raises(ValueError, match="share 1.5 of the tokens is out of range"):
        fused([0], ar_share=1.5)
    with pytest.raises(ValueError, match="setting ar_ 'steps' is unknown"):
        fused([0], ar_steps=3)
    with pytest.raises(ValueError, match="an edit keeps tokens"):
        fused.vary(np.zeros((1, 16, 16, 3), np.uint8), [0], ar_share=0.5)
    with pytest.raises(ValueError, match="there is no causal model to begin with"):
        tiny.make_generator(directory)([0], ar_share=0.5)


def test_a_share_without_a_causal_model_is_refused(directory):
    with pytest.raises(ValueError, match="ar_share 0.5: there is no causal model"):
        tiny.make_generator(directory, ar_share=0.5)
