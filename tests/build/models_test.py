import pytest

from maskgil_jax import config as schema
from maskgil_jax.build import models as build
from maskgil_jax.tokenizers.llamagen_vq import LlamaGenVQConfig

# Table 1 of the paper, and the widths of the published files.
PUBLISHED = {
    "llamagen-vq": (16384, 8, True, True),
    "maskgit-vq": (1024, 256, False, True),
    "chameleon-vq": (8192, 256, False, False),
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_unset_fields_are_the_published_tokenizer(family):
    config = schema.preset()
    config.vq.family = family
    vq = build.tokenizer_config(config)
    assert vq.spec.family == family
    assert vq.spec.downsample_factor == 16
    found = (vq.codebook_size, vq.embed_dim, vq.l2_normalize, vq.level_attention)
    assert found == PUBLISHED[family]


def test_set_fields_win_over_the_family():
    config = schema.preset()
    config.vq.update(family="maskgit-vq", codebook_size=64, channel_multipliers=(1, 2))
    vq = build.tokenizer_config(config)
    assert (vq.codebook_size, vq.spec.downsample_factor, vq.embed_dim) == (64, 2, 256)


def test_fields_that_a_family_lacks_are_refused():
    config = schema.preset()
    config.vq.update(family="open-magvit2", embed_dim=18, codebook_size=256)
    with pytest.raises(ValueError, match="^vq.embed_dim 18 has no meaning for .*'open-magvit2'"):
        build.tokenizer_config(config)


def test_families_are_named_right_or_refused():
    config = schema.preset()
    config.vq.family = "llamagen_vq"
    with pytest.raises(ValueError, match="llamagen_vq.*llamagen-vq.*maskgit-vq"):
        build.tokenizer_config(config)
    with pytest.raises(ValueError, match="codebok_size.*codebook_size"):
        build.create_tokenizer("maskgit-vq", {"codebok_size": 8}, {})


def test_a_run_recorded_before_there_were_families_is_llamagens():
    fields = LlamaGenVQConfig(codebook_size=128, channels=32).to_dict()
    recorded = schema.from_json(
        '{"vq": ' + str(fields).replace("'", '"').replace("True", "true") + "}"
    )
    assert build.tokenizer_config(recorded) == LlamaGenVQConfig(codebook_size=128, channels=32)
