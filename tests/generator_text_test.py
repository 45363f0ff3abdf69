"""Generation from prompts."""

import re

import numpy as np
import pytest
import tiny

from maskgil_jax import sample
from maskgil_jax.asked import read_prompts
from maskgil_jax.text.prompts import encode_bytes

PROMPTS = ["a red seven", "two blue ones left of a three", "höhe"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny.make_tokenizer_dir(tmp_path_factory.mktemp("inputs") / "tokenizer")


@pytest.fixture(scope="module")
def generator(tokenizer):
    return tiny.make_generator(tokenizer, "maskgil-text")


@pytest.fixture(scope="module")
def by_class(tokenizer):
    return tiny.make_generator(tokenizer)


def test_an_image_depends_on_its_prompt_and_its_number_alone(generator):
    tokens = generator.tokens(prompts=PROMPTS * 2, seed=3)
    assert tokens.shape == (6, 4, 4)
    np.testing.assert_array_equal(
        generator.tokens(prompts=PROMPTS[1:], seed=3, first_index=1), tokens[1:3]
    )
    # The same prompt again is another image; another prompt in its place too.
    assert (tokens[:3] != tokens[3:]).any((1, 2)).all()
    other = generator.tokens(prompts=[PROMPTS[2], PROMPTS[0], "a four"], seed=3)
    assert (other != tokens[:3]).any()
    # Blanks around it and the way accents are written are no part of it.
    same = generator.tokens(prompts=["  a red seven ", PROMPTS[1], "ho\u0308he"], seed=3)
    np.testing.assert_array_equal(same, tokens[:3])
    images = generator(prompts=PROMPTS, seed=3, size=(16, 24))
    assert images.shape == (3, 16, 24, 3)


@pytest.mark.parametrize("negative", ["", ["a four", " ", "a nine"]])
def test_an_empty_negative_prompt_is_named(generator, negative):
    with pytest.raises(ValueError, match=r"negative_prompt '.?' is empty; leave it out"):
        generator.tokens(prompts=PROMPTS, negative_prompt=negative)


def test_guidance_leads_away_from_the_negative_prompt(generator):
    plain = generator.tokens(prompts=PROMPTS, guidance_scale=4.0)
    one = generator.tokens(prompts=PROMPTS, guidance_scale=4.0, negative_prompt="a four")
    each = generator.tokens(
        prompts=PROMPTS, guidance_scale=4.0, negative_prompt=["a four", "a four", "a nine"]
    )
    assert (plain != one).any()
    np.testing.assert_array_equal(one[:2], each[:2])
    assert (one[2] != each[2]).any()
    # Away from itself there is no direction: the model's own prediction is left.
    itself = generator.tokens(prompts=PROMPTS, guidance_scale=4.0, negative_prompt=PROMPTS)
    alone = generator.tokens(prompts=PROMPTS, guidance_scale=1.0)
    assert (itself == alone).mean() > 0.9


def test_prompts_edit_too(generator):
    images = generator(prompts=PROMPTS, seed=1)
    masks = np.zeros((3, 16, 16), bool)
    masks[:, :8] = True
    made = generator.edit(images, masks, prompts=["a four"] * 3, seed=2)
    np.testing.assert_array_equal(made.images[:, 8:], images[:, 8:])
    wide = generator.outpaint(images, (0, 0, 0, 8), prompts=PROMPTS)
    assert wide.images.shape == (3, 16, 24, 3)
    varied = generator.vary(images, prompts=PROMPTS, keep=0.5)
    assert varied.images.shape == images.shape


def test_images_alone_are_those_of_a_batch(tokenizer):
    alone = tiny.make_generator(tokenizer, "maskgil-text", batch_invariant=True)
    tokens = alone.tokens(prompts=PROMPTS)
    for number, prompt in enumerate(PROMPTS):
        one = alone.tokens(prompts=[prompt], first_index=number)
        np.testing.assert_array_equal(one[0], tokens[number])


def test_a_callback_sees_the_same_tokens(generator):
    seen = []
    tokens = generator.tokens(prompts=PROMPTS, num_steps=3, callback=lambda i, t: seen.append(t))
    np.testing.assert_array_equal(seen[-1], tokens)
    np.testing.assert_array_equal(generator.tokens(prompts=PROMPTS, num_steps=3), tokens)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "conditioned on captions: give prompts"),
        ({"labels": [1]}, "conditioned on captions: give prompts"),
        ({"prompts": "a red seven"}, "is a single text; give a list"),
        ({"prompts": []}, "there are no prompts"),
        ({"prompts": ["a seven", " \n"]}, r"prompt 1 ' \\n' is empty"),
        ({"prompts": ["x" * 10_000]}, "of 10,000 characters is longer than the 64 bytes"),
        ({"prompts": ["caf\udce9"]}, "prompt 0 .*half a surrogate pair at character 3"),
        ({"prompts": PROMPTS, "negative_prompt": ["a"] * 2}, "2 negative prompts for 3 prompts"),
        ({"prompts": PROMPTS, "size": (24, 24)}, "size 24x24.*nearest is 16x24; allowed: 16x16"),
    ],
)
def test_what_cannot_be_generated_is_refused(generator, options, match):
    with pytest.raises(ValueError, match=match):
        generator(**options)


def test_a_model_of_classes_takes_no_prompts(by_class):
    for options in ({"prompts": PROMPTS}, {"labels": [0], "negative_prompt": "a"}, {}):
        with pytest.raises(ValueError, match="conditioned on classes: give labels, not prompts"):
            by_class(**options)


def test_files_of_prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbfa red seven\r\nh\xc3\xb6he\n")
    assert read_prompts(file) == ["a red seven", "höhe"]
    for content, match in (
        (b"", "is empty; write a prompt on every line"),
        (b"a\n\nb\n", "line 2 is empty"),
        (b"a\nh\xf6he\n", "line 2: byte 2 is no UTF-8"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=match):
            read_prompts(file)


@pytest.fixture
def stored(generator, tokenizer, tmp_path, monkeypatch):
    """A generator that the command line finds, whatever the run's directory."""
    model = generator.model
    monkeypatch.setattr("maskgil_jax.loading.load_model", lambda path: model)
    monkeypatch.setattr(
        "maskgil_jax.loading.open_tokenizer", lambda *args, **options: generator.tokenizer
    )
    return tmp_path


def test_the_command_line_writes_prompts_beside_the_images(stored, generator, capsys):
    out = stored / "images"
    sample.sample("run", out, prompts=PROMPTS, num_per_prompt=2, batch_size=4)
    names = sorted(path.name for path in out.iterdir())
    assert names[:2] == ["000000_prompt0.png", "000001_prompt0.png"]
    assert names[-1] == "prompts.txt"
    assert (out / "prompts.txt").read_text().splitlines() == PROMPTS
    sample.sample("run", stored / "a.npz", prompts=PROMPTS, num_per_prompt=2, batch_size=4)
    with np.load(stored / "a.npz") as arrays:
        assert arrays["labels"].tolist() == [0, 0, 1, 1, 2, 2]
        doubled = [prompt for prompt in PROMPTS for _ in range(2)]
        # Another batch size may round a pixel otherwise.
        images = generator(prompts=doubled).astype(int)
        np.testing.assert_allclose(arrays["arr_0"], images, atol=1, rtol=0)
    sample.sample("run", stored / "a.png", prompts=PROMPTS[:1])
    assert (stored / "a.png").is_file()
    assert re.search(r"1 images of 16×16 pixels", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"labels": [1]}, "give --prompt and --num_per_prompt, not --labels"),
        ({"num_per_class": 2, "prompts": PROMPTS}, "not --labels and --num_per_class"),
        ({}, "there are no prompts; give --prompt or --prompts_file"),
        ({"prompts": PROMPTS, "records": True}, "--records are codes with classes"),
        ({"prompts": PROMPTS, "size": (16, 20)}, "size 16x20.*nearest is 16x"),
        ({"prompts": PROMPTS, "text_encoder": "gemma"}, "reads no features; leave gemma out"),
    ],
)
def test_the_command_line_refuses(stored, options, match):
    with pytest.raises(ValueError, match=match):
        sample.sample("run", stored / "x", **options)
    assert list(stored.iterdir()) == []


class Counting:
    """A text encoder that notes how many prompts come at a time."""

    jittable = False
    name, width, max_length, fingerprint = "counting", 16, 64, "0"

    def __init__(self):
        self.counts = []

    def tokenize(self, prompts):
        return encode_bytes(prompts, 64)

    def encode(self, ids, lengths):
        self.counts.append(len(ids))
        there = np.arange(64) < lengths[:, None]
        return np.where(there, ids / 128, 0).astype(np.float32)[..., None].repeat(16, -1)


@pytest.mark.parametrize(("alone", "counts"), [(False, [2, 1]), (True, [1, 1, 1])])
def test_prompts_go_through_the_encoder_in_batches_or_alone(tokenizer, alone, counts):
    encoder = Counting()
    generator = tiny.make_generator(
        tokenizer,
        "maskgil-text",
        {"text": "features"},
        text_encoder=encoder,
        batch_size=2,
        batch_invariant=alone,
    )
    tokens = generator.tokens(prompts=PROMPTS)
    assert encoder.counts == counts
    assert (tokens != generator.tokens(prompts=PROMPTS[::-1])).any()
    with pytest.raises(ValueError, match="prompt 1 .* is longer than the 64 tokens"):
        generator.tokens(prompts=["a", "x" * 65])


def test_all_prompts_are_checked_before_an_image_is_made(stored, generator, monkeypatch):
    monkeypatch.setattr("maskgil_jax.sample.ImageGenerator.__call__", None)
    prompts = [*PROMPTS, "x" * 10_000]
    with pytest.raises(ValueError, match="prompt 3 .* of 10,000 characters is longer than the 64"):
        sample.sample("run", stored / "x", prompts=prompts, batch_size=1)
    with pytest.raises(ValueError, match="prompt 0 'yyy.* is longer than the 64 bytes"):
        sample.sample("run", stored / "x", prompts=PROMPTS, negative_prompt="y" * 65)
    assert list(stored.iterdir()) == []


def test_a_share_without_a_causal_model_is_refused(stored):
    with pytest.raises(ValueError, match="ar_share 0.5: there is no causal model"):
        sample.sample("run", stored / "x", prompts=PROMPTS, ar_share=0.5)


def test_the_text_encoder_belongs_to_the_job(tokenizer, stored, monkeypatch):
    model = tiny.make_generator(tokenizer, "maskgil-text", {"text": "features"}).model
    monkeypatch.setattr("maskgil_jax.loading.load_model", lambda path: model)
    encoders = {"one": Counting(), "other": Counting()}
    encoders["other"].fingerprint = "1"
    monkeypatch.setattr(
        "maskgil_jax.loading.open_text_encoder", lambda model, workdir, path: encoders[path]
    )
    options = {"prompts": PROMPTS * 2, "batch_size": 4}
    generate = sample.ImageGenerator.__call__

    def stop(self, *args, first_index, **options):
        if first_index == 4:
            raise KeyboardInterrupt
        return generate(self, *args, first_index=first_index, **options)

    with monkeypatch.context() as patch:
        patch.setattr(sample.ImageGenerator, "__call__", stop)
        with pytest.raises(KeyboardInterrupt):
            sample.sample("run", stored / "x", text_encoder="one", **options)
    with pytest.raises(ValueError, match='text_encoder: "0" there, "1" now'):
        sample.sample("run", stored / "x", text_encoder="other", **options)
    sample.sample("run", stored / "x", text_encoder="one", **options)
    assert len(list((stored / "x").glob("*.png"))) == 6
