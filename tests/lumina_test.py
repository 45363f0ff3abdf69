"""From prompts to codes by a language model of the true layout."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny_text

from maskgil_jax import sharding
from maskgil_jax.checkpoints import write_model_dir
from maskgil_jax.data.buckets import area_buckets
from maskgil_jax.decoding import autoregressive, masked, rows
from maskgil_jax.lumina import REQUEST, Lumina, _pad
from maskgil_jax.models.chameleon import without_prompt
from maskgil_jax.text.image_protocol import HEAD_LENGTH

pytestmark = pytest.mark.usefixtures("quick_compilation")
PROMPTS = ["a red dog", "a cat", "image of a dog to the cat"]
GRID = (4, 6)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_text.make_lumina_dir(tmp_path_factory.mktemp("lumina") / "model")


@pytest.fixture(scope="module")
def lumina(directory):
    return Lumina.load(directory, mesh=sharding.make_mesh({}, jax.devices()[:1]))


def test_prompts_are_read_as_the_model_was_taught(lumina):
    names = {i: name for name, i in lumina.tokenizer.library.get_vocab().items()}
    ids = lumina.read(["a red dog"], GRID)[0]
    assert REQUEST.format(width=96, height=64, prompt="a red dog").endswith("\na red dog")
    words = [names[int(i)] for i in ids]
    assert words[:5] == ["<s>", "Generate", "an", "image", "of"]
    assert words[-7:] == [
        *("a", "red", "dog", "<reserved08706>"),
        *("<racm3:break>", "<reserved08802>", "<reserved08803>"),
    ]


def test_codes_are_drawn_and_depend_on_prompt_seed_and_number(lumina):
    codes = lumina.draw(PROMPTS, GRID, seed=3)
    assert codes.shape == (3, *GRID)
    assert codes.dtype == np.int32
    assert codes.min() >= 0
    assert codes.max() < 32
    np.testing.assert_array_equal(lumina.draw(PROMPTS, GRID, seed=3, batch_size=2), codes)
    rest = lumina.draw(PROMPTS[1:], GRID, seed=3, first_index=1)
    np.testing.assert_array_equal(rest, codes[1:])
    assert (lumina.draw(PROMPTS, GRID, seed=4) != codes).any()
    other = lumina.draw(["a dog", *PROMPTS[1:]], GRID, seed=3)
    assert (other[0] != codes[0]).any()
    np.testing.assert_array_equal(other[1:], codes[1:])


def test_a_share_is_the_beginning_of_the_whole(lumina):
    codes = lumina.draw(PROMPTS, GRID, seed=3).reshape(3, -1)
    for share, count in ((0.0, 0), (0.3, 7)):
        found = lumina.draw(PROMPTS, GRID, seed=3, share=share).reshape(3, -1)
        np.testing.assert_array_equal(found[:, :count], codes[:, :count])
        np.testing.assert_array_equal(found[:, count:], lumina.mask_token_id)
    with pytest.raises(ValueError, match="share 2.0 of the tokens is out of range"):
        lumina.draw(PROMPTS, GRID, share=2.0)


def test_guidance_leads_away_from_no_prompt(lumina):
    greedy = {"temperature": 0.0, "top_k": 0}

    def draw(prompts, scale):
        return lumina.draw(prompts, GRID, sampler=lumina.sampler(guidance_scale=scale, **greedy))

    # With scale 0 the prompt has no say; with 1 it has, and guidance none.
    unprompted = draw(PROMPTS, 0.0)
    np.testing.assert_array_equal(unprompted, np.repeat(unprompted[:1], 3, axis=0))
    assert (draw(PROMPTS, 1.0) != unprompted).any((1, 2)).all()
    assert (draw(PROMPTS, 4.0) != draw(PROMPTS, 1.0)).any()


def test_guidance_leads_away_from_a_negative_prompt(lumina):
    plain = lumina.draw(PROMPTS, GRID)
    away = lumina.draw(PROMPTS, GRID, negative_prompts=["a cat"] * 3)
    assert (away != plain).any((1, 2)).all()
    other = lumina.draw(PROMPTS, GRID, negative_prompts=["a cat", "a dog", "a cat"])
    np.testing.assert_array_equal(other[[0, 2]], away[[0, 2]])
    assert (other[1] != away[1]).any()
    # Away from itself there is no direction: the model's own prediction is left.
    greedy = lumina.sampler(temperature=0.0)
    itself = lumina.draw(PROMPTS, GRID, negative_prompts=PROMPTS, sampler=greedy)
    unguided = lumina.sampler(temperature=0.0, guidance_scale=1.0)
    np.testing.assert_array_equal(itself, lumina.draw(PROMPTS, GRID, sampler=unguided))
    with pytest.raises(ValueError, match="2 negative prompts for 3 prompts"):
        lumina.draw(PROMPTS, GRID, negative_prompts=["a cat"] * 2)


def test_a_fingerprint_is_of_all_that_was_read(lumina, directory, tmp_path):
    again = Lumina.load(directory)
    assert again.fingerprint == lumina.fingerprint
    other = Lumina.load(tiny_text.make_lumina_dir(tmp_path / "other", rope_base=5000.0))
    assert other.fingerprint != lumina.fingerprint


def test_settings_are_the_published_ones(lumina):
    assert lumina.sampler().guidance_scale == 4
    assert lumina.sampler().top_k == 32, "no more than there are codes"
    assert lumina.sampler(temperature=0.0).top_k == 0
    assert lumina.sampler(top_k=3, guidance_scale=3.0).top_k == 3


@pytest.mark.parametrize("shape", [{"tensor": 2}, {"data": 2}])
def test_a_mesh_draws_the_same(shape, lumina):
    mesh = sharding.make_mesh(shape, jax.devices()[:2])
    spread = Lumina.create(
        lumina.config, lumina.params, lumina.protocol, lumina.tokenizer, hashes={}, mesh=mesh
    )
    head = spread.params["head"]["kernel"]
    assert head.sharding.is_fully_replicated == ("data" in shape)
    expected = lumina.draw(PROMPTS, GRID, seed=3, share=0.5)
    np.testing.assert_array_equal(spread.draw(PROMPTS, GRID, seed=3, share=0.5), expected)


def check_fuzzed(lumina, grid):
    """Whatever the model predicts: noise far above its logits, not a number nowhere."""
    protocol = lumina.protocol
    config = dataclasses.replace(lumina.config, max_positions=2048)
    prefix = _pad(lumina.read(PROMPTS, grid), 32)
    forced = rows.force_rows(grid[0] * grid[1], grid[1], protocol.codebook_size)
    sampler = autoregressive.AutoregressiveConfig(guidance_scale=3.0, temperature=2.0)

    @jax.jit
    def run(params):
        model = config.make_cached(params, protocol.stream_ids, 32)

        def fuzz(logits, index):
            key = jax.random.fold_in(jax.random.key(7), index)
            return logits + 1e4 * jax.random.normal(key, logits.shape)

        def start(condition, length):
            logits, cache = model.start(condition, length)
            return fuzz(logits, 0), cache

        def step(tokens, index, live, cache):
            logits, cache = model.step(tokens, index, live, cache)
            return fuzz(logits, index + 1), cache

        return autoregressive.decode(
            autoregressive.CausalPredictor(32, start, step),
            prefix,
            without_prompt(prefix, HEAD_LENGTH),
            masked.image_keys(0, np.arange(3)),
            sampler.program(),
            sampler.plan(),
            count=len(forced),
            forced=forced,
        )

    streams = np.asarray(run(lumina.params))
    assert len(np.unique(streams)) > 8
    for stream in streams:
        ends = [protocol.new_line, protocol.end]
        ids = np.concatenate([protocol.begin(grid), protocol.stream_ids[stream], ends])
        codes = protocol.parse(ids)
        assert codes.shape == grid
        np.testing.assert_array_equal(protocol.write(codes), ids)


@pytest.mark.parametrize("grid", [(2, 8), (8, 2), (6, 4)])
def test_fuzzed_logits_never_make_a_malformed_row(grid, lumina):
    check_fuzzed(lumina, grid)


@pytest.mark.slow
@pytest.mark.parametrize("size", [256, 512])
def test_fuzzed_logits_never_make_a_malformed_row_in_any_bucket(size, lumina):
    sizes = area_buckets(size)
    assert len(sizes) == {256: 25, 512: 49}[size]
    for height, width in sizes:
        check_fuzzed(lumina, (height // 16, width // 16))


def test_what_cannot_be_drawn_is_refused(lumina, directory):
    with pytest.raises(ValueError, match="prompt 1 .* is empty"):
        lumina.draw(["a dog", " "], GRID)
    with pytest.raises(ValueError, match="prompt 0 .* that spell images; leave them out"):
        lumina.draw(["a <racm3:break> dog"], GRID)
    with pytest.raises(ValueError, match="grid of 5 columns has no size"):
        lumina.draw(PROMPTS, (4, 5))
    with pytest.raises(ValueError, match="the model has 200 positions: shorten the prompts"):
        lumina.draw(PROMPTS, (14, 14))
    with pytest.raises(ValueError, match="batch_size 0 must be at least 1"):
        lumina.draw(PROMPTS, GRID, batch_size=0)
    short = dataclasses.replace(lumina, tokenizer=Lumina.load(directory, max_length=9).tokenizer)
    with pytest.raises(ValueError, match="prompt 0 'a red dog' is longer than the 9 ids"):
        short.draw(PROMPTS, GRID)
    damaged = dataclasses.replace(lumina, params=jax.tree.map(lambda x: x * np.nan, lumina.params))
    with pytest.raises(ValueError, match=r"no numbers \(NaN\) for image 5; its parameters"):
        damaged.draw(PROMPTS, GRID, first_index=5)


def test_another_model_is_refused(tmp_path):
    write_model_dir(
        tmp_path / "d", kind="evaluator", family="lpips", config={}, params={"w": np.zeros(1)}
    )
    with pytest.raises(ValueError, match="holds a evaluator of family 'lpips'; needed: a language"):
        Lumina.load(tmp_path / "d")


def test_a_vocabulary_may_know_more_than_the_model_but_for_images(tmp_path):
    names = tiny_text.image_vocabulary(32, units=16)
    vocabulary = names | {"<|image|>": 200}
    file = tiny_text.make_image_tokenizer(tmp_path / "tokenizer.json", vocabulary)
    config = tiny_text.chameleon_config(vocab_size=220)

    def load(name, vocab_size):
        fields = config.to_dict() | {"vocab_size": vocab_size}
        params = tiny_text.make_params(config.from_dict(fields))
        write_model_dir(
            tmp_path / name,
            kind="language-model",
            family="chameleon",
            config=fields,
            params=params,
            files=[file],
        )
        return Lumina.load(tmp_path / name, mesh=sharding.make_mesh({}, jax.devices()[:1]))

    lumina = load("whole", len(names))
    assert lumina.protocol.vocab_size > 200
    with pytest.raises(ValueError, match=f"names beyond the {len(names)} that the model knows"):
        lumina.read(["a <|image|> dog"], GRID)
    with pytest.raises(ValueError, match=f"ids up to {len(names) - 1}, but the model knows"):
        load("cut", len(names) - 1)
