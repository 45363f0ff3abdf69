"""Conversion between PyTorch checkpoints and Flax parameters, one rule table per family.

`tools/convert_checkpoint.py` is the command line; `torch_io` reads and writes the files. Nothing
here runs a model, and importing this package loads neither torch nor jax.
"""

import difflib
import importlib
import logging
from collections.abc import Mapping
from typing import Any

from maskgil_jax.convert.rules import (
    ConversionError,
    Family,
    StateDict,
    export_tree,
    import_tree,
)

_MODULES = {
    "llamagen-vq": "llamagen_vq",
    "maskgil": "maskgil",
    "maskgil-released": "maskgil_released",
}
FAMILIES = tuple(_MODULES)
_log = logging.getLogger(__name__)

__all__ = [
    "FAMILIES",
    "ConversionError",
    "Family",
    "choose_family",
    "export_state_dict",
    "find_family",
    "import_state_dict",
]


def find_family(name: str) -> Family:
    """Return a family by name.

    Raises:
        ValueError: no such family.
    """
    if name not in _MODULES:
        near = difflib.get_close_matches(name, FAMILIES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"family {name!r} is unknown; allowed: {', '.join(FAMILIES)}{hint}")
    return importlib.import_module(f"{__name__}.{_MODULES[name]}").FAMILY


def choose_family(architecture: str, fields: Mapping[str, Any]) -> tuple[str, Any]:
    """Choose the family whose layout holds a model directory's model.

    Args:
        architecture: the `family` of the model directory.
        fields: its `config`.

    Returns:
        The family's name and the model's config.

    Raises:
        ConversionError: no family's layout holds it; what differs is listed.
        ValueError: a config that is not valid.
    """
    problems = []
    for family in map(find_family, FAMILIES):
        if family.architecture != architecture:
            continue
        config = family.config_type.from_dict(dict(fields))  # type: ignore[attr-defined]
        differing = _differing_fields(family, config)
        if not differing:
            return family.name, config
        problems += [f"{family.name}: {text}" for text in differing]
    if not problems:
        problems = [f"allowed: {', '.join(FAMILIES)}"]
    raise ConversionError(f"no checkpoint layout holds this {architecture!r} model:", problems)


def _differing_fields(family: Family, config: Any) -> list[str]:
    return [
        f"{field} is {getattr(config, field)!r}, the layout has {value!r}"
        for field, value in family.layout.items()
        if getattr(config, field) != value
    ]


def _strip_prefixes(family: Family, state: StateDict) -> dict[str, Any]:
    """Remove what training wrappers put in front of every key, e.g. `module.`."""
    stripped = dict(state)
    while found := [
        p for p in family.prefixes if stripped and all(k.startswith(p) for k in stripped)
    ]:
        _log.info("removed the prefix %r from every key", found[0])
        stripped = {key.removeprefix(found[0]): value for key, value in stripped.items()}
    return stripped


def _drop_buffers(family: Family, state: dict[str, Any]) -> dict[str, Any]:
    for key in sorted(family.dropped.keys() & state.keys()):
        _log.info("ignored the buffer %s, which holds no weights", key)
    return {key: value for key, value in state.items() if key not in family.dropped}


def import_state_dict(
    family: str, state_dict: StateDict, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """Convert a PyTorch state dict into a config and a nested dict of NumPy arrays.

    Args:
        family: one of `FAMILIES`.
        state_dict: torch key -> array, or anything with `shape` and `dtype` that `np.asarray`
            reads: nothing is read before every key, shape and dtype is known to fit.
        **options: what shapes do not tell, e.g. `num_heads=` and `grid_size=` for MaskGIL.

    Returns:
        The family's config, with sizes inferred from the shapes, and the parameters.

    Raises:
        ConversionError: the state dict does not fit; every problem is listed.
        ValueError: an unknown family or option.
    """
    from flax.traverse_util import unflatten_dict

    known = find_family(family)
    strangers = sorted(options.keys() - set(known.options))
    if strangers:
        allowed = ", ".join(known.options) or "none"
        raise ValueError(f"{family} has no option {', '.join(strangers)}; its options: {allowed}")
    state = _drop_buffers(known, _strip_prefixes(known, state_dict))
    config = known.infer_config(state, **options)
    leaves = import_tree(known, state, known.abstract_tree(config))
    return config, unflatten_dict(leaves, sep="/")


def export_state_dict(family: str, config: Any, params: Mapping[str, Any]) -> dict[str, Any]:
    """Convert parameters into a PyTorch state dict of NumPy arrays; the inverse of the import.

    Args:
        family: one of `FAMILIES`.
        config: the family's config.
        params: nested dict of arrays.

    Raises:
        ConversionError: the parameters do not fit the config, or the family's layout cannot hold
            them; every problem is listed.
        ValueError: an unknown family.
    """
    from flax.traverse_util import flatten_dict

    known = find_family(family)
    differing = _differing_fields(known, config)
    if differing:
        raise ConversionError(f"the layout of {family} cannot hold this model:", differing)
    leaves = flatten_dict(params, sep="/")
    return export_tree(known, leaves, known.abstract_tree(config))
