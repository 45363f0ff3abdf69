"""LPIPS weights: torchvision's VGG16 and the five learnt heads, which come as two files.

Reference: torchvision, models/vgg.py (`vgg16-397923af.pth`, keys `features.N`); richzhang/
PerceptualSimilarity, lpips/weights/v0.1/vgg.pth (keys `linN.model.1.weight`), which other projects
ship under the same name.
"""

import jax
from flax import linen as nn
from flax.traverse_util import flatten_dict

from maskgil_jax.convert.inference import SizeReader
from maskgil_jax.convert.rules import Family, Rule, StateDict, TensorLike
from maskgil_jax.convert.vqgan import conv_rules
from maskgil_jax.tokenizers.lpips import LEVELS, LPIPSConfig

NAME = LPIPSConfig.family
RULES: tuple[Rule, ...] = (
    *conv_rules("features.{i}", "vgg/conv_{i}"),
    *conv_rules("lin{i}.model.1", "heads/lin_{i}", bias=False),
)


def infer_config(state: StateDict) -> LPIPSConfig:
    """Infer the widths of the feature net from the shapes of its state dict.

    Raises:
        ConversionError: tensors that carry the widths are missing.
    """
    read = SizeReader(NAME, state, RULES)
    widths = []
    for level, places in enumerate(LEVELS):
        keys = [rf"features\.{place}\.{part}" for place in places for part in ("weight", "bias")]
        head = (rf"lin{level}\.model\.1\.weight", 1)
        widths.append(read.size(f"width of level {level}", *((key, 0) for key in keys), head))
    return read.build(LPIPSConfig, widths=widths)


def abstract_tree(config: LPIPSConfig) -> dict[str, TensorLike]:
    """Return path -> shape and dtype of every parameter, without computing any."""
    images = jax.ShapeDtypeStruct((1, 16, 16, 3), "float32")
    tree = jax.eval_shape(config.make_module().init, jax.random.key(0), images, images)["params"]
    return flatten_dict(nn.unbox(tree), sep="/")


FAMILY = Family(
    name=NAME,
    kind="perceptual",
    architecture=NAME,
    rules=RULES,
    infer_config=infer_config,
    abstract_tree=abstract_tree,
    config_type=LPIPSConfig,
    wrappers=("state_dict",),
    export_wrapper="state_dict",
    # VGG16's last layers classify; the distance is measured on what comes before them.
    dropped_prefixes=("classifier.",),
)
