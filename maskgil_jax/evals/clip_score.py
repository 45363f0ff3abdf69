"""How well pictures match captions, or other pictures: the CLIP score.

Runs CLIP of `transformers` in torch (extra `clip`), which are imported when weights are loaded. The
weights are the user's; none come with this package, and none are downloaded unless asked for by an
address of the hub.

Reference: Hessel et al. 2021, "CLIPScore: A Reference-free Evaluation Metric for Image Captioning",
section 3; Radford et al. 2021, "Learning Transferable Visual Models From Natural Language
Supervision".
"""

import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax import Array
from jaxtyping import Float64, Int
from PIL import Image
from safetensors import SafetensorError

SCALE = 100.0
_NO_CLIP = 'the CLIP score needs transformers and torch: pip install "maskgil_jax[clip]"'
# pathlib takes one of the slashes.
_ADDRESS = re.compile(r"hf://?([\w.-]+/[\w.-]+)(?:@(.+))?", re.ASCII)
_LAYOUT = (
    "config.json, preprocessor_config.json, tokenizer.json (or vocab.json and merges.txt), and "
    "model.safetensors or pytorch_model.bin, as in the repository openai/clip-vit-base-patch32"
)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ClipScorer:
    """A CLIP model with its preparation of pictures and captions; made by `from_pretrained`.

    Attributes:
        model: `transformers.CLIPModel`.
        processor: image processor that goes with it, of the PIL backend.
        tokenizer: `transformers.CLIPTokenizer` that goes with it.
        batch_size: pictures, or captions, that the model is given at once; what is in memory
            beyond the arguments and one number a pair grows with it alone.
    """

    model: Any
    processor: Any
    tokenizer: Any
    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; expected at least 1")

    @classmethod
    def from_pretrained(
        cls, source: os.PathLike | str, *, batch_size: int = 32, device: str = "cpu"
    ) -> "ClipScorer":
        """Load a CLIP model, in float32, with its image processor and tokenizer.

        Args:
            source: a local directory in the layout of Hugging Face, which is read without any
                access to the network, or `hf://owner/name[@revision]`, which `transformers`
                downloads into its cache.
            batch_size: see the class.
            device: where torch runs the model, such as "cpu" or "cuda:0".

        Raises:
            ValueError: no such directory, something missing or unreadable in it, weights that lack
                tensors, a model other than CLIP, a device that is not there, or a batch size
                below 1.
            ImportError: `transformers` or torch is not installed.
        """
        try:
            import torch
            from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

            # By name, since without one torchvision's resizing is taken where it is installed,
            # whose pixels are not those of PIL, which the published models were trained with.
            from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
        except ImportError as error:
            raise ImportError(_NO_CLIP) from error

        name, where = _locate(source)
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"torch has no device {device!r} here: {error}") from error
        try:
            settings, _ = CLIPConfig.get_config_dict(name, **where)
            if not settings:
                raise OSError("it has no config.json, or an empty one")
            if settings.get("model_type") != CLIPConfig.model_type:
                raise ValueError(
                    f"{source} holds a model of type {settings.get('model_type')!r}; expected "
                    f"{CLIPConfig.model_type!r}"
                )
            processor = CLIPImageProcessorPil.from_pretrained(name, **where)
            tokenizer = CLIPTokenizer.from_pretrained(name, **where)
            model, found = CLIPModel.from_pretrained(
                name, dtype="float32", output_loading_info=True, **where
            )
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{source} is no CLIP model: {error}\nExpected {_LAYOUT}") from error
        _check_whole(source, found["missing_keys"], tokenizer, model.config)
        model = model.eval().requires_grad_(False).to(device)
        return cls(model=model, processor=processor, tokenizer=tokenizer, batch_size=batch_size)

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest caption, start and end included; 77 for the published models."""
        return self.model.config.text_config.max_position_embeddings

    def count_tokens(self, captions: Sequence[str]) -> Int[np.ndarray, " b"]:
        """Return the number of tokens of each caption, start and end included, before any cut.

        Raises:
            ValueError: a single string, no captions, or one that is blank or no string.
        """
        captions = _check_captions(captions)
        # Not verbose, or it warns of long ones.
        tokens = self.tokenizer(captions, verbose=False)["input_ids"]
        return np.array([len(row) for row in tokens])

    def text_image(
        self,
        images: np.ndarray | Array,
        captions: Sequence[str],
        *,
        truncate: bool = False,
    ) -> Float64[np.ndarray, " b"]:
        """Score each picture against its caption: 100·max(cos, 0), in [0, 100].

        cos is the cosine between CLIP's features of the two. Captions are taken as they are, with
        no prompt before them.

        Args:
            images: uint8 [b H W 3], RGB of any size; resized and cropped as the processor says.
            captions: one for each.
            truncate: cut captions of more than `max_tokens` tokens, keeping the start and the
                end token, as the reference does. Otherwise they are refused; `count_tokens` tells
                which.

        Raises:
            ValueError: not uint8 RGB, empty, other counts of pictures and captions, or a caption
                that is blank, no string, or too long where `truncate` is False.

        Reference: Hessel et al. 2021, section 3, with 100 in place of 2.5.
        """
        images = _check_images("images", images)
        counts = self.count_tokens(captions)
        _check_counts(images, counts, "captions")
        (long,) = np.nonzero(counts > self.max_tokens)
        if long.size and not truncate:
            raise ValueError(
                f"{long.size} of {counts.size} captions are longer than the {self.max_tokens} "
                f"tokens that the model reads, first caption {long[0]} with {counts[long[0]]}; "
                "shorten them, or say truncate=True to score what fits"
            )
        return np.concatenate(
            [
                _score(self._embed_images(images[block]), self._embed_captions(captions[block]))
                for block in self._blocks(images)
            ]
        )

    def image_image(
        self, images: np.ndarray | Array, others: np.ndarray | Array
    ) -> Float64[np.ndarray, " b"]:
        """Score each picture against another: 100·max(cos, 0), in [0, 100]; 100 for equal ones.

        Args:
            images: uint8 [b H W 3], RGB.
            others: as many, which may have another size.

        Raises:
            ValueError: not uint8 RGB, empty, or of different counts.
        """
        images, others = _check_images("images", images), _check_images("others", others)
        _check_counts(images, others, "others")
        return np.concatenate(
            [
                _score(self._embed_images(images[block]), self._embed_images(others[block]))
                for block in self._blocks(images)
            ]
        )

    def _blocks(self, images: np.ndarray) -> list[slice]:
        starts = range(0, len(images), self.batch_size)
        return [slice(start, start + self.batch_size) for start in starts]

    def _embed_images(self, images: np.ndarray) -> Float64[np.ndarray, "b d"]:
        # As PIL pictures: of an array it would guess which axis has the channels.
        pictures = [Image.fromarray(np.ascontiguousarray(image)) for image in images]
        inputs = self.processor(images=pictures, return_tensors="pt").to(self.model.device)
        return _to_numpy(self.model.get_image_features(**inputs))

    def _embed_captions(self, captions: Sequence[str]) -> Float64[np.ndarray, "b d"]:
        inputs = self.tokenizer(
            list(captions),
            padding=True,
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
        ).to(self.model.device)
        return _to_numpy(self.model.get_text_features(**inputs))


def _locate(source: os.PathLike | str) -> tuple[str, dict[str, Any]]:
    """Return the name to give to `from_pretrained`, and the options that say where it is."""
    text = os.fspath(source)
    if text.startswith("hf:"):
        match = _ADDRESS.fullmatch(text)
        if match is None:
            raise ValueError(
                f"{text!r} is no repository of the hub; write hf://owner/name[@revision]"
            )
        return match.group(1), {"revision": match.group(2) or "main"}
    folder = Path(text)
    if not folder.is_dir():
        raise ValueError(
            f"no directory {text!r}; give one that holds {_LAYOUT}, or the address of such a "
            "repository, hf://owner/name[@revision], to download it"
        )
    # The library makes up an empty vocabulary, or one without merges, where a file is missing.
    names = {path.name for path in folder.iterdir()}
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
        raise ValueError(f"{text} is no CLIP model: it has no tokenizer\nExpected {_LAYOUT}")
    return text, {"local_files_only": True}


def _check_whole(source: os.PathLike | str, missing: set[str], tokenizer: Any, config: Any) -> None:
    """Refuse what the library only warns of, or says when the first caption comes."""
    if missing:
        raise ValueError(
            f"the weights in {source} lack {len(missing)} tensors of the model that config.json "
            f"describes, such as {min(missing)}; the library would take random ones"
        )
    words, known = len(tokenizer), config.text_config.vocab_size
    if not len(tokenizer.all_special_ids) < words <= known:
        raise ValueError(
            f"the tokenizer in {source} has {words} tokens, the model {known}; they do not belong "
            "together"
        )


def _check_images(name: str, images: np.ndarray | Array) -> np.ndarray:
    images = np.asarray(images)
    if images.dtype != np.uint8:
        raise ValueError(
            f"{name} are {images.dtype}; expected uint8 pixels, 0..255: scale floats to that "
            "range, clip and round them"
        )
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
        raise ValueError(
            f"{name} have shape {images.shape}; expected [b H W 3], RGB and not empty: repeat the "
            "channel of grayscale pictures three times, lay those with alpha on a background"
        )
    return images


def _check_captions(captions: Sequence[str]) -> list[str]:
    if isinstance(captions, str):
        raise ValueError(f"captions are the single string {captions!r}; give a list of them")
    captions = list(captions)
    if not captions:
        raise ValueError("no captions; give one for each picture")
    for index, caption in enumerate(captions):
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError(
                f"caption {index} is {caption!r}; expected a text, as a blank one says nothing "
                "about a picture"
            )
    return captions


def _check_counts(images: np.ndarray, others: np.ndarray, name: str) -> None:
    if len(images) != len(others):
        raise ValueError(f"{len(images)} images and {len(others)} {name}; they are scored in pairs")


def _to_numpy(output: Any) -> Float64[np.ndarray, "b d"]:
    # `pooler_output` is the projected feature, in the space that pictures and captions share.
    return output.pooler_output.cpu().numpy().astype(np.float64)


def _score(
    one: Float64[np.ndarray, "b d"], other: Float64[np.ndarray, "b d"]
) -> Float64[np.ndarray, " b"]:
    """Return 100·max(cos, 0) of each pair of features."""
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    if not (np.isfinite(lengths).all() and lengths.all()):
        raise ValueError("the model gives features of NaN, infinity or zero; its weights are bad")
    # Rounding may take equal features a little beyond 1.
    return SCALE * np.clip(np.sum(one * other, axis=1) / lengths, 0.0, 1.0)
