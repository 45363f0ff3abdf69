import copy
import dataclasses
import json
import shutil
import socket
import subprocess
import sys

import fake_hub
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel

from maskgil_jax.evals.clip_score import ClipScorer

SIDE, TOKENS = 32, 12
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
LETTERS = sorted(ByteLevel.alphabet())
MERGES = [("r", "e"), ("re", "d</w>")]
WORDS = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), *map("".join, MERGES)]
START, END = len(WORDS), len(WORDS) + 1
VOCABULARY = {word: i for i, word in enumerate([*WORDS, "<|startoftext|>", "<|endoftext|>"])}
CAPTIONS = ["a red b", "Red", "x y z", "cab", "9 8 7 6", "red red red", "a", "b c"]
# The same by hand: letters, of which the last ends the word, but `red` is one token.
PIECES = ["a red b", "red", "x y z", "c+a+b", "9 8 7 6", "red red red", "a", "b c"]


def make_model():
    """Make a small CLIP, of weights large enough that its random features differ."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    sizes |= {"num_hidden_layers": 2, "initializer_factor": 4.0}
    text = {"vocab_size": len(VOCABULARY), "max_position_embeddings": TOKENS}
    text |= {"bos_token_id": START, "eos_token_id": END, "pad_token_id": END}
    config = transformers.CLIPConfig(
        text_config=sizes | text,
        vision_config=sizes | {"image_size": SIDE, "patch_size": 8},
        projection_dim=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.CLIPModel(config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIP in files named and written as those of the published ones."""
    folder = tmp_path_factory.mktemp("clip")
    make_model().save_pretrained(folder)
    prepare = {"crop_size": SIDE, "size": SIDE, "resample": 3, "image_mean": MEAN, "image_std": STD}
    prepare |= {f"do_{step}": True for step in ("resize", "center_crop", "normalize")}
    prepare |= {"feature_extractor_type": "CLIPFeatureExtractor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(prepare))
    (folder / "vocab.json").write_text(json.dumps(VOCABULARY))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, MERGES), ""]))
    return folder


@pytest.fixture(scope="module")
def scorer(folder):
    return ClipScorer.from_pretrained(folder, batch_size=3)


@pytest.fixture(scope="module")
def exact(folder):
    return transformers.CLIPModel.from_pretrained(folder).double().eval()


@pytest.fixture
def broken(folder, tmp_path):
    """A copy of the folder, to be damaged."""
    return shutil.copytree(folder, tmp_path / "broken")


def pictures(count, height=40, width=56, seed=0):
    """Coarse noise, so that resizing leaves something of it."""
    small = np.random.default_rng(seed).integers(0, 256, (count, 5, 7, 3), dtype=np.uint8)
    return np.stack([np.array(Image.fromarray(one).resize((width, height))) for one in small])


def image_features(model, images):
    """The definition, in float64: shorter side to 32, centre, mean and deviation, projection."""
    rows = []
    for image in images:
        height, width = image.shape[:2]
        short = min(height, width)
        size = (int(SIDE * width / short), int(SIDE * height / short))
        resized = np.array(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
        top, left = (resized.shape[0] - SIDE) // 2, (resized.shape[1] - SIDE) // 2
        cropped = resized[top : top + SIDE, left : left + SIDE] / 255.0
        pixels = (cropped - np.array([[MEAN]])) / np.array([[STD]])
        with torch.no_grad():
            batch = torch.tensor(pixels.transpose(2, 0, 1))[None]
            rows.append(model.get_image_features(pixel_values=batch).pooler_output[0].numpy())
    return np.stack(rows)


def text_features(model, pieces):
    """The definition, in float64: one caption at a time, without padding."""
    rows = []
    for text in pieces:
        tokens = [START]
        for word in text.split():
            *first, last = word.split("+")
            tokens += [VOCABULARY[letter] for letter in first] + [VOCABULARY[f"{last}</w>"]]
        with torch.no_grad():
            # Up to the projection by hand: what the library calls pooled might come before it.
            pooled = model.text_model(input_ids=torch.tensor([[*tokens, END]])).pooler_output
            rows.append((pooled @ model.text_projection.weight.T)[0].numpy())
    return np.stack(rows)


def cosines(one, other):
    return np.array([a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in zip(one, other, strict=True)])


@pytest.mark.parametrize(("height", "width"), [(40, 56), (71, 33), (32, 32), (3, 4)])
def test_text_image_is_100_times_the_cosine_where_that_is_positive(scorer, exact, height, width):
    images = pictures(len(CAPTIONS), height, width)
    expected = cosines(image_features(exact, images), text_features(exact, PIECES))
    assert np.abs(expected).min() > 0.001
    assert np.ptp(expected) > 0.1
    # The same with all texts turned round, so that every pair is once below 0.
    turned = copy.deepcopy(scorer.model)
    turned.text_projection.weight.mul_(-1)
    for sign, model in ((1, scorer.model), (-1, turned)):
        scores = dataclasses.replace(scorer, model=model).text_image(images, CAPTIONS)
        assert scores.dtype == np.float64
        limited = 100 * np.maximum(sign * expected, 0)
        np.testing.assert_allclose(scores, limited, rtol=0, atol=2e-3)


def test_image_image_is_100_times_the_cosine(scorer, exact):
    images, others = pictures(5), pictures(5, 64, 48, seed=1)
    expected = cosines(image_features(exact, images), image_features(exact, others))
    scores = scorer.image_image(images, others)
    np.testing.assert_allclose(scores, 100 * np.maximum(expected, 0), rtol=0, atol=2e-3)
    assert np.ptp(scores) > 1
    np.testing.assert_array_equal(scorer.image_image(jnp.asarray(images), others), scores)


def test_equal_pictures_score_100(scorer):
    images = pictures(4)
    scores = scorer.image_image(images, images.copy())
    np.testing.assert_allclose(scores, 100, rtol=1e-12)
    assert scores.max() <= 100


def test_batches_bound_what_the_model_is_given_and_change_nothing(scorer):
    images, sizes = pictures(len(CAPTIONS)), []

    def note(_, args, kwargs):
        sizes.extend(len(kwargs[key]) for key in ("pixel_values", "input_ids") if key in kwargs)

    parts = (scorer.model.vision_model, scorer.model.text_model)
    hooks = [part.register_forward_pre_hook(note, with_kwargs=True) for part in parts]
    try:
        scores = scorer.text_image(images, CAPTIONS)
    finally:
        for hook in hooks:
            hook.remove()
    assert sizes == [3, 3, 3, 3, 2, 2]
    together = dataclasses.replace(scorer, batch_size=100).text_image(images, CAPTIONS)
    np.testing.assert_allclose(together, scores, rtol=0, atol=2e-3)


def test_long_captions_are_refused_or_cut_as_the_reference_cuts_them(scorer):
    images = pictures(3)
    full, long = "a b c a b c a b c x", "a b c a b c a b c x y z"
    captions = ["red", long, full]
    assert scorer.max_tokens == TOKENS
    np.testing.assert_array_equal(scorer.count_tokens(captions), [3, 14, 12])
    with pytest.raises(ValueError, match="1 of 3 captions are longer than the 12 tokens.* caption"):
        scorer.text_image(images, captions)
    # The end token stays, and the last that fit go before it.
    cut = scorer.text_image(images, captions, truncate=True)
    np.testing.assert_allclose(cut, scorer.text_image(images, ["red", full, full]), atol=2e-3)


def test_the_library_s_own_layout_is_read_too(folder, scorer, tmp_path):
    scorer.model.save_pretrained(tmp_path)
    transformers.CLIPProcessor(scorer.processor, scorer.tokenizer).save_pretrained(tmp_path)
    assert not (tmp_path / "merges.txt").exists()
    again = ClipScorer.from_pretrained(tmp_path)
    images = pictures(len(CAPTIONS))
    scores = again.text_image(images, CAPTIONS)
    np.testing.assert_allclose(scores, scorer.text_image(images, CAPTIONS), atol=2e-3)


def test_weights_in_half_precision_are_computed_in_single(scorer, broken):
    copy.deepcopy(scorer.model).half().save_pretrained(broken)
    assert json.loads((broken / "config.json").read_text())["dtype"] == "float16"
    assert ClipScorer.from_pretrained(broken).model.dtype == torch.float32


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), "images are float32; expected uint8"),
        (np.zeros((2, 8, 8, 1), np.uint8), r"shape \(2, 8, 8, 1\); expected \[b H W 3\]"),
        (np.zeros((2, 8, 8), np.uint8), r"shape \(2, 8, 8\).* channel of grayscale"),
        (np.zeros((2, 8, 8, 4), np.uint8), "those with alpha"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"expected \[b H W 3\]"),
        (np.zeros((0, 8, 8, 3), np.uint8), "not empty"),
        (np.zeros((3, 8, 8, 3), np.uint8), "3 images and 2 "),
    ],
)
def test_what_is_no_batch_of_rgb_pictures_is_refused(scorer, images, message):
    with pytest.raises(ValueError, match=message):
        scorer.text_image(images, ["a", "b"])
    with pytest.raises(ValueError, match=message):
        scorer.image_image(images, pictures(2))
    if len(images) == 2:
        with pytest.raises(ValueError, match=message.replace("images", "others")):
            scorer.image_image(pictures(2), images)


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ("ab", "the single string 'ab'"),
        ([], "no captions"),
        (["a", " "], "caption 1 is ' '"),
        (["a"], "2 images and 1 captions"),
    ],
)
def test_what_is_no_caption_for_each_picture_is_refused(scorer, captions, message):
    with pytest.raises(ValueError, match=message):
        scorer.text_image(pictures(2), captions)


def test_bad_weights_are_refused(scorer):
    bad = copy.deepcopy(scorer.model)
    bad.visual_projection.weight.fill_(np.nan)
    with pytest.raises(ValueError, match="features of NaN"):
        dataclasses.replace(scorer, model=bad).text_image(pictures(1), ["a"])


def remove(folder, *names):
    for name in names:
        (folder / name).unlink()


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def drop_tensor(folder):
    state = load_file(folder / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def cut_weights(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1000])


def lengthen_vocabulary(folder):
    more = VOCABULARY | {"extra": len(VOCABULARY)}
    (folder / "vocab.json").write_text(json.dumps(more))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: remove(folder, "config.json"), r"it has no config.json.*\nExpected config"),
        (lambda folder: remove(folder, "preprocessor_config.json"), "is no CLIP model"),
        (lambda folder: remove(folder, "model.safetensors"), "is no CLIP model"),
        (lambda folder: remove(folder, "merges.txt"), "has no tokenizer"),
        (lambda folder: change_config(folder, model_type="siglip"), "'siglip'; expected 'clip'"),
        (drop_tensor, "lack 1 tensors .* such as visual_projection.weight"),
        (cut_weights, "is no CLIP model"),
        (lengthen_vocabulary, "has 517 tokens, the model 516"),
    ],
)
def test_incomplete_and_other_models_are_refused(broken, damage, message):
    damage(broken)
    with pytest.raises(ValueError, match=message):
        ClipScorer.from_pretrained(broken)


def test_bad_settings_are_refused(folder):
    with pytest.raises(ValueError, match="batch_size is 0"):
        ClipScorer.from_pretrained(folder, batch_size=0)
    with pytest.raises(ValueError, match="no device 'tpu9'"):
        ClipScorer.from_pretrained(folder, device="tpu9")


def test_only_an_address_of_the_hub_leads_to_the_network(folder, monkeypatch, tmp_path):
    asked = []

    def refuse(*args, **kwargs):
        asked.append(args)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    ClipScorer.from_pretrained(folder)
    # A name of the hub, had it been given as an address.
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no directory 'someone/some-model'.*hf://owner/name"):
        ClipScorer.from_pretrained("someone/some-model")
    with pytest.raises(ValueError, match="is no repository of the hub"):
        ClipScorer.from_pretrained("hf://only-a-name")
    assert not asked


def test_weights_come_from_the_hub_at_the_revision_asked_for(folder, scorer, tmp_path):
    script = """
import sys
from maskgil_jax.evals.clip_score import ClipScorer
scorer = ClipScorer.from_pretrained(sys.argv[1])
print(float(scorer.model.visual_projection.weight.double().sum()))
try:
    ClipScorer.from_pretrained("hf://someone/other-model")
except ValueError as error:
    print("refused:", str(error).splitlines()[0])
"""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    with fake_hub.serve(files, large={"model.safetensors"}) as hub:
        # What the branch holds now is no model any more.
        hub.commits[fake_hub.NEXT_COMMIT] = {"config.json": b"{}"}
        hub.refs["main"] = fake_hub.NEXT_COMMIT
        changes = {"HF_ENDPOINT": hub.endpoint, "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(
            [sys.executable, "-c", script, f"hf://{fake_hub.REPO}@v1"],
            env=fake_hub.environment(tmp_path / "hf", [tiny.ROOT], **changes),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    total, refusal = done.stdout.splitlines()
    assert float(total) == float(scorer.model.visual_projection.weight.double().sum())
    assert refusal.startswith("refused: hf://someone/other-model is no CLIP model:")


def test_without_the_extra_it_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install \"maskgil_jax\[clip\]\""):
        ClipScorer.from_pretrained(folder)
