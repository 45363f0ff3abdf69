import jax
import jax.numpy as jnp
import pytest
from tokenizer_goldens import check_tokenizer

from maskgil_jax.tokenizers.chameleon_vq import ChameleonVQConfig


def test_matches_the_original_implementation():
    tokenizer = check_tokenizer("chameleon-vq", "chameleon_vq_tiny")
    assert tokenizer.spec.family == "chameleon-vq"
    assert (tokenizer.spec.codebook_size, tokenizer.spec.downsample_factor) == (64, 4)


def test_the_published_size_matches_the_original_implementation():
    tokenizer = check_tokenizer("chameleon-vq", "chameleon_vq_full")
    assert tokenizer.config == ChameleonVQConfig()
    spec = tokenizer.spec
    assert (spec.codebook_size, spec.downsample_factor, spec.embed_dim) == (8192, 16, 256)


@pytest.mark.parametrize("level_attention", [True, False])
def test_attention_at_the_lowest_level_is_a_choice(level_attention):
    config = ChameleonVQConfig(channels=32, level_attention=level_attention)
    init = config.make_module().init
    tree = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    for side in ("encoder", "decoder"):
        names = [name for name in tree[side] if "attn" in name]
        assert (len(names) > 1) == level_attention
        assert "mid_attn" in names
