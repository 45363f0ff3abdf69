import ast
import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from ml_collections import ConfigDict

from maskgil_jax import config as schema
from maskgil_jax.build import models as build_models
from maskgil_jax.build import training as build_training
from maskgil_jax.models.bert import BidirectionalTransformerConfig
from maskgil_jax.models.maskgil import MaskGILConfig

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))

# What each preset decides, as the paper and the released code do.
DECISIONS = {
    "paper": {
        "model": ("first", "2d", "identity", "separate"),
        "training": ("masked", "bernoulli"),
        "sampler": ("arccos", "increments", True, 2.0, "constant", 1.0, 0.0),
    },
    "released": {
        "model": ("last", "1d", "table", "shared"),
        "training": ("all", "bernoulli"),
        "sampler": ("arccos", "increments", False, 3.0, "linear", 1.0, 4.5),
    },
    "recommended": {
        "model": ("first", "2d", "identity", "separate"),
        "training": ("masked", "exact"),
        "sampler": ("arccos", "increments", True, 2.0, "linear", 1.0, 4.5),
    },
}
FIELDS = {
    "model": ("condition", "rope", "cond_rope", "embeddings"),
    "training": ("loss_tokens", "mask_draw"),
    "sampler": (
        "schedule",
        "schedule_form",
        "rescale",
        "guidance_scale",
        "guidance_schedule",
        "temperature",
        "gumbel_temperature",
    ),
}


@pytest.mark.parametrize("name", DECISIONS)
def test_presets_decide_everything_the_sources_leave_open(name):
    config = schema.preset(name)
    assert config.preset == name
    for section, fields in FIELDS.items():
        assert tuple(config[section][field] for field in fields) == DECISIONS[name][section]
    assert (config.model.qk_norm, config.model.post_norm) == ("none", "none")
    assert set(schema.PRESETS[name]) == {f"{s}.{f}" for s, fields in FIELDS.items() for f in fields}
    build_training.validate(config)


def test_the_default_is_the_recommended_preset():
    assert schema.default().to_dict() == schema.preset().to_dict()


def test_training_defaults_are_the_papers():
    config = schema.default()
    assert (config.optimizer.learning_rate, config.optimizer.betas) == (1e-4, (0.9, 0.96))
    assert (config.optimizer.weight_decay, config.optimizer.clip_norm) == (1e-5, 1.0)
    assert (config.training.batch_size, config.training.label_smoothing) == (256, 0.1)
    assert (config.training.condition_dropout, config.model.dropout) == (0.1, 0.1)


def test_unknown_presets_and_fields_name_the_nearest():
    with pytest.raises(ValueError, match=r"'papr'.*[Dd]id you mean 'paper'"):
        schema.preset("papr")
    config = schema.preset()
    with pytest.raises(AttributeError, match='Did you mean "num_layers"'):
        config.model.num_layer = 3
    with pytest.raises(TypeError, match="width"):
        config.model.width = "wide"


def test_a_run_directory_gives_back_the_configuration():
    config = schema.preset("released")
    config.model.grid_size = (8, 12)
    config.sampler.guidance_scale = 3.0
    again = schema.from_json(schema.to_json(config))
    assert again.to_dict() == config.to_dict()
    assert isinstance(again.model.grid_size, tuple)
    assert again.is_locked
    assert schema.diff(config, again) == []


def test_a_field_of_another_version_is_refused():
    config = ConfigDict(schema.preset().to_dict())
    config.model.experts = 8
    with pytest.raises(ValueError, match=r"field model\.experts, which this version"):
        schema.from_json(schema.to_json(config))


def test_differences_are_listed_one_a_line():
    other = schema.preset()
    other.model.width = 1024
    other.training.batch_size = 64
    assert schema.diff(schema.preset(), other) == [
        "model.width: 768 → 1024",
        "training.batch_size: 256 → 64",
    ]


def test_a_family_takes_its_own_fields_and_refuses_what_others_have():
    config = schema.preset("released")
    config.model.family = "bidirectional-transformer"
    # What the preset gives to fields that the family lacks says nothing about the run.
    model = build_models.model_config(config)
    assert isinstance(model, BidirectionalTransformerConfig)
    assert (model.family, model.width, model.codebook_size) == (config.model.family, 768, 16384)
    for name, value in (("rope", "2d"), ("qk_norm", "rms"), ("embedding_dropout", 0.1)):
        changed = schema.preset("released")
        changed.model.update({"family": config.model.family, name: value})
        with pytest.raises(ValueError, match=rf"model\.{name} .* has no meaning for model.family"):
            build_training.validate(changed)
    config.model.family = "bidirectional"
    with pytest.raises(ValueError, match="model family 'bidirectional' is unknown; .*Did you mean"):
        build_training.validate(config)


def test_a_run_from_before_there_were_families_is_a_maskgil():
    fields = schema.preset().to_dict()
    del fields["model"]["family"]
    found = schema.from_json(json.dumps(fields))
    assert schema.diff(found, schema.preset()) == []
    assert isinstance(build_models.model_config(found), MaskGILConfig)


def load(path):
    spec = importlib.util.spec_from_file_location(f"configs_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("preset", schema.PRESETS)
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_file_builds(path, preset):
    config = load(path).get_config(preset)
    assert config.preset == preset
    build_training.validate(config)
    if config.kind == "tokenizer":
        vq = build_models.tokenizer_config(config)
        images = jnp.zeros((1, *config.data.image_size, vq.spec.image_channels))
        tree = jax.eval_shape(vq.make_module().init, jax.random.key(0), images)
    else:
        model = build_models.model_config(config)
        tree = jax.eval_shape(build_models.init_model(model), jax.random.key(0))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("b", 110.9),
        ("l", 342.9),
        ("xl", 774.7),
        ("xxl", 1411.1),
        ("bidirectional_transformer", 104.9),
        ("llamagen_b", 110.9),
        ("llamagen_l", 342.9),
        ("llamagen_xl", 774.7),
        ("llamagen_xxl", 1411.0),
        ("llamagen_3b", 3096.7),
        ("llamagen_t2i_xl", 777.9),
    ],
)
def test_config_files_of_the_sizes_hold_the_papers_tables(name, millions):
    get_config = load(next(path for path in CONFIGS if path.stem == name)).get_config
    model = build_models.model_config(get_config())
    tree = nn.unbox(jax.eval_shape(build_models.init_model(model), jax.random.key(0)))
    assert round(sum(leaf.size for leaf in jax.tree.leaves(tree)) / 1e6, 1) == millions
    for preset, norms in (("paper", ("layer", "rms")), ("released", ("none", "none"))):
        found = get_config(preset).model
        expected = norms if name == "xxl" else ("none", "none")
        assert (found.qk_norm, found.post_norm) == expected


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_file_says_what_it_is_and_how_to_run_it(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    for part in ("Paper row:", "Hardware:", "Expected metric:", "Command:"):
        assert part in docstring
    assert f"python -m maskgil_jax.train --config configs/{path.name} " in docstring
