"""Conversion between PyTorch checkpoints and Flax parameters, one rule table per family.

`tools/convert_checkpoint.py` is the command line; `torch_io` reads and writes the files. Nothing
here runs a model, and importing this package loads neither torch nor jax.
"""

import difflib
import functools
import importlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from maskgil_jax.convert.rules import (
    ConversionError,
    Family,
    Plan,
    StateDict,
    UntoldError,
    export_tree,
    import_tree,
    is_narrow,
)

_MODULES = {
    "llamagen-vq": "llamagen_vq",
    "maskgit-vq": "maskgit_vq",
    "chameleon-vq": "chameleon_vq",
    "open-magvit2": "open_magvit2",
    "lpips": "lpips",
    "inception-fid": "inception_fid",
    "maskgil": "maskgil",
    "maskgil-released": "maskgil_released",
    "maskgil-text": "maskgil_text",
    "llamagen": "llamagen",
    "llamagen-text": "llamagen_text",
    "chameleon": "chameleon",
    "bidirectional-transformer": "bidirectional_transformer",
    "gemma": "gemma",
    "gemma2": "gemma2",
}
FAMILIES = tuple(_MODULES)
_log = logging.getLogger(__name__)

__all__ = [
    "FAMILIES",
    "ConversionError",
    "Family",
    "Fit",
    "all_wrappers",
    "choose_family",
    "detect_family",
    "export_state_dict",
    "find_family",
    "fit_family",
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


def _strip_prefixes(family: Family, state: StateDict) -> tuple[dict[str, Any], list[str]]:
    """Remove what training wrappers put in front of every key, e.g. `module.`."""
    stripped, notes = dict(state), []
    while found := [
        p for p in family.prefixes if stripped and all(k.startswith(p) for k in stripped)
    ]:
        notes.append(f"removed the prefix {found[0]!r} from every key")
        stripped = {key.removeprefix(found[0]): value for key, value in stripped.items()}
    return stripped, notes


def _drop(family: Family, state: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Remove buffers without weights and what belongs to training alone."""
    buffers = sorted(family.dropped.keys() & state.keys())
    notes = [f"ignored the buffer {key}, which holds no weights" for key in buffers]
    kept = {key: value for key, value in state.items() if key not in family.dropped}
    for prefix in family.dropped_prefixes:
        if count := sum(key.startswith(prefix) for key in kept):
            notes.append(f"ignored {count} tensors under {prefix!r}, which only training needs")
            kept = {key: value for key, value in kept.items() if not key.startswith(prefix)}
    return kept, notes


def prepare_state_dict(family: Family, state_dict: StateDict) -> tuple[dict[str, Any], list[str]]:
    """Bring a state dict under the names of a family's table, without reading a tensor.

    Returns:
        The state dict, and notes that tell what was removed and renamed.
    """
    state, notes = _strip_prefixes(family, state_dict)
    if family.renames is not None:
        state, note = family.renames(state)
        notes += [note] if note else []
    state, removed = _drop(family, state)
    return state, notes + removed


def import_state_dict(
    family: str, state_dict: StateDict, *, widen: bool = False, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """Convert a PyTorch state dict into a config and a nested dict of NumPy arrays.

    Args:
        family: one of `FAMILIES`.
        state_dict: torch key -> array, or anything with `shape` and `dtype` that `np.asarray`
            reads (not PyTorch's own bfloat16 tensors: give their `.float()`): nothing is read
            before every key, shape and dtype is known to fit.
        widen: whether to take float16 and bfloat16 tensors too, as the float32 of the same value;
            how many there were is logged.
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
    state, notes = prepare_state_dict(known, state_dict)
    for note in notes:
        _log.info("%s", note)
    config = known.infer_config(state, **options, **_pass_widen(known, widen))
    leaves = import_tree(_plan(family, config), state, widen=widen)
    if widen:
        count = sum(map(is_narrow, state.values()))
        _log.info("widened %d of %d tensors to float32, exactly", count, len(state))
    return config, unflatten_dict(leaves, sep="/")


def _pass_widen(family: Family, widen: bool) -> dict[str, bool]:
    """Return what `infer_config` is told of it: the type of the parameters may depend on it."""
    return {"widen": widen} if family.keeps_bfloat16 else {}


@functools.lru_cache(maxsize=64)
def _plan(family: str, config: Any) -> Plan:
    known = find_family(family)
    return Plan.make(known, known.abstract_tree(config))


@dataclass(frozen=True)
class Fit:
    """How well a state dict fits a family.

    Attributes:
        family: its name.
        config: with sizes inferred from the shapes, and options in `untold` made up; None if they
            cannot be inferred.
        untold: options that shapes do not tell and that have to be given.
        problems: everything that does not fit; empty if the state dict is of this family.
    """

    family: str
    config: Any
    untold: tuple[str, ...]
    problems: tuple[str, ...]


def fit_family(family: str, state_dict: StateDict, *, widen: bool = False, **options: Any) -> Fit:
    """Hold a state dict against a family without reading a tensor.

    Args:
        family: one of `FAMILIES`.
        state_dict: as for `import_state_dict`.
        widen: as for `import_state_dict`.
        **options: as for `import_state_dict`; those that the family does not have are left out.
    """
    known = find_family(family)
    state, _ = prepare_state_dict(known, state_dict)
    given = {name: value for name, value in options.items() if name in known.options}
    untold: tuple[str, ...] = ()
    config = None
    try:
        while config is None:
            try:
                config = known.infer_config(state, **given, **_pass_widen(known, widen))
            except UntoldError as error:
                if error.option in given:
                    raise
                untold += (error.option,)
                given[error.option] = error.stand_in
        _plan(family, config).check(state, widen=widen)
    except ConversionError as error:
        return Fit(family, config, untold, error.problems or (str(error),))
    return Fit(family, config, untold, ())


def detect_family(state_dict: StateDict, *, widen: bool = False, **options: Any) -> Fit:
    """Find the one family that a state dict fits, by the names, shapes and dtypes of all tensors.

    Where families differ in what the rows of a table are, as masked and causal models do in having
    a mask token or not, the one counts whose codes are a power of two.

    The arguments are as for `fit_family`.

    Raises:
        ConversionError: none fits, and what is wrong for the nearest; or several do.
    """
    fits = [fit_family(family, state_dict, widen=widen, **options) for family in FAMILIES]
    fitting = [fit for fit in fits if not fit.problems]
    if len(fitting) > 1:
        fitting = [fit for fit in fitting if _has_usual_codes(fit.config)] or fitting
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = ", ".join(fit.family for fit in fitting)
        raise ConversionError(f"several families fit: {names}; say which (--family)")
    if not widen and any(map(is_narrow, state_dict.values())):
        wider = [fit_family(known, state_dict, widen=True, **options) for known in FAMILIES]
        if would := [fit.family for fit in wider if not fit.problems]:
            raise ConversionError(
                f"{', '.join(would)} would fit, but tensors are float16 or bfloat16 in place of "
                "float32; to take them as float32 of the same values, give widen (--widen)"
            )
    # A family whose very sizes cannot be inferred is further away than one of wrong tensors.
    nearest = min(fits, key=lambda fit: (fit.config is None, len(fit.problems)))
    raise ConversionError(
        f"no family fits; tried: {', '.join(FAMILIES)}. The nearest is {nearest.family}, of which "
        "this is wrong:",
        nearest.problems,
    )


def _has_usual_codes(config: Any) -> bool:
    return getattr(config, "codebook_size", 0).bit_count() == 1


def all_wrappers() -> tuple[str, ...]:
    """Return the entries that hold the weights in the files of any family."""
    return tuple(dict.fromkeys(w for name in FAMILIES for w in find_family(name).wrappers))


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
    return export_tree(known, _plan(family, config), leaves)
