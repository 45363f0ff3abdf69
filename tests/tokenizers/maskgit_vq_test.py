import pytest
from tokenizer_goldens import check_tokenizer

from maskgil_jax.tokenizers.maskgit_vq import MaskGITVQConfig


def test_matches_the_original_implementation():
    tokenizer = check_tokenizer("maskgit-vq", "maskgit_vq_tiny")
    assert tokenizer.spec.family == "maskgit-vq"
    assert (tokenizer.spec.codebook_size, tokenizer.spec.downsample_factor) == (64, 4)


def test_the_published_size_matches_the_original_implementation():
    tokenizer = check_tokenizer("maskgit-vq", "maskgit_vq_full")
    assert tokenizer.config == MaskGITVQConfig()
    spec = tokenizer.spec
    assert (spec.codebook_size, spec.downsample_factor, spec.embed_dim) == (1024, 16, 256)


def test_an_unknown_field_names_the_nearest():
    with pytest.raises(ValueError, match="MaskGITVQConfig has no field 'chanels'.*'channels'"):
        MaskGITVQConfig.from_dict({"chanels": 32})
