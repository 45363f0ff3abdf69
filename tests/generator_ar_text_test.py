"""Generation from prompts by a causal model, and by one that a masked model completes."""

import dataclasses

import numpy as np
import pytest
import tiny

from maskgil_jax import drafts, sample
from maskgil_jax.models.llamagen_text import LlamaGenTextConfig
from maskgil_jax.models.maskgil_text import MaskGILTextConfig

PROMPTS = ["a red seven", "two blue ones left of a three", "höhe"]
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny.make_tokenizer_dir(tmp_path_factory.mktemp("inputs") / "tokenizer")


@pytest.fixture(scope="module")
def causal(tokenizer):
    return tiny.make_generator(tokenizer, "llamagen-text")


@pytest.fixture(scope="module")
def fused(tokenizer, causal):
    return tiny.make_generator(tokenizer, "maskgil-text", ar_model=causal.model)


def test_an_image_depends_on_its_prompt_and_its_number_alone(causal):
    tokens = causal.tokens(prompts=PROMPTS * 2, seed=3)
    assert tokens.shape == (6, 4, 4)
    np.testing.assert_array_equal(
        causal.tokens(prompts=PROMPTS[1:], seed=3, first_index=1), tokens[1:3]
    )
    assert (tokens[:3] != tokens[3:]).any((1, 2)).all()
    other = causal.tokens(prompts=[PROMPTS[2], PROMPTS[0], "a four"], seed=3)
    assert (other != tokens[:3]).any((1, 2)).all()
    assert causal(prompts=PROMPTS, size=(16, 24)).shape == (3, 16, 24, 3)


def test_guidance_leads_away_from_the_negative_prompt(causal):
    plain = causal.tokens(prompts=PROMPTS, guidance_scale=4.0)
    one = causal.tokens(prompts=PROMPTS, guidance_scale=4.0, negative_prompt="a four")
    assert (plain != one).any()
    # Away from itself there is no direction: the model's own prediction is left.
    itself = causal.tokens(prompts=PROMPTS, guidance_scale=4.0, negative_prompt=PROMPTS)
    alone = causal.tokens(prompts=PROMPTS, guidance_scale=1.0)
    assert (plain != alone).any()
    assert (itself == alone).mean() > 0.9


def test_images_computed_alone_are_the_same_in_any_batch(tokenizer):
    alone = tiny.make_generator(tokenizer, "llamagen-text", batch_invariant=True, devices=2)
    tokens = alone.tokens(prompts=PROMPTS)
    for number, prompt in enumerate(PROMPTS):
        one = alone.tokens(prompts=[prompt], first_index=number)
        np.testing.assert_array_equal(one[0], tokens[number])


def test_the_causal_model_begins_and_the_masked_one_completes(causal, fused):
    whole = causal.tokens(prompts=PROMPTS, seed=1).reshape(3, 16)
    tokens = fused.tokens(prompts=PROMPTS, seed=1, ar_share=0.5).reshape(3, 16)
    np.testing.assert_array_equal(tokens[:, :8], whole[:, :8])
    assert (tokens[:, 8:] != whole[:, 8:]).any()
    assert tokens.max() < 32
    against = dict(negative_prompt="a four", seed=1)
    whole = causal.tokens(prompts=PROMPTS, **against).reshape(3, 16)
    tokens = fused.tokens(prompts=PROMPTS, ar_share=0.5, **against).reshape(3, 16)
    np.testing.assert_array_equal(tokens[:, :8], whole[:, :8])


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"text_length": 32}, "on captions of up to 64 bytes and on captions of up to 32 bytes$"),
        ({"text": "features"}, "64 bytes and on captions of up to 64 features of width 16$"),
        ({"codebook_size": 16}, "codebook_size is 32 and 16$"),
    ],
)
def test_models_that_read_other_captions_do_not_go_together(causal, changes, match):
    fields = causal.model.config.to_dict() | {"null_length": 1}
    with pytest.raises(ValueError, match=match):
        drafts.check_together(causal.model.config, MaskGILTextConfig.from_dict(fields | changes))


def test_bytes_may_be_read_in_another_way(causal):
    fields = causal.model.config.to_dict() | {"null_length": 2, "text_width": 32, "byte_patch": 4}
    drafts.check_together(causal.model.config, MaskGILTextConfig.from_dict(fields))


def test_features_must_be_of_the_same_encoder(tokenizer, causal, monkeypatch):
    @dataclasses.dataclass
    class Encoder:
        fingerprint: str
        jittable = False
        name = "spelling"
        width, max_length = 16, 64

        def tokenize(self, prompts):
            raise AssertionError("nothing is read here")

        def encode(self, ids, lengths):
            raise AssertionError("nothing is read here")

    fields = causal.model.config.to_dict() | {"text": "features"}
    run = causal.model.run.copy_and_resolve_references()
    run.text.encoder = "theirs"
    run.tokenizer.path = str(tokenizer)
    model = dataclasses.replace(causal.model, config=LlamaGenTextConfig.from_dict(fields), run=run)
    monkeypatch.setattr("maskgil_jax.loading.load_model", lambda path: model)
    monkeypatch.setattr(
        "maskgil_jax.loading.load_text_encoder", lambda path, **options: Encoder("0")
    )
    assert drafts.load_drafting("run", causal.tokenizer, Encoder("0")) is model
    with pytest.raises(ValueError, match="run was trained on the features of spelling"):
        drafts.load_drafting("run", causal.tokenizer, Encoder("1"))


def test_the_command_line_fuses_from_prompts(fused, monkeypatch, tmp_path):
    models = {"run": fused.model, "ar": fused.drafter.model}
    monkeypatch.setattr("maskgil_jax.loading.load_model", lambda path: models[path])
    monkeypatch.setattr(
        "maskgil_jax.loading.open_tokenizer", lambda *args, **options: fused.tokenizer
    )
    options = dict(prompts=PROMPTS, batch_size=4, ar_checkpoint="ar")
    sample.sample("run", tmp_path / "a.npz", **options, ar_share=0.5, ar_temperature=0.0)
    with np.load(tmp_path / "a.npz") as arrays:
        images = fused(prompts=PROMPTS, ar_share=0.5, ar_temperature=0.0).astype(int)
        # Another batch size may round a pixel otherwise.
        np.testing.assert_allclose(arrays["arr_0"], images, atol=1, rtol=0)
