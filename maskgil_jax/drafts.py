"""A causal model that begins the images of a masked one: what `ImageGenerator` knows of fusion."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from maskgil_jax import loading
from maskgil_jax.build import models as build
from maskgil_jax.decoding.autoregressive import AutoregressiveConfig
from maskgil_jax.decoding.fusion import count_drawn
from maskgil_jax.generation import place
from maskgil_jax.masking import check_choice
from maskgil_jax.models.base import TokenModelConfig, count_classes
from maskgil_jax.models.captions import CaptionModelConfig
from maskgil_jax.programs import Draft
from maskgil_jax.text.base import TextEncoder
from maskgil_jax.tokenizers.base import Tokenizer

# In front of the names of its settings, where those of both models are given together.
PREFIX = "ar_"


@dataclasses.dataclass(frozen=True)
class Drafter:
    """A causal model that draws the first share of the tokens of every image.

    Attributes:
        model: the model; its parameters lie on the mesh.
        share: of the tokens, 0 to 1, unless a call says otherwise.
    """

    model: loading.Model
    share: float

    @classmethod
    def create(
        cls, model: loading.Model, share: float, completes: TokenModelConfig, mesh: Mesh
    ) -> "Drafter":
        """Bind a causal model to the one that completes its images.

        Raises:
            ValueError: if the share is out of range, or the models do not go together; all that
                differs is listed.
        """
        count_drawn(share, completes.seq_len)
        check_together(model.config, completes)
        placed = dataclasses.replace(model, params=place(model.params, mesh))
        return cls(placed, share)

    def sampler(self, changes: Mapping[str, Any]) -> AutoregressiveConfig:
        """Return the settings of its decoder, those of its run with some changed.

        Raises:
            ValueError: if a name is unknown or a value not allowed.
        """
        known = [field.name for field in dataclasses.fields(AutoregressiveConfig)]
        for name in changes:
            check_choice(f"setting {PREFIX}", name, known)
        sampler = build.sampler_config(self.model.run, **changes)
        assert isinstance(sampler, AutoregressiveConfig)
        return sampler

    def describe(self, changes: Mapping[str, Any], share: float | None = None) -> "Beginning":
        """Return what it does to every image, for a record and for a line of news.

        The arguments are those of `draft`.
        """
        sampler, share = self.sampler(changes), self.share if share is None else share
        settings = {"model": self.model.fingerprint, "share": share, **dataclasses.asdict(sampler)}
        return Beginning(
            settings={PREFIX + name: value for name, value in settings.items()},
            text=f"the first {share:.0%} of the tokens {sampler.describe()}",
        )

    def draft(
        self,
        condition: Any,
        null_condition: Any,
        seq_len: int,
        share: float | None,
        changes: Mapping[str, Any],
    ) -> Draft | None:
        """Return what draws the first tokens; `None` if there are none to draw.

        Args:
            condition: of the images.
            null_condition: what guidance leads away from, or `None`.
            seq_len: tokens of an image.
            share: of them; the one it was made with if `None`.
            changes: settings of its decoder that differ from its run's.
        """
        sampler = self.sampler(changes)
        count = count_drawn(self.share if share is None else share, seq_len)
        if count == 0:
            return None
        return Draft(
            model=self.model.config,
            params=self.model.params,
            sampler=sampler,
            count=count,
            condition=condition,
            null_condition=null_condition,
        )


@dataclasses.dataclass(frozen=True)
class Beginning:
    """What a causal model does to every image.

    Attributes:
        settings: all that decides it, in JSON-friendly types; each name with the prefix.
        text: in words.
    """

    settings: dict[str, Any]
    text: str


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
    path: os.PathLike | str, tokenizer: Tokenizer, text_encoder: TextEncoder | None = None
) -> loading.Model:
    """Load a causal model, and check that it was trained on what another model is given.

    A model directory names no tokenizer and no text encoder; of it only the number of codes and the
    width of the features are known.

    Args:
        path: run directory or model directory, here or on the hub.
        tokenizer: of the model that completes its images.
        text_encoder: of that model, if it reads features.

    Raises:
        FileNotFoundError: if there is no model, or no checkpoint of it yet.
        ValueError: if it is damaged, or its run names another tokenizer or text encoder.
        ImportError: if a library that its text encoder needs is not installed.
    """
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
