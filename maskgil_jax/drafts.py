"""What begins the images of a masked model: what `ImageGenerator` knows of fusion.

Two kinds of model do, in two ways. A causal model of the same grid and condition draws inside the
program that completes the images. A language model reads prompts, by a vocabulary and on a mesh of
its own; the codes that it drew are what a masked model starts from.
"""

import abc
import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from maskgil_jax import checkpoints, hub, loading, lumina, sharding
from maskgil_jax.build import models as build
from maskgil_jax.decoding.autoregressive import AutoregressiveConfig
from maskgil_jax.decoding.fusion import count_drawn
from maskgil_jax.generation import check_first_index, place
from maskgil_jax.lumina import DOWNSAMPLE_FACTOR, Lumina
from maskgil_jax.masking import check_choice
from maskgil_jax.models.base import TokenModelConfig, count_classes
from maskgil_jax.models.captions import CaptionModelConfig
from maskgil_jax.programs import Draft
from maskgil_jax.text.base import TextEncoder
from maskgil_jax.tokenizers.base import Tokenizer, TokenizerSpec

# In front of the names of its settings, where those of both models are given together.
PREFIX = "ar_"
# What may begin images.
CausalModel = loading.Model | Lumina


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shown:
    """What images are to show.

    Attributes:
        condition: as the model that completes them takes it.
        null_condition: what guidance leads away from, or `None`.
        prompts: the texts that the condition was read from; none for classes.
        negative_prompts: those of the null condition, one for each image.
    """

    condition: Any
    null_condition: Any = None
    prompts: Sequence[str] = ()
    negative_prompts: Sequence[str] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """Grid, numbers and batches of the images of a call.

    Attributes:
        grid_size: (gh, gw).
        seed: of all images.
        first_index: number of the first image.
        batch_size: images at a time.
        batch_invariant: whether every image is computed alone.
    """

    grid_size: tuple[int, int]
    seed: int
    first_index: int
    batch_size: int
    batch_invariant: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Begun:
    """How images begin, as `generation.generate` takes it; at most one of the two.

    Attributes:
        draft: what draws the first codes.
        start: int32 [b gh gw], the first codes, and the mask token elsewhere.
    """

    draft: Draft | None = None
    start: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Beginning:
    """What is done to every image.

    Attributes:
        settings: all that decides it, in JSON-friendly types; each name with the prefix.
        text: in words.
    """

    settings: dict[str, Any]
    text: str


@dataclasses.dataclass(frozen=True)
class Drafter(abc.ABC):
    """What draws the first share of the tokens of every image.

    Image i draws from `fold_in(fold_in(seed, i), 0x6172)`, and the model that completes it from
    other folds of `fold_in(seed, i)`.

    Attributes:
        model: a model; its parameters lie on a mesh.
        share: of the tokens, 0 to 1, unless a call says otherwise.
    """

    model: Any
    share: float

    @abc.abstractmethod
    def check_whole(self, what: str) -> None:
        """Raise a `ValueError` unless every device holds all parameters, which `what` needs."""

    @abc.abstractmethod
    def _make_sampler(self, changes: Mapping[str, Any]) -> AutoregressiveConfig:
        """Return the settings of its decoder with some changed, all of them known by name."""

    @abc.abstractmethod
    def _begin(
        self, shown: Shown, call: Call, sampler: AutoregressiveConfig, share: float
    ) -> Begun:
        """Begin images of which one token or more is to be drawn."""

    @abc.abstractmethod
    def check_prompts(self, prompts: Sequence[str], grid_size: tuple[int, int]) -> None:
        """Refuse prompts that a call would refuse, though the other model takes them."""

    def sampler(self, changes: Mapping[str, Any]) -> AutoregressiveConfig:
        """Return the settings of its decoder, those that it has by itself with some changed.

        Args:
            changes: `None` means no change.

        Raises:
            ValueError: if a name is unknown or a value not allowed.
        """
        known = [field.name for field in dataclasses.fields(AutoregressiveConfig)]
        for name in changes:
            check_choice(f"setting {PREFIX}", name, known)
        return self._make_sampler({k: value for k, value in changes.items() if value is not None})

    def describe(self, changes: Mapping[str, Any], share: float | None = None) -> Beginning:
        """Return what it does to every image, for a record and for a line of news.

        The arguments are those of `begin`.
        """
        sampler, share = self.sampler(changes), self.share if share is None else share
        settings = {"model": self.model.fingerprint, "share": share, **dataclasses.asdict(sampler)}
        return Beginning(
            settings={PREFIX + name: value for name, value in settings.items()},
            text=f"the first {share:.0%} of the tokens {sampler.describe()}",
        )

    def begin(
        self, shown: Shown, call: Call, changes: Mapping[str, Any], share: float | None = None
    ) -> Begun:
        """Return how the images of a call begin; nothing of them if no token is to be drawn.

        Args:
            shown: what they show.
            call: their grid, numbers and batches.
            changes: settings of its decoder that differ from its own.
            share: of the tokens; the one it was made with if `None`.

        Raises:
            ValueError: if the share or a setting is not allowed, or a language model does not take
                the prompts, the size or their numbers.
        """
        sampler, share = self.sampler(changes), self.share if share is None else share
        gh, gw = call.grid_size
        if count_drawn(share, gh * gw) == 0:
            return Begun()
        return self._begin(shown, call, sampler, share)


@dataclasses.dataclass(frozen=True)
class CausalDrafter(Drafter):
    """A causal model of the same condition, which draws in the program that completes the images.

    Attributes:
        model: the model.
        mesh: on which its parameters lie, that of the other model.
    """

    model: loading.Model
    mesh: Mesh

    def check_prompts(self, prompts: Sequence[str], grid_size: tuple[int, int]) -> None:
        """Do nothing: it reads what the other model reads; see the base."""

    def check_whole(self, what: str) -> None:
        """Refuse parameters that are split; see the base."""
        sharding.check_whole(what, self.model.params, self.mesh)

    def _make_sampler(self, changes: Mapping[str, Any]) -> AutoregressiveConfig:
        sampler = build.sampler_config(self.model.run, **changes)
        assert isinstance(sampler, AutoregressiveConfig)
        return sampler

    def _begin(
        self, shown: Shown, call: Call, sampler: AutoregressiveConfig, share: float
    ) -> Begun:
        gh, gw = call.grid_size
        draft = Draft(
            model=self.model.config,
            params=self.model.params,
            sampler=sampler,
            count=count_drawn(share, gh * gw),
            condition=shown.condition,
            null_condition=shown.null_condition,
        )
        return Begun(draft=draft)


@dataclasses.dataclass(frozen=True)
class LuminaDrafter(Drafter):
    """A language model that draws codes after the prompts, on a mesh of its own.

    Attributes:
        model: the model.
    """

    model: Lumina

    def check_whole(self, what: str) -> None:
        """Refuse parameters that are split; see the base."""
        if self.model.mesh.shape["tensor"] * self.model.mesh.shape["fsdp"] > 1:
            raise ValueError(
                f"{what} needs the parameters whole on every device, but those of the language "
                f"model are split over the mesh {dict(self.model.mesh.shape)}; load it with a mesh "
                f"of one device, or leave {what} out"
            )

    def check_prompts(self, prompts: Sequence[str], grid_size: tuple[int, int]) -> None:
        """Refuse prompts; see the base."""
        self.model.read(prompts, grid_size)

    def _make_sampler(self, changes: Mapping[str, Any]) -> AutoregressiveConfig:
        return self.model.sampler(**changes)

    def _begin(
        self, shown: Shown, call: Call, sampler: AutoregressiveConfig, share: float
    ) -> Begun:
        count = len(shown.prompts)
        check_first_index(call.first_index, count)
        # Prompts of one call are padded to one length: what is to be computed alone has its own.
        size = 1 if call.batch_invariant else count
        parts = []
        for first in range(0, count, size):
            rows, negative = slice(first, first + size), shown.negative_prompts
            codes = self.model.draw(
                shown.prompts[rows],
                call.grid_size,
                negative_prompts=None if negative is None else negative[rows],
                share=share,
                sampler=sampler,
                seed=call.seed,
                first_index=call.first_index + first,
                batch_size=min(call.batch_size, size),
            )
            parts.append(codes)
        return Begun(start=np.concatenate(parts))


def make_drafter(
    model: CausalModel, share: float, completes: TokenModelConfig, spec: TokenizerSpec, mesh: Mesh
) -> Drafter:
    """Bind what begins images to the model that completes them.

    Args:
        model: a causal model, which is put on the mesh; or a language model, which stays where it
            lies.
        share: of the tokens, 0 to 1, unless a call says otherwise.
        completes: the model that completes the images.
        spec: of its tokenizer.
        mesh: on which that model computes.

    Raises:
        ValueError: if the share is out of range, or the models do not go together; all that
            differs is listed.
    """
    count_drawn(share, completes.seq_len)
    if isinstance(model, Lumina):
        check_lumina(model, completes, spec)
        return LuminaDrafter(model, share)
    check_together(model.config, completes)
    placed = dataclasses.replace(model, params=place(model.params, mesh))
    return CausalDrafter(placed, share, mesh)


def check_together(causal: TokenModelConfig, completes: TokenModelConfig) -> None:
    """Raise a `ValueError` that lists all in which two models differ that must be alike."""
    problems = []
    if not causal.causal:
        problems.append(f"the first, of family {causal.family!r}, is not causal")
    if completes.causal:
        problems.append(f"the second, of family {completes.family!r}, is causal")
    for name in ("codebook_size", "grid_size"):
        first, second = getattr(causal, name), getattr(completes, name)
        if first != second:
            problems.append(f"{name} is {first} and {second}")
    conditions = [_describe_condition(model) for model in (causal, completes)]
    if conditions[0] != conditions[1]:
        problems.append(f"they are conditioned on {conditions[0]} and on {conditions[1]}")
    _refuse(problems)


def check_lumina(model: Lumina, completes: TokenModelConfig, spec: TokenizerSpec) -> None:
    """Raise a `ValueError` that lists all for which a model cannot complete what Lumina begins."""
    problems = []
    if completes.causal:
        problems.append(f"the second, of family {completes.family!r}, is causal")
    if not isinstance(completes, CaptionModelConfig):
        condition = _describe_condition(completes)
        problems.append(f"they are conditioned on prompts and on {condition}")
    if model.protocol.codebook_size != completes.codebook_size:
        sizes = f"{model.protocol.codebook_size} and {completes.codebook_size}"
        problems.append(f"codebook_size is {sizes}")
    if spec.downsample_factor != DOWNSAMPLE_FACTOR:
        problems.append(f"pixels per code are {DOWNSAMPLE_FACTOR} and {spec.downsample_factor}")
    try:
        model.protocol.begin(completes.grid_size)
    except ValueError as error:
        problems.append(str(error))
    _refuse(problems)


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise ValueError(
            "a causal model and the model that completes its images do not go together: "
            + "; ".join(problems)
        )


def _describe_condition(model: TokenModelConfig) -> str:
    """Return what a model is conditioned on, the same for two models that read the same."""
    if not isinstance(model, CaptionModelConfig):
        return f"{count_classes(model)} classes"
    width = f" of width {model.text_width}" if model.text == "features" else ""
    return f"captions of up to {model.text_length} {model.text}{width}"


def load_drafting(
    path: os.PathLike | str,
    tokenizer: Tokenizer,
    text_encoder: TextEncoder | None = None,
    *,
    mesh: Mesh | None = None,
    whole: bool = False,
) -> CausalModel:
    """Load what begins images, and check that it was trained on what another model is given.

    A model directory names no tokenizer and no text encoder, and the run of a model that was
    trained on stored features need not name the latter; of such a causal model only the number of
    codes and the width of the features are known, of a language model the number of codes and the
    pixels of one.

    Args:
        path: run directory or model directory, here or on the hub.
        tokenizer: of the model that completes the images.
        text_encoder: of that model, if it reads features.
        mesh: of that model; over its devices a language model's heads, MLP and vocabulary are
            split. All devices if `None`.
        whole: whether they are not split, but lie on the first device.

    Raises:
        FileNotFoundError: if there is no model, or no checkpoint of it yet.
        ValueError: if it is damaged, or its run names another tokenizer or text encoder.
        ImportError: if a library that its text encoder or vocabulary needs is not installed.
    """
    directory = hub.find_directory(path)
    if checkpoints.is_model_dir(directory) and checkpoints.read_kind(directory) == lumina.KIND:
        devices = jax.devices() if mesh is None else list(mesh.devices.flat)
        split = sharding.make_mesh({"tensor": -1}, devices[:1] if whole else devices)
        return Lumina.load(path, mesh=split)
    model = loading.load_model(path)
    if named := model.run.tokenizer.path:
        theirs = loading.load_tokenizer(named).fingerprint
        if theirs != tokenizer.fingerprint:
            raise ValueError(
                f"{path} was trained on the codes of {named}, whose weights are not those of the "
                "other model's tokenizer; both models must share one"
            )
    if text_encoder is not None and model.run.text.encoder:
        read = loading.open_text_encoder(model, path)
        if read is not None and read.fingerprint != text_encoder.fingerprint:
            raise ValueError(
                f"{path} was trained on the features of {read.name}, whose weights or settings are "
                f"not those of the other model's, {text_encoder.name}; both models must share one"
            )
    return model
