import jax
import pytest
import references
from flax import linen as nn

from maskgil_jax.build import models as build
from maskgil_jax.models.llamagen import LlamaGenConfig
from maskgil_jax.models.sizes import SIZES, swiglu_width


def stored_shapes(name, **changes):
    size = SIZES[name]
    config = references.tiny_config(
        num_layers=size.num_layers,
        width=size.width,
        num_heads=size.num_heads,
        mlp_width=size.mlp_width,
        codebook_size=16384,
        num_classes=1000,
        grid_size=(16, 16),
        **changes,
    )
    return nn.unbox(references.boxed_params(config))


@pytest.mark.parametrize(
    ("name", "millions", "changes"),
    [
        ("b", 110.9, {}),
        ("l", 342.9, {}),
        ("xl", 774.7, {}),
        ("xxl", 1411.1, {"qk_norm": "layer", "post_norm": "rms"}),
    ],
)
def test_parameter_counts_are_those_of_table_2(name, millions, changes):
    params = stored_shapes(name, **changes)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert round(count / 1e6, 1) == millions
    # What aligns the head is computed with, not stored.
    assert params["head"]["kernel"].shape == (SIZES[name].width, 16385)
    assert params["token_embed"]["embedding"].shape == (16385, SIZES[name].width)


def test_head_dimension_is_64_in_all_sizes_of_table_2():
    assert all(SIZES[name].width == 64 * SIZES[name].num_heads for name in ("b", "l", "xl", "xxl"))


# LlamaGen's table of sizes: 3.9 billion parameters, and what the names say.
@pytest.mark.parametrize(
    ("name", "billions"), [("xxxl", 3.9), ("1b", 1.2), ("3b", 3.1), ("7b", 6.6)]
)
def test_parameter_counts_of_the_larger_sizes(name, billions):
    size = SIZES[name]
    config = LlamaGenConfig(
        num_layers=size.num_layers,
        width=size.width,
        num_heads=size.num_heads,
        mlp_width=size.mlp_width,
        codebook_size=16384,
        num_classes=1000,
        grid_size=(16, 16),
    )
    shapes = jax.eval_shape(build.init_model(config), jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert round(count / 1e9, 1) == billions


@pytest.mark.parametrize(
    ("width", "expected"), [(768, 2048), (1024, 2816), (1280, 3584), (1536, 4096)]
)
def test_swiglu_widths_are_the_published_ones(width, expected):
    assert swiglu_width(width) == expected
