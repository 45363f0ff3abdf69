import jax
import numpy as np
import pytest
import tiny

import maskgil_jax


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny.make_tokenizer_dir(tmp_path_factory.mktemp("tokenizer") / "vq")


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
