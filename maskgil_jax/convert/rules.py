"""Rule tables between PyTorch state dicts and Flax parameter trees, the same for both directions.

A rule is three strings. The torch key and the tree path may hold placeholders: `{i}` is a number,
`{c:norm1|norm2}` one of the listed words; `{~i}` in a path is the number i of the key counted from
the tree's last one, for layouts that number levels the other way round. The layout names the axes
of the Flax leaf and how the torch tensor arranges them, `"n e t h d -> (t h d) e"`; parentheses
flatten axes into one. An axis that the right side does not name is indexed by the placeholder of
the same name in the key, so `layers.{n}.feed_forward.{g:w1|w3}.weight` with `"n e g f -> f e"`
stacks 2·n tensors in one leaf.

`plan_slots` lays a table over the abstract tree of a model: torch key -> `Slot`, the part of a leaf
which that tensor fills. Import and export both walk the plan, hence each is the other's inverse.
"""

import itertools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np


class ConversionError(ValueError):
    """A checkpoint does not fit; `problems` lists everything that is wrong with it."""

    def __init__(self, summary: str, problems: tuple[str, ...] | list[str] = ()):
        self.problems = tuple(problems)
        super().__init__("\n  ".join([summary, *self.problems]))


class UntoldError(ConversionError):
    """The shapes fit but do not tell `option`, which has to be given.

    Attributes:
        option: its name.
        stand_in: a value that makes the same shapes, to compare them without knowing the true one.
    """

    def __init__(self, summary: str, *, option: str, stand_in: Any):
        super().__init__(summary)
        self.option, self.stand_in = option, stand_in


def show_name(name: object) -> str:
    """Return a name from a file as it may be printed."""
    text = str(name)
    shown = text if text.isprintable() and text else repr(text)
    return shown if len(shown) <= 200 else shown[:200] + "…"


@runtime_checkable
class TensorLike(Protocol):
    """A tensor whose shape and dtype are known before `np.asarray` reads it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of every axis."""
        ...

    @property
    def dtype(self) -> Any:
        """Anything whose `str` is the dtype's name."""
        ...


StateDict = Mapping[str, Any]
_PLACEHOLDER = re.compile(r"\{(~?)(\w+)(?::([\w|]+))?\}")
_NARROW = ("float16", "bfloat16")
# Four digits are more than any model has layers, and keep a hostile key from naming a huge one.
_NUMBER = r"0|[1-9]\d{0,3}"


def _compile_pattern(pattern: str) -> re.Pattern[str]:
    """Turn a pattern with placeholders into a regular expression with named groups."""
    parts, end = [], 0
    for match in _PLACEHOLDER.finditer(pattern):
        _, name, words = match.groups()
        parts += [re.escape(pattern[end : match.start()]), f"(?P<{name}>{words or _NUMBER})"]
        end = match.end()
    return re.compile("".join([*parts, re.escape(pattern[end:])]))


@dataclass(frozen=True)
class Rule:
    """One line of a table: torch key pattern, tree path pattern, layout `leaf axes -> torch axes`.

    Raises:
        ValueError: the layout names an axis twice, or one that the leaf does not have, or leaves
            out one that the key does not index; or the key counts from the last.
    """

    key: str
    path: str
    layout: str

    def __post_init__(self) -> None:
        used = [*itertools.chain(*self.torch_axes), *self.indexed_axes]
        if sorted(used) != sorted(self.leaf_axes) or len(set(used)) != len(used):
            raise ValueError(f"layout {self.layout!r} of {self.key!r}: every axis exactly once")
        if "{~" in self.key:
            raise ValueError(f"{self.key!r}: it is the path that counts from the last")
        unbound = set(self.indexed_axes) - set(self.words)
        if unbound:
            raise ValueError(f"layout {self.layout!r}: {self.key!r} does not index {unbound}")

    @cached_property
    def leaf_axes(self) -> list[str]:
        """Names of the axes of the Flax leaf."""
        return self.layout.split("->")[0].split()

    @cached_property
    def torch_axes(self) -> list[list[str]]:
        """The axes of the torch tensor, each a list of the leaf axes that it flattens."""
        groups = re.findall(r"\(([^)]*)\)|(\w+)", self.layout.split("->")[1])
        return [(flat or single).split() for flat, single in groups]

    @cached_property
    def indexed_axes(self) -> list[str]:
        """The axes of the leaf that the key's placeholders index."""
        kept = set(itertools.chain(*self.torch_axes))
        return [axis for axis in self.leaf_axes if axis not in kept]

    @cached_property
    def words(self) -> dict[str, list[str] | None]:
        """Placeholders of the key: the words that each may be, or None for a number."""
        found = _PLACEHOLDER.findall(self.key)
        return {name: words.split("|") if words else None for _, name, words in found}

    @cached_property
    def reversed_heads(self) -> dict[str, re.Pattern[str]]:
        """Placeholders that count from the last, with what matches the path as far as each."""
        found = _PLACEHOLDER.finditer(self.path)
        heads = {m.group(2): self.path[: m.end()] for m in found if m.group(1)}
        return {name: _compile_pattern(head) for name, head in heads.items()}

    @cached_property
    def key_regex(self) -> re.Pattern[str]:
        """Match the torch keys of this rule."""
        return _compile_pattern(self.key)

    @cached_property
    def path_regex(self) -> re.Pattern[str]:
        """Match the tree paths of this rule."""
        return _compile_pattern(self.path)

    def format_key(self, values: Mapping[str, str]) -> str:
        """Return the torch key with its placeholders filled in."""
        return _PLACEHOLDER.sub(lambda match: values[match.group(2)], self.key)


@dataclass(frozen=True)
class Slot:
    """The part of one leaf that one torch tensor fills."""

    rule: Rule
    leaf: str
    index: tuple[int | slice, ...]
    sizes: Mapping[str, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the torch tensor."""
        return tuple(math.prod(self.sizes[a] for a in group) for group in self.rule.torch_axes)

    @property
    def _order(self) -> list[int]:
        """Positions, among the axes of the leaf's part, of the torch axes in their order."""
        part = [axis for axis in self.rule.leaf_axes if axis not in self.rule.indexed_axes]
        return [part.index(axis) for group in self.rule.torch_axes for axis in group]

    def from_torch(self, tensor: np.ndarray) -> np.ndarray:
        """Arrange a torch tensor as the part of the leaf."""
        axes = itertools.chain(*self.rule.torch_axes)
        return tensor.reshape([self.sizes[a] for a in axes]).transpose(np.argsort(self._order))

    def to_torch(self, leaf: np.ndarray) -> np.ndarray:
        """Cut the torch tensor out of the whole leaf."""
        tensor = leaf[self.index].transpose(self._order).reshape(self.shape)
        return np.ascontiguousarray(tensor)


def _rule_slots(rule: Rule, path: str, values: Mapping[str, str], shape: tuple[int, ...]):
    """Yield (torch key, slot) for every torch tensor that the rule puts into one leaf."""
    if len(rule.leaf_axes) != len(shape):
        raise ValueError(f"leaf {path} has shape {shape}, its rule expects axes {rule.leaf_axes}")
    sizes = dict(zip(rule.leaf_axes, shape, strict=True))
    choices = [rule.words[axis] or range(sizes[axis]) for axis in rule.indexed_axes]
    for axis, choice in zip(rule.indexed_axes, choices, strict=True):
        if len(choice) != sizes[axis]:
            raise ValueError(f"leaf {path}: axis {axis} is {sizes[axis]}, its rule has {choice}")
    for positions in itertools.product(*(range(len(choice)) for choice in choices)):
        at = dict(zip(rule.indexed_axes, positions, strict=True))
        picked = {a: str(c[at[a]]) for a, c in zip(rule.indexed_axes, choices, strict=True)}
        index = tuple(at.get(axis, slice(None)) for axis in rule.leaf_axes)
        yield rule.format_key({**values, **picked}), Slot(rule, path, index, sizes)


def plan_slots(rules: tuple[Rule, ...], template: Mapping[str, TensorLike]) -> dict[str, Slot]:
    """Lay a table over an abstract tree: every torch key of the model and the slot it fills.

    Args:
        rules: the table.
        template: "/"-joined path -> anything with a shape, for every leaf.

    Raises:
        ValueError: a leaf fits no rule or several, or two leaves claim one torch key; that is an
            error of the table, never of a file.
    """
    slots: dict[str, Slot] = {}
    for path, leaf in template.items():
        fits = [(rule, m) for rule in rules if (m := rule.path_regex.fullmatch(path))]
        if len(fits) != 1:
            raise ValueError(f"leaf {path} fits {len(fits)} rules, it must be exactly 1")
        rule, match = fits[0]
        values = match.groupdict()
        for name, head in rule.reversed_heads.items():
            last = max(int(m.group(name)) for other in template if (m := head.match(other)))
            values[name] = str(last - int(values[name]))
        for key, slot in _rule_slots(rule, path, values, tuple(leaf.shape)):
            if key in slots:
                raise ValueError(f"{key} would fill both {slots[key].leaf} and {path}")
            slots[key] = slot
    return slots


def _name_dtype(tensor: TensorLike) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def is_narrow(tensor: TensorLike) -> bool:
    """Return whether float32 holds every value of the tensor's type exactly, and more."""
    return hasattr(tensor, "dtype") and _name_dtype(tensor) in _NARROW


def _compare(
    expected: Mapping[str, tuple[tuple[int, ...], str]],
    found: Mapping[str, Any],
    widen: bool = False,
) -> list[str]:
    """List every difference between named shapes and dtypes and the tensors found.

    With `widen`, a tensor of a narrower type in place of float32 is none.
    """
    problems = []
    for name, (shape, dtype) in expected.items():
        if name not in found:
            problems.append(f"missing {name} {list(shape)}")
            continue
        if not hasattr(found[name], "shape") or not hasattr(found[name], "dtype"):
            problems.append(f"wrong value of {name}: {type(found[name]).__name__}, not a tensor")
            continue
        if tuple(found[name].shape) != shape:
            got = list(found[name].shape)
            problems.append(f"wrong shape of {name}: {got}, expected {list(shape)}")
        widened = widen and dtype == "float32" and is_narrow(found[name])
        if _name_dtype(found[name]) != dtype and not widened:
            problems.append(f"wrong dtype of {name}: {_name_dtype(found[name])}, expected {dtype}")
    return problems + [f"unexpected {show_name(name)}" for name in found if name not in expected]


@dataclass(frozen=True, kw_only=True)
class Family:
    """A checkpoint family: its table, how its sizes are read off, and how its files are wrapped.

    Attributes:
        kind: one of `checkpoints.KINDS`, as model directories name it.
        architecture: the family that a model directory records.
        infer_config: (shapes by torch key, **options) -> config.
        abstract_tree: config -> "/"-joined path -> shape and dtype of every parameter.
        config_type: the config's class, with `from_dict`.
        options: keywords that `infer_config` takes.
        wrappers: entries of a `.pt` file that may hold the weights, the preferred one first.
        export_wrapper: the entry under which an exported `.pt` holds them.
        layout: config fields that the family's layout fixes.
        prefixes: what training wrappers put in front of every key; removed at import.
        dropped: buffers that carry no weights, with the shape in which an export writes them back
            as zeros, or None if it does not.
        dropped_prefixes: keys that begin with one of them are of training alone (a discriminator,
            a perceptual loss); they are ignored at import, with one printed line for each prefix.
        renames: maps another naming (Hugging Face's, an EMA's) to the names of the table: state
            dict, as found behind `prefixes` -> renamed one, and a note to print ("" for none). It
            runs before anything is dropped, and must read no tensor.
        settings_file: a JSON file beside the weights, whose contents `infer_config` is given as
            `settings`; "" for none.
        write_settings: config -> contents of the settings file, for an export.
        copied_files: names of files beside the weights that belong into a model directory.
        keeps_bfloat16: whether bfloat16 weights stay such; `infer_config` is then given `widen`.
    """

    name: str
    kind: str
    architecture: str
    rules: tuple[Rule, ...]
    infer_config: Callable[..., Any]
    abstract_tree: Callable[[Any], dict[str, TensorLike]]
    config_type: type
    wrappers: tuple[str, ...]
    export_wrapper: str
    options: tuple[str, ...] = ()
    layout: Mapping[str, Any] = field(default_factory=dict)
    prefixes: tuple[str, ...] = ("module.", "_orig_mod.")
    dropped: Mapping[str, tuple[int, ...] | None] = field(default_factory=dict)
    dropped_prefixes: tuple[str, ...] = ()
    renames: Callable[[dict[str, Any]], tuple[dict[str, Any], str]] | None = None
    settings_file: str = ""
    write_settings: Callable[[Any], dict[str, Any]] | None = None
    copied_files: tuple[str, ...] = ()
    keeps_bfloat16: bool = False


@dataclass(frozen=True)
class Plan:
    """A family's table laid over the tree of one config.

    Attributes:
        family: its name.
        template: "/"-joined path -> anything with a shape and dtype, for every leaf.
        slots: torch key -> the part of a leaf that it fills.
        expected: torch key -> shape and dtype.
    """

    family: str
    template: Mapping[str, TensorLike]
    slots: Mapping[str, Slot]
    expected: Mapping[str, tuple[tuple[int, ...], str]]

    @classmethod
    def make(cls, family: Family, template: Mapping[str, TensorLike]) -> "Plan":
        """Lay a family's table over an abstract tree; errors as in `plan_slots`."""
        slots = plan_slots(family.rules, template)
        expected = {k: (slot.shape, str(template[slot.leaf].dtype)) for k, slot in slots.items()}
        return cls(family.name, template, slots, expected)

    def check(self, state: StateDict, *, widen: bool = False) -> None:
        """Hold a state dict against the tree; no tensor is read.

        Args:
            state: torch key -> tensor.
            widen: whether float16 and bfloat16 may stand where float32 is expected.

        Raises:
            ConversionError: every missing and unexpected key, wrong shape and wrong dtype.
        """
        problems = _compare(self.expected, state, widen)
        if problems:
            raise ConversionError(f"not a {self.family} checkpoint of these sizes:", problems)


def import_tree(plan: Plan, state: StateDict, *, widen: bool = False) -> dict[str, np.ndarray]:
    """Arrange a state dict as the leaves of a tree; no tensor is read before all of them fit.

    With `widen`, float16 and bfloat16 become float32 where it is expected, which changes no value.

    Raises:
        ConversionError: every missing and unexpected key, wrong shape and wrong dtype.
    """
    plan.check(state, widen=widen)
    leaves = {path: np.empty(leaf.shape, leaf.dtype) for path, leaf in plan.template.items()}
    for key, slot in plan.slots.items():
        leaves[slot.leaf][slot.index] = slot.from_torch(np.asarray(state[key]))
    return leaves


def export_tree(family: Family, plan: Plan, leaves: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Arrange the leaves of a tree as a state dict, dropped buffers written back as zeros.

    Raises:
        ConversionError: every missing and unexpected leaf, wrong shape and wrong dtype.
    """
    expected = {path: (tuple(leaf.shape), str(leaf.dtype)) for path, leaf in plan.template.items()}
    problems = _compare(expected, leaves)
    if problems:
        raise ConversionError(f"parameters do not fit the {family.name} config:", problems)
    state = {key: slot.to_torch(np.asarray(leaves[slot.leaf])) for key, slot in plan.slots.items()}
    buffers = {key: shape for key, shape in family.dropped.items() if shape is not None}
    return state | {key: np.zeros(shape, np.float32) for key, shape in buffers.items()}
