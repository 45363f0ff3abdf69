import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskgil_jax.tokenizers.base import Tokenizer, TokenizerSpec
from maskgil_jax.tokenizers.vqgan import upsample_nearest

SPEC = TokenizerSpec(family="grey", codebook_size=32, downsample_factor=2, embed_dim=1)


class GreyTokenizer(nn.Module):
    """The contract without a net: the mean of each 2x2 square, in 32 grey levels."""

    def encode(self, images):
        batch, height, width, channels = images.shape
        squares = images.reshape(batch, height // 2, 2, width // 2, 2, channels)
        return jnp.round((squares.mean((2, 4, 5)) + 1) * 15.5).astype(jnp.int32)

    def decode(self, tokens):
        grey = upsample_nearest((tokens / 15.5 - 1)[..., None])
        return jnp.broadcast_to(grey * self.get_variable("params", "gain"), (*grey.shape[:3], 3))


@dataclasses.dataclass(frozen=True, kw_only=True)
class GreyConfig:
    spec: TokenizerSpec = SPEC
    dtype: str = "float32"
    family = "grey"
    lookup_free = False

    @classmethod
    def from_dict(cls, fields):
        return cls(dtype=fields["dtype"])

    def make_module(self):
        return GreyTokenizer()

    def to_dict(self):
        return {"codebook_size": self.spec.codebook_size, "dtype": self.dtype}


@pytest.fixture
def tokenizer():
    return Tokenizer(config=GreyConfig(), params={"gain": np.float32(1.0)})


@pytest.fixture
def images():
    # Taller than wide: rows and columns must not be exchanged.
    return np.random.default_rng(0).uniform(-1, 1, (3, 16, 8, 3)).astype(np.float32)


def test_encode_and_decode_have_the_contracts_shapes(tokenizer, images):
    tokens = tokenizer.encode(images)
    assert (tokens.shape, tokens.dtype) == ((3, 8, 4), jnp.int32)
    assert tokens.shape[1:] == tokenizer.spec.grid_size(16, 8)
    decoded = tokenizer.decode(tokens)
    assert (decoded.shape, decoded.dtype) == (images.shape, jnp.float32)
    np.testing.assert_array_equal(tokenizer.decode(np.asarray(tokens, np.int64)), decoded)
    np.testing.assert_array_equal(tokenizer.encode(decoded), tokens)


def test_the_parameters_are_used(tokenizer, images):
    tokens = tokenizer.encode(images)
    doubled = dataclasses.replace(tokenizer, params={"gain": np.float32(2.0)})
    np.testing.assert_allclose(doubled.decode(tokens), 2 * tokenizer.decode(tokens))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
def test_batches_do_not_change_the_answer(tokenizer, images, batch_size):
    tokens = tokenizer.encode(images, batch_size=batch_size)
    np.testing.assert_array_equal(tokens, tokenizer.encode(images))
    decoded = tokenizer.decode(tokens, batch_size=batch_size)
    np.testing.assert_allclose(decoded, tokenizer.decode(tokens), atol=1e-5)


def test_works_inside_jit(tokenizer, images):
    there_and_back = jax.jit(lambda x: tokenizer.decode(tokenizer.encode(x)))(images)
    expected = tokenizer.decode(tokenizer.encode(images))
    np.testing.assert_allclose(there_and_back, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, jnp.bfloat16])
def test_other_float_dtypes_are_taken(tokenizer, images, dtype):
    narrowed = images.astype(dtype)
    expected = tokenizer.encode(narrowed.astype(np.float32))
    np.testing.assert_array_equal(tokenizer.encode(narrowed), expected)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((8, 8, 3), np.float32), r"shape \(8, 8, 3\).*\[b, height, width, channels\]"),
        (np.zeros((1, 8, 8, 1), np.float32), r"1 channels.*takes 3"),
        (np.zeros((1, 3, 8, 8), np.float32), r"8 channels.*last axis"),
        (np.zeros((1, 8, 8, 3), np.uint8), r"dtype uint8.*/ 127\.5 - 1"),
        (np.zeros((1, 8, 9, 3), np.float32), r"width 9.*factor 2.*to 8"),
        (np.zeros((1, 1, 8, 3), np.float32), r"height 1.*factor 2.*to 2"),
        (np.full((1, 8, 8, 3), 255.0, np.float32), r"from 255 to 255.*/ 127\.5 - 1"),
        (np.full((1, 8, 8, 3), np.nan, np.float32), r"from nan.*finite"),
    ],
)
def test_encode_refuses_images_that_do_not_fit(tokenizer, bad, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.encode(bad)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.full((1, 2, 2), 32, np.int32), r"code 32; .*\[0, 32\).*mask token"),
        (np.full((1, 2, 2), -1, np.int32), r"code -1; .*\[0, 32\)"),
        (np.zeros((1, 2, 2), np.float32), r"dtype float32.*integers"),
        (np.zeros((1, 4), np.int32), r"shape \(1, 4\).*\[b, rows, columns\]"),
        (np.zeros((1, 0, 4), np.int32), r"shape \(1, 0, 4\)"),
    ],
)
def test_decode_refuses_tokens_that_do_not_fit(tokenizer, bad, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.decode(bad)


def test_a_batch_size_below_one_is_refused(tokenizer, images):
    with pytest.raises(ValueError, match="batch_size is 0"):
        tokenizer.encode(images, batch_size=0)


@pytest.mark.parametrize(
    ("field", "value"), [("family", ""), ("codebook_size", 0), ("downsample_factor", 0)]
)
def test_spec_refuses_what_is_not_allowed(field, value):
    fields = dict(family="x", codebook_size=8, downsample_factor=4, embed_dim=2) | {field: value}
    with pytest.raises(ValueError, match=field):
        TokenizerSpec(**fields)


def test_fingerprint_tells_what_codes_mean(tokenizer):
    assert len(tokenizer.fingerprint) == 64
    same = Tokenizer(config=GreyConfig(dtype="bfloat16"), params={"gain": jnp.ones(())})
    assert same.fingerprint == tokenizer.fingerprint
    others = [
        Tokenizer(config=GreyConfig(), params={"gain": np.float32(1.0000001)}),
        Tokenizer(config=GreyConfig(), params={"pain": np.float32(1)}),
        Tokenizer(config=GreyConfig(), params={"gain": np.ones(1, np.float32)}),
        Tokenizer(
            config=GreyConfig(spec=dataclasses.replace(SPEC, family="green")),
            params={"gain": np.float32(1)},
        ),
    ]
    assert len({tokenizer.fingerprint, *(other.fingerprint for other in others)}) == 5


def test_batches_leave_the_device(tokenizer, images):
    assert isinstance(tokenizer.encode(images, batch_size=2), np.ndarray)
    assert isinstance(tokenizer.decode(tokenizer.encode(images), batch_size=2), np.ndarray)


def test_the_parameters_are_not_printed(tokenizer):
    assert "GreyConfig" in repr(tokenizer)
    assert "gain" not in repr(tokenizer)
