"""Generation from prompts by a language model that begins what a masked model completes."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny
import tiny_text

import maskgil_jax
from maskgil_jax import drafts, generation, lumina, sharding
from maskgil_jax.build import models as build
from maskgil_jax.checkpoints import write_model_dir
from maskgil_jax.generator import ImageGenerator
from maskgil_jax.models.chameleon import ChameleonConfig
from maskgil_jax.models.maskgil_text import MaskGILTextConfig
from maskgil_jax.sample import sample

PROMPTS = ["a red dog", "a cat", "image of a dog to the cat"]
GRID = (4, 4)
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny.make_tokenizer_dir(tmp_path_factory.mktemp("inputs") / "vq", levels=5)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_text.make_lumina_dir(tmp_path_factory.mktemp("lumina") / "model")


@pytest.fixture(scope="module")
def causal(directory):
    return lumina.Lumina.load(directory, mesh=sharding.make_mesh({}, jax.devices()[:1]))


@pytest.fixture(scope="module")
def alone(tokenizer):
    return tiny.make_generator(tokenizer, "maskgil-text")


@pytest.fixture(scope="module")
def fused(tokenizer, causal):
    return tiny.make_generator(tokenizer, "maskgil-text", ar_model=causal)


@pytest.fixture
def no_draw(monkeypatch):
    def draw(*args, **options):
        raise AssertionError("the language model was asked")

    monkeypatch.setattr(lumina.Lumina, "draw", draw)


def complete(alone, start, **settings):
    """What the masked model makes of codes, by the function under the generator."""
    model = alone.model
    return generation.generate(
        model.config,
        model.params,
        build.read_prompts(model.config, PROMPTS),
        alone.sampler(None, **settings),
        tokenizer=alone.tokenizer,
        seed=1,
        batch_size=4,
        mesh=alone.mesh,
        start=start,
    )


def test_the_language_model_begins_and_the_masked_one_completes(causal, alone, fused):
    begun = causal.draw(PROMPTS, GRID, share=0.5, seed=1, batch_size=4)
    assert (begun.reshape(3, 16)[:, :8] < 32).all()
    expected = complete(alone, begun, num_steps=3)
    options = dict(prompts=PROMPTS, seed=1, ar_share=0.5, num_steps=3)
    made = fused(**options, return_trace=True)
    np.testing.assert_array_equal(made.tokens, expected.tokens)
    np.testing.assert_array_equal(made.images, expected.images)
    np.testing.assert_array_equal(made.tokens.reshape(3, 16)[:, :8], begun.reshape(3, 16)[:, :8])
    assert made.tokens.max() < 32
    assert made.images.shape == (3, 64, 64, 3)
    assert len(made.trace) == 3
    np.testing.assert_array_equal(fused.tokens(**options), made.tokens)
    seen = []
    fused(**options, callback=lambda step, tokens: seen.append(tokens))
    np.testing.assert_array_equal(seen[-1], made.tokens)


def test_an_image_depends_on_its_prompt_and_its_number_alone(fused):
    options = dict(seed=3, ar_share=0.5, size=(64, 96))
    tokens = fused.tokens(prompts=PROMPTS * 2, **options)
    assert tokens.shape == (6, 4, 6)
    rest = fused.tokens(prompts=PROMPTS[1:], first_index=1, **options)
    np.testing.assert_array_equal(rest, tokens[1:3])
    assert (tokens[:3] != tokens[3:]).any((1, 2)).all()


def test_without_a_share_the_language_model_is_not_asked(alone, fused, no_draw):
    np.testing.assert_array_equal(
        fused.tokens(prompts=PROMPTS, seed=1, ar_share=0.0), alone.tokens(prompts=PROMPTS, seed=1)
    )
    with pytest.raises(AssertionError, match="was asked"):
        fused.tokens(prompts=PROMPTS, seed=1)


def test_settings_and_negative_prompts_are_the_language_models_too(causal, fused):
    sampler = causal.sampler(temperature=0.0, guidance_scale=3.0)
    options = dict(ar_share=0.5, ar_temperature=0.0, ar_guidance_scale=3.0, ar_top_p=None)
    for negative in (None, "a cat"):
        given = None if negative is None else [negative] * 3
        begun = causal.draw(PROMPTS, GRID, share=0.5, sampler=sampler, negative_prompts=given)
        tokens = fused.tokens(prompts=PROMPTS, negative_prompt=negative, **options)
        np.testing.assert_array_equal(tokens[:, :2], begun[:, :2])
    settings = fused.drafter.describe({"top_k": 3}, 0.5).settings
    assert settings == {
        "ar_model": causal.fingerprint,
        "ar_share": 0.5,
        "ar_guidance_scale": 4.0,
        "ar_guided_tokens": 0,
        "ar_temperature": 1.0,
        "ar_top_k": 3,
        "ar_top_p": 1.0,
    }
    with pytest.raises(ValueError, match=r"setting ar_ 'temprature' is unknown.*'temperature'"):
        fused.tokens(prompts=PROMPTS, ar_temprature=0.5)
    with pytest.raises(ValueError, match="top_p 2.0 is out of range"):
        fused.tokens(prompts=PROMPTS, ar_top_p=2.0)


@pytest.fixture
def calls(monkeypatch):
    """How often each model is run, counted while the program runs."""
    counts = {"causal": 0, "masked": 0}

    def spy(function, name):
        def count():
            counts[name] += 1

        def call(*given):
            jax.debug.callback(count)
            return function(*given)

        return call

    make_cached, make_predictor = ChameleonConfig.make_cached, build.make_predictor

    class Counted:
        def __init__(self, model):
            self.start, self.step = spy(model.start, "causal"), spy(model.step, "causal")

    def make_masked(*args):
        predictor = make_predictor(*args)
        return dataclasses.replace(predictor, features=spy(predictor.features, "masked"))

    monkeypatch.setattr(ChameleonConfig, "make_cached", lambda *args: Counted(make_cached(*args)))
    monkeypatch.setattr(build, "make_predictor", make_masked)
    programs = (generation.make_generate_fn, lumina._make_draw_fn)
    for program in programs:
        program.cache_clear()
    yield counts
    for program in programs:
        program.cache_clear()


@pytest.mark.parametrize(
    ("share", "steps"),
    # Of 64 codes; and where a row ends and another begins, its new line is read too.
    [(0.75, (48 + 5, 8)), (0.25, (16 + 1, 8)), (0.0, (0, 8)), (1.0, (64 + 7, 0))],
)
def test_steps_are_codes_new_lines_and_masked_steps(tokenizer, causal, calls, share, steps):
    fields = {"grid_size": (8, 8)}
    generator = tiny.make_generator(
        tokenizer, "maskgil-text", fields, ar_model=causal, batch_size=1
    )
    tokens = generator.tokens(prompts=PROMPTS[:1], ar_share=share, num_steps=8)
    jax.effects_barrier()
    assert (calls["causal"], calls["masked"]) == steps
    if share == 1:
        np.testing.assert_array_equal(tokens, causal.draw(PROMPTS[:1], (8, 8)))


def test_images_computed_alone_are_the_same_in_any_batch(tokenizer, causal):
    generator = tiny.make_generator(
        tokenizer, "maskgil-text", ar_model=causal, ar_share=0.5, batch_invariant=True, devices=2
    )
    tokens = generator.tokens(prompts=PROMPTS)
    one = generator.tokens(prompts=PROMPTS[2:], first_index=2)
    np.testing.assert_array_equal(one[0], tokens[2])


def test_both_models_compute_on_their_own_mesh(tokenizer, directory, fused):
    split = lumina.Lumina.load(directory, mesh=sharding.make_mesh({"tensor": 2}, jax.devices()[2:]))
    generator = tiny.make_generator(tokenizer, "maskgil-text", ar_model=split, devices=2)
    assert not split.params["head"]["kernel"].sharding.is_fully_replicated
    options = dict(prompts=PROMPTS, seed=1, ar_share=0.5)
    np.testing.assert_array_equal(generator.tokens(**options), fused.tokens(**options))
    with pytest.raises(ValueError, match="batch_invariant needs the parameters whole.*'tensor': 2"):
        tiny.make_generator(tokenizer, "maskgil-text", ar_model=split, batch_invariant=True)


def test_all_in_which_models_differ_is_listed(tokenizer, alone, causal, tmp_path):
    fields = alone.model.config.to_dict()
    spec = dataclasses.replace(alone.tokenizer.spec, downsample_factor=8)
    wrong = MaskGILTextConfig.from_dict(fields | {"codebook_size": 16, "grid_size": [5, 4]})
    with pytest.raises(
        ValueError,
        match="do not go together: codebook_size is 32 and 16; pixels per code are 16 and 8; a "
        "grid of 5 rows has no size in this vocabulary; allowed: multiples of 2 from 2 to 64$",
    ):
        drafts.check_lumina(causal, wrong, spec)
    with pytest.raises(ValueError, match="conditioned on prompts and on 2 classes$"):
        tiny.make_generator(tokenizer, "maskgil", ar_model=causal)
    with pytest.raises(ValueError, match="the second, of family 'llamagen-text', is causal$"):
        tiny.make_generator(tokenizer, "llamagen-text", ar_model=causal)
    with pytest.raises(ValueError, match="share 1.5 of the tokens is out of range"):
        tiny.make_generator(tokenizer, "maskgil-text", ar_model=causal, ar_share=1.5)


def test_what_has_no_meaning_is_refused(tokenizer, causal, alone, fused):
    with pytest.raises(ValueError, match="no steps to call back"):
        fused(prompts=PROMPTS, ar_share=1.0, return_trace=True)
    with pytest.raises(ValueError, match="prompt 0 .* that spell images; leave them out"):
        fused(prompts=["a <racm3:break> dog"])
    with pytest.raises(ValueError, match="give prompts"):
        fused([0])
    with pytest.raises(ValueError, match="first_index -1 is out of range"):
        fused(prompts=PROMPTS, first_index=-1)
    with pytest.raises(ValueError, match="an edit keeps tokens"):
        fused.vary(np.zeros((3, 64, 64, 3), np.uint8), prompts=PROMPTS, ar_share=0.5)
    run = alone.model.run.copy_and_resolve_references()
    run.data.buckets = "none"
    free = ImageGenerator(
        dataclasses.replace(alone.model, run=run), alone.tokenizer, ar_model=causal, batch_size=4
    )
    with pytest.raises(ValueError, match="a grid of 5 columns has no size.*multiples of 2 from 2"):
        free.tokens(prompts=PROMPTS, size=(64, 80))


def test_prompts_are_refused_before_the_first_image(fused, no_draw):
    fused.check_prompts(PROMPTS, size=(64, 64))
    with pytest.raises(ValueError, match="prompt 1 .* that spell images; leave them out"):
        fused.check_prompts(["a cat", "a <racm3:break> dog"])


def test_the_command_line_takes_its_directory(tokenizer, directory, alone, tmp_path, capsys):
    write_model_dir(
        tmp_path / "masked",
        kind="model",
        family="maskgil-text",
        config=alone.model.config.to_dict(),
        params=alone.model.params,
    )
    begin = dict(ar_checkpoint=str(directory), ar_share=0.5, tokenizer=str(tokenizer), batch_size=4)
    settings = dict(prompts=PROMPTS, num_steps=3, ar_temperature=0.0)
    sample(tmp_path / "masked", tmp_path / "a.npz", **begin, **settings)
    said = capsys.readouterr().out
    assert "the first 50% of the tokens token by token, guidance 4, temperature 0" in said
    generator = ImageGenerator.from_checkpoint(
        tmp_path / "masked", mesh=sharding.make_mesh({"data": -1}), **begin
    )
    assert isinstance(generator.drafter.model, maskgil_jax.Lumina)
    assert dict(generator.drafter.model.mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 4}
    with np.load(tmp_path / "a.npz") as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], generator(**settings))
    begin["tokenizer"] = str(tiny.make_tokenizer_dir(tmp_path / "vq"))
    with pytest.raises(ValueError, match="pixels per code are 16 and 4"):
        sample(tmp_path / "masked", tmp_path / "b.npz", **begin, **settings)
    assert not (tmp_path / "b.npz").exists()
