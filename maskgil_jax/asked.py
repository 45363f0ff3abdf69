"""What the images of a command are asked to show: classes, or prompts from flags and files."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from maskgil_jax import loading
from maskgil_jax.models import conditioning
from maskgil_jax.models.captions import CaptionModelConfig
from maskgil_jax.text.prompts import check_prompts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """What is to be on the images: classes, or prompts by their number.

    Attributes:
        choices: classes, or 0…n-1 for n prompts.
        num_per_choice: images of each.
        prompts: the texts; none for a class-conditional model.
        negative_prompt: what guidance leads away from.
    """

    choices: np.ndarray
    num_per_choice: int
    prompts: tuple[str, ...] = ()
    negative_prompt: str | None = None

    @classmethod
    def read(
        cls,
        model: loading.Model,
        *,
        labels: Sequence[int] | None,
        num_per_class: int,
        prompts: Sequence[str] | None,
        negative_prompt: str | None,
        num_per_prompt: int,
        records: bool,
    ) -> "Asked":
        """Take it from what was given, and check that it suits the model.

        Raises:
            ValueError: if a label, a prompt or a number is not allowed, there is nothing to show,
                or it is not what the model is conditioned on.
        """
        if isinstance(model.config, CaptionModelConfig):
            if labels is not None or num_per_class != 1:
                raise ValueError(
                    "the model is conditioned on captions; give --prompt and --num_per_prompt, not "
                    "--labels and --num_per_class"
                )
            if not prompts or num_per_prompt < 1:
                raise ValueError("there are no prompts; give --prompt or --prompts_file")
            if records:
                raise ValueError("--records are codes with classes, which this model has not")
            return cls(
                choices=np.arange(len(prompts)),
                num_per_choice=num_per_prompt,
                prompts=tuple(check_prompts(prompts)),
                negative_prompt=negative_prompt,
            )
        if prompts or negative_prompt is not None or num_per_prompt != 1:
            raise ValueError("the model is conditioned on classes; give --labels, no prompts")
        classes = np.arange(model.num_classes) if labels is None else np.asarray(labels)
        if not len(classes) or num_per_class < 1:
            raise ValueError(
                "there are no labels; give one or more, and --num_per_class of at least 1"
            )
        # No training data has the label for "no condition".
        conditioning.check_range("label", classes, model.num_classes + (not records))
        return cls(choices=classes, num_per_choice=num_per_class)

    @property
    def image_labels(self) -> np.ndarray:
        """The class, or the number of the prompt, of every image."""
        return np.repeat(self.choices.astype(np.int32), self.num_per_choice)

    @property
    def settings(self) -> dict[str, Any]:
        """All that the images depend on, for JSON."""
        if not self.prompts:
            return {"labels": self.choices.tolist(), "num_per_class": self.num_per_choice}
        return {
            "prompts": list(self.prompts),
            "negative_prompt": self.negative_prompt,
            "num_per_prompt": self.num_per_choice,
        }

    def bind(self, function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        """Return a method of the generator as a function of labels, or of numbers of prompts."""

        def call(labels: np.ndarray, **options: Any) -> np.ndarray:
            if not self.prompts:
                return function(labels=labels, **options)
            prompts = [self.prompts[label] for label in labels]
            return function(prompts=prompts, negative_prompt=self.negative_prompt, **options)

        return call


def parse_labels(text: str) -> list[int]:
    """Read classes separated by commas.

    Raises:
        ValueError: if one of them is not a whole number.
    """
    items = [item.strip() for item in text.split(",")]
    for item in items:
        if not item.isdecimal():
            raise ValueError(f"--labels {text!r}: {item!r} is no class; write numbers: 3,1,4")
    return [int(item) for item in items]


def read_prompts(path: os.PathLike | str) -> list[str]:
    """Read the prompts of a file, one on every line.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no UTF-8, empty, or has an empty line; the line is named.
    """
    lines = pathlib.Path(path).read_bytes().splitlines()
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}, line {number}: byte {error.start + 1} is no UTF-8; save it as UTF-8"
            ) from error
        if not text:
            raise ValueError(f"{path}, line {number} is empty; every line is a prompt")
        prompts.append(text)
    if not prompts:
        raise ValueError(f"{path} is empty; write a prompt on every line")
    return prompts
