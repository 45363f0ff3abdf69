"""InceptionV3 weights for FID, as pytorch-fid publishes them.

Reference: mseitzer/pytorch-fid, release `fid_weights`, `pt_inception-2015-12-05-6726825d.pth`.
"""

from typing import Any

import jax
from flax.traverse_util import flatten_dict

from maskgil_jax.convert.inference import SizeReader
from maskgil_jax.convert.rules import Family, Rule, StateDict, TensorLike
from maskgil_jax.convert.vqgan import linear_rules
from maskgil_jax.evals.inception import INPUT_SIDE, InceptionConfig

NAME = InceptionConfig.family
_STEM = "{c:Conv2d_1a_3x3|Conv2d_2a_3x3|Conv2d_2b_3x3|Conv2d_3b_1x1|Conv2d_4a_3x3}"
_BLOCK = "{m:Mixed_5b|Mixed_5c|Mixed_5d|Mixed_6a|Mixed_6b|Mixed_6c|Mixed_6d|Mixed_6e"
_BLOCK += "|Mixed_7a|Mixed_7b|Mixed_7c}"
_BRANCH = "{c:branch1x1|branch3x3|branch3x3_1|branch3x3_2|branch3x3_2a|branch3x3_2b"
_BRANCH += "|branch3x3dbl_1|branch3x3dbl_2|branch3x3dbl_3|branch3x3dbl_3a|branch3x3dbl_3b"
_BRANCH += "|branch5x5_1|branch5x5_2|branch7x7_1|branch7x7_2|branch7x7_3"
_BRANCH += "|branch7x7dbl_1|branch7x7dbl_2|branch7x7dbl_3|branch7x7dbl_4|branch7x7dbl_5"
_BRANCH += "|branch7x7x3_1|branch7x7x3_2|branch7x7x3_3|branch7x7x3_4|branch_pool}"
_COUNTER = ".bn.num_batches_tracked"


def _unit_rules(key: str, path: str) -> tuple[Rule, ...]:
    """Return the rules of a convolution and its batch norm."""
    norm = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    return (
        Rule(f"{key}.conv.weight", f"{path}/kernel", "kh kw i o -> o i kh kw"),
        *(Rule(f"{key}.bn.{theirs}", f"{path}/{ours}", "c -> c") for theirs, ours in norm.items()),
    )


RULES: tuple[Rule, ...] = (
    *_unit_rules(_STEM, _STEM),
    *_unit_rules(f"{_BLOCK}.{_BRANCH}", f"{_BLOCK}/{_BRANCH}"),
    *linear_rules("fc", "fc"),
)


def drop_counters(state: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Remove the batch norms' counters of training steps, which need not be there."""
    counters = {
        key
        for key in state
        if key.endswith(_COUNTER) and f"{key.removesuffix(_COUNTER)}.bn.running_var" in state
    }
    if not counters:
        return state, ""
    kept = {key: value for key, value in state.items() if key not in counters}
    return kept, f"ignored {len(counters)} counters of training steps (*{_COUNTER})"


def infer_config(state: StateDict) -> InceptionConfig:
    """Infer the widths of the net from the shapes of its state dict.

    Raises:
        ConversionError: tensors that carry the widths are missing.
    """
    read = SizeReader(NAME, state, RULES)
    channels = read.size(
        "width",
        (r"Conv2d_1a_3x3\.conv\.weight", 0),
        (r"Conv2d_1a_3x3\.bn\.\w+", 0),
        (r"Conv2d_2a_3x3\.conv\.weight", 1),
    )
    num_logits = read.size("number of classes", (r"fc\.weight", 0), (r"fc\.bias", 0))
    return read.build(InceptionConfig, channels=channels, num_logits=num_logits)


def abstract_tree(config: InceptionConfig) -> dict[str, TensorLike]:
    """Return path -> shape and dtype of every parameter, without computing any."""
    images = jax.ShapeDtypeStruct((1, INPUT_SIDE, INPUT_SIDE, 3), "float32")
    tree = jax.eval_shape(config.make_module().init, jax.random.key(0), images)["params"]
    return flatten_dict(tree, sep="/")


FAMILY = Family(
    name=NAME,
    kind="evaluator",
    architecture=NAME,
    rules=RULES,
    infer_config=infer_config,
    abstract_tree=abstract_tree,
    config_type=InceptionConfig,
    wrappers=("state_dict",),
    export_wrapper="state_dict",
    renames=drop_counters,
)
