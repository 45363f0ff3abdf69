"""Images computed alone: the same bits whatever the batch, the other images and the devices."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec

import maskgil_jax
from maskgil_jax import generation, sharding
from maskgil_jax.build import models as build
from maskgil_jax.tokenizers.base import Tokenizer

LABELS = [0, 1, 2, 1, 0]
SETTINGS = dict(seed=3, num_steps=3, guidance_scale=2.0, guidance_schedule="linear")
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny.make_tokenizer_dir(tmp_path_factory.mktemp("tokenizer") / "vq")


def make_generator(directory, **options):
    return tiny.make_generator(directory, batch_invariant=True, **options)


@pytest.fixture(scope="module")
def one_by_one(directory):
    return make_generator(directory, batch_size=1)


@pytest.fixture
def batches(monkeypatch):
    """How many sequences the model is given at a time."""
    seen, make_predictor = [], build.make_predictor

    def spy(*args):
        predictor = make_predictor(*args)

        def features(tokens, labels):
            seen.append(len(tokens))
            return predictor.features(tokens, labels)

        return dataclasses.replace(predictor, features=features)

    generation.make_generate_fn.cache_clear()
    generation.make_step_fn.cache_clear()
    monkeypatch.setattr(build, "make_predictor", spy)
    yield seen
    generation.make_generate_fn.cache_clear()
    generation.make_step_fn.cache_clear()


@pytest.fixture(scope="module")
def make_expected(one_by_one):
    return functools.cache(lambda: one_by_one(LABELS, return_trace=True, **SETTINGS))


@pytest.fixture
def expected(make_expected, quick_compilation):
    """Made once, and compiled as the others are."""
    return make_expected()


def check_same(made, expected):
    np.testing.assert_array_equal(made.tokens, expected.tokens)
    np.testing.assert_array_equal(made.trace, expected.trace)
    np.testing.assert_array_equal(made.images, expected.images)


@pytest.mark.parametrize(("devices", "batch_size"), [(1, 3), (1, 8), (2, 8), (4, 3)])
def test_every_image_is_computed_alone(directory, expected, batches, devices, batch_size):
    generator = make_generator(directory, devices=devices, batch_size=batch_size)
    check_same(generator(LABELS, return_trace=True, **SETTINGS), expected)
    # With and without the condition at once; the first step of this schedule is not guided.
    assert set(batches) == {1, 2}
    assert len({grid.tobytes() for grid in expected.tokens}) == len(LABELS)


def test_neither_other_images_nor_the_place_in_a_batch_matter(directory, expected):
    generator = make_generator(directory, batch_size=8)
    # Alike at first, which otherwise is computed once for each kind.
    labels = [*LABELS, 0, 0, 0]
    made = generator(labels, return_trace=True, **SETTINGS)
    np.testing.assert_array_equal(made.images[:5], expected.images)
    last = generator(labels[3:5], first_index=3, **SETTINGS)
    np.testing.assert_array_equal(last, expected.images[3:])


@pytest.mark.parametrize("devices", [1, 2])
def test_steps_on_the_host_are_those_of_one_program(directory, expected, batches, devices):
    seen, generator = [], make_generator(directory, devices=devices, batch_size=8)
    made = generator(
        LABELS, callback=lambda i, tokens: seen.append(tokens), return_trace=True, **SETTINGS
    )
    check_same(made, expected)
    np.testing.assert_array_equal(np.stack(seen), expected.trace)
    assert set(batches) == {1, 2}


def test_edits_of_one_image_are_those_of_many(directory, one_by_one):
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 36, 3), np.uint8)
    masks = np.zeros((5, 16, 36), bool)
    for index in range(5):  # each has another number of tokens to make
        masks[index, : 4 * (index % 4 + 1), :8] = True
    many = make_generator(directory, devices=2, batch_size=8)
    edited = many.edit(images, masks, LABELS, return_trace=True, seed=1)
    check_same(edited, one_by_one.edit(images, masks, LABELS, return_trace=True, seed=1))
    last = many.edit(images[4:], masks[4:], LABELS[4:], first_index=4, seed=1)
    np.testing.assert_array_equal(last.images[0], edited.images[4])


def test_tiles_are_encoded_and_decoded_alone(directory, monkeypatch):
    model = make_generator(directory).model
    tokenizer = maskgil_jax.load_tokenizer(directory, tile_size=16)
    make = functools.partial(maskgil_jax.ImageGenerator, model, tokenizer, batch_invariant=True)
    small, large, seen = make(batch_size=1), make(batch_size=8), []
    encode, decode = Tokenizer.encode, Tokenizer.decode

    def spy_encode(tokenizer, images, *, batch_size):
        seen.append((len(images), batch_size))
        return encode(tokenizer, images, batch_size=batch_size)

    def spy_decode(tokenizer, tokens, *, batch_size):
        seen.append((1, batch_size))
        return decode(tokenizer, tokens, batch_size=batch_size)

    monkeypatch.setattr(Tokenizer, "encode", spy_encode)
    monkeypatch.setattr(Tokenizer, "decode", spy_decode)
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 36, 3), np.uint8)
    varied = large.vary(images, LABELS[:3], seed=1, return_trace=True)
    check_same(varied, small.vary(images, LABELS[:3], seed=1, return_trace=True))
    assert large.encode(images[:0]).shape == (0, 4, 9)
    np.testing.assert_array_equal(large.decode(varied.tokens), varied.images)
    assert len(seen) > 6
    assert set(seen) - {(0, 1)} == {(1, 1)}


def test_parameters_that_are_split_are_refused(directory):
    model = make_generator(directory).model
    tokenizer = maskgil_jax.load_tokenizer(directory)
    mesh = sharding.make_mesh({"fsdp": 2}, jax.devices()[:2])
    kernel = model.params["head"]["kernel"]
    split = jax.device_put(kernel, NamedSharding(mesh, PartitionSpec("fsdp")))
    params = {**model.params, "head": {"kernel": split}}
    match = (
        "batch_invariant needs the parameters whole .* but head/kernel is split over .*'fsdp': 2"
    )
    with pytest.raises(ValueError, match=match):
        maskgil_jax.ImageGenerator(
            dataclasses.replace(model, params=params), tokenizer, mesh=mesh, batch_invariant=True
        )
    sampler = maskgil_jax.SamplerConfig(num_steps=2)
    with pytest.raises(ValueError, match=match):
        maskgil_jax.generate_tokens(
            model.config, params, [0], sampler, mesh=mesh, batch_invariant=True
        )


def test_a_mesh_with_an_axis_for_parameters_serves_if_they_are_whole(directory, expected):
    made = make_generator(directory)
    mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2})
    generator = maskgil_jax.ImageGenerator(
        made.model, made.tokenizer, mesh=mesh, batch_size=8, batch_invariant=True
    )
    check_same(generator(LABELS, return_trace=True, **SETTINGS), expected)


def test_images_that_are_no_numbers_are_named(directory):
    good = make_generator(directory)
    broken = jax.tree.map(lambda x: x * np.nan, good.model.params)
    generator = maskgil_jax.ImageGenerator(
        dataclasses.replace(good.model, params=broken), good.tokenizer, batch_invariant=True
    )
    with pytest.raises(ValueError, match="no numbers .NaN. for image 5"):
        generator([1, 0], first_index=5)
