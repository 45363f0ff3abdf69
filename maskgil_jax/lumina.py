"""Lumina-mGPT: a language model that draws image codes after a prompt.

What it draws the first share of, a masked model with the same tokenizer completes: as `ar_model` of
an `ImageGenerator`, or by hand, since the codes are what `generation.generate` takes as `start`.

Reference: Liu et al., 2024, "Lumina-mGPT", `generate_examples/generate.py`; MaskGIL section 5.1.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from maskgil_jax import checkpoints, hub, sharding
from maskgil_jax.decoding import autoregressive, masked, rows
from maskgil_jax.decoding.autoregressive import AutoregressiveConfig, AutoregressiveProgram
from maskgil_jax.decoding.fusion import count_drawn
from maskgil_jax.models.chameleon import ChameleonConfig, Prefix, without_prompt
from maskgil_jax.text.image_protocol import HEAD_LENGTH, ImageProtocol
from maskgil_jax.text.prompts import check_prompts, show
from maskgil_jax.text.tokenization import TOKENIZER_FILE, PromptTokenizer

KIND = "language-model"
# What the weights were trained to answer with an image.
REQUEST = "Generate an image of {width}x{height} according to the following prompt:\n{prompt}"
GUIDANCE_SCALE, TOP_K = 4.0, 2000
# Pixels a code, along each side.
DOWNSAMPLE_FACTOR = 16
# Prefixes are padded to a multiple: few lengths, few compilations.
_PREFIX_BLOCK = 32


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Lumina:
    """A Chameleon with its vocabulary, on a mesh; made by `load` or `create`.

    Attributes:
        config: sizes of the model.
        params: its parameters, split over the mesh.
        protocol: how its vocabulary spells images.
        tokenizer: turns prompts into ids, the beginning of a text first.
        mesh: devices.
        fingerprint: SHA-256 of architecture, parameters and vocabulary.
    """

    config: ChameleonConfig
    params: Any = dataclasses.field(repr=False)
    protocol: ImageProtocol = dataclasses.field(repr=False)
    tokenizer: PromptTokenizer = dataclasses.field(repr=False)
    mesh: Mesh
    fingerprint: str

    @classmethod
    def load(
        cls, path: os.PathLike | str, *, max_length: int = 512, mesh: Mesh | None = None
    ) -> "Lumina":
        """Load a model directory.

        Args:
            path: what `tools/convert_checkpoint.py` made of a Chameleon or Lumina-mGPT; or a model
                directory of the hub, `hf://owner/repo[/folder][@revision]`.
            max_length: ids that a prompt may have.
            mesh: devices; all of them, the parameters split over them, if `None`.

        Raises:
            FileNotFoundError: if there is none, or its tokenizer is missing.
            ValueError: if the directory holds something else or is damaged, its vocabulary does
                not spell images, or the hub does not give it.
            ImportError: if a library that it needs is not installed.
        """
        directory = hub.find_directory(path)
        stored = checkpoints.read_model_dir(directory)
        if (stored.kind, stored.family) != (KIND, ChameleonConfig.family):
            raise ValueError(
                f"{path} holds a {stored.kind} of family {stored.family!r}; needed: a {KIND} of "
                f"family {ChameleonConfig.family!r}"
            )
        config = ChameleonConfig.from_dict(stored.config)
        protocol = ImageProtocol.from_file(directory / TOKENIZER_FILE)
        tokenizer = PromptTokenizer.from_file(
            directory / TOKENIZER_FILE,
            max_length=max_length,
            # It may know more than the model: names that stand for pictures among a text, say.
            vocab_size=max(config.vocab_size, protocol.vocab_size),
            pad_id=protocol.begin_text,
            bos_id=protocol.begin_text,
        )
        return cls.create(
            config, stored.params, protocol, tokenizer, hashes=stored.hashes, mesh=mesh
        )

    @classmethod
    def create(
        cls,
        config: ChameleonConfig,
        params: Any,
        protocol: ImageProtocol,
        tokenizer: PromptTokenizer,
        *,
        hashes: Mapping[str, str],
        mesh: Mesh | None = None,
    ) -> "Lumina":
        """Put a model on a mesh.

        Heads, MLP and vocabulary are split over the mesh's axis `tensor`; all devices are on it if
        there is no mesh.

        Args:
            config: sizes of the model.
            params: its parameters, whole.
            protocol: how its vocabulary spells images.
            tokenizer: that belongs to it.
            hashes: SHA-256 of what parameters and vocabulary were read from, by name.
            mesh: devices.

        Raises:
            ValueError: if the vocabulary spells images with ids that the model does not know.
        """
        if protocol.highest_id >= config.vocab_size:
            raise ValueError(
                f"the vocabulary spells images with ids up to {protocol.highest_id}, but the model "
                f"knows {config.vocab_size}; they do not belong together"
            )
        mesh = mesh or sharding.make_mesh({"tensor": -1})
        shardings = sharding.state_shardings(config.abstract_params(), mesh)
        origin = json.dumps([config.family, config.to_dict(), dict(hashes)], sort_keys=True)
        return cls(
            config=config,
            params=jax.device_put(params, shardings),
            protocol=protocol,
            tokenizer=tokenizer,
            mesh=mesh,
            fingerprint=hashlib.sha256(origin.encode()).hexdigest(),
        )

    @property
    def mask_token_id(self) -> int:
        """What stands for a code that was not drawn, equal to the number of codes."""
        return self.protocol.codebook_size

    def sampler(self, **changes: Any) -> AutoregressiveConfig:
        """Return the settings that the model is published with, some of them changed.

        Raises:
            ValueError: if a value is not allowed.
        """
        top_k = TOP_K if changes.get("temperature") != 0 else 0
        usual = {
            "guidance_scale": GUIDANCE_SCALE,
            "top_k": min(top_k, self.protocol.codebook_size),
        }
        return AutoregressiveConfig(**{**usual, **changes})

    def read(self, prompts: Sequence[str], grid_size: tuple[int, int]) -> list[np.ndarray]:
        """Return the ids before the first code of every image, from the beginning of the text on.

        Args:
            prompts: what the images show.
            grid_size: (gh, gw), codes per column and row.

        Raises:
            ValueError: if a prompt is empty, no text, too long or itself spells an image, or the
                vocabulary has no such size.
        """
        begin = self.protocol.begin(grid_size)
        height, width = (side * DOWNSAMPLE_FACTOR for side in grid_size)
        texts = check_prompts(prompts)
        ids, lengths, lost = self.tokenizer(
            [REQUEST.format(width=width, height=height, prompt=text) for text in texts]
        )
        spells = np.isin(ids, [*self.protocol.stream_ids, self.protocol.start, self.protocol.end])
        for what, wrong in (
            (f"is longer than the {self.tokenizer.max_length} ids of a prompt; shorten it", lost),
            ("has names of the vocabulary that spell images; leave them out", spells.any(1)),
            (
                f"has names beyond the {self.config.vocab_size} that the model knows; leave them "
                "out",
                (ids >= self.config.vocab_size).any(1),
            ),
        ):
            if wrong.any():
                number = int(wrong.argmax())
                raise ValueError(f"prompt {number} {show(prompts[number])} {what}")
        end = [self.protocol.end_turn, *begin]
        return [
            np.append(row[:length], end).astype(np.int32)
            for row, length in zip(ids, lengths, strict=True)
        ]

    def draw(
        self,
        prompts: Sequence[str],
        grid_size: tuple[int, int],
        *,
        negative_prompts: Sequence[str] | None = None,
        share: float = 1.0,
        sampler: AutoregressiveConfig | None = None,
        seed: int = 0,
        first_index: int = 0,
        batch_size: int = 8,
    ) -> Int[np.ndarray, "b gh gw"]:
        """Draw the codes of one image a prompt, or the first share of them in raster order.

        Image i draws its randomness from `fold_in(seed, i)`, as one of `generation.generate` does;
        what it folds into that, no masked decoder does.

        Args:
            prompts: what the images show.
            grid_size: (gh, gw), codes per column and row; both even.
            negative_prompts: what guidance leads away from, one for each image; no prompt at all if
                `None`.
            share: of the codes, 0 to 1; the others are `mask_token_id`.
            sampler: settings of the decoder; those of `sampler()` if `None`.
            seed: seed of all images.
            first_index: number i of the first image, where this is part of a longer list.
            batch_size: images at a time, rounded up to a power of two and to a multiple of the
                mesh's data axes.

        Raises:
            ValueError: as `read`; or if the share, the seed or the batch size is out of range,
                there is another number of negative prompts, prompt and image are longer than the
                model's sequences, or the model gave no numbers.
        """
        sequences = self.read(prompts, grid_size)
        # What begins the image is left of them, where there is no prompt at all.
        away = sequences if negative_prompts is None else self.read(negative_prompts, grid_size)
        if len(away) != len(sequences):
            raise ValueError(
                f"{len(away)} negative prompts for {len(sequences)} prompts; give one for each"
            )
        gh, gw = grid_size
        count = count_drawn(share, gh * gw)
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size} must be at least 1")
        masked.check_seed(seed)
        codes = np.full((len(sequences), gh * gw), self.mask_token_id, np.int32)
        if not count:
            return codes.reshape(-1, gh, gw)
        sampler = sampler or self.sampler()
        longest = max(map(len, [*sequences, *away]))
        length = self._prefix_length(longest, count + (count - 1) // gw)
        run = _make_draw_fn(
            self.config, self.protocol, sampler.program(), self.mesh, length, count, gw
        )
        shards = sharding.batch_shards(self.mesh)
        # A power of two, made a multiple of the shards: few sizes, few compilations.
        size = -(-(1 << (min(batch_size, len(sequences)) - 1).bit_length()) // shards) * shards
        for first in range(0, len(sequences), size):
            some = sequences[first : first + size]
            prefix, null = (
                _pad(_fill_up(rows[first : first + size], size), length)
                for rows in (sequences, away)
            )
            if negative_prompts is None:
                null = without_prompt(null, HEAD_LENGTH)
            rngs = masked.image_keys(seed, first_index + first + np.arange(size))
            batch = jax.device_put((prefix, null), sharding.batch_sharding(self.mesh))
            drawn = np.asarray(run(self.params, batch, rngs, sampler.plan()))[: len(some)]
            if (lost := (drawn < 0).any(1)).any():
                raise ValueError(
                    f"the model gave no numbers (NaN) for image "
                    f"{first_index + first + int(lost.argmax())}; its parameters are damaged, or "
                    "too large for the type it computes in"
                )
            codes[first : first + len(some), :count] = drawn
        return codes.reshape(-1, gh, gw)

    def _prefix_length(self, needed: int, stream: int) -> int:
        """Return to how many ids prefixes are padded: no more than there are positions."""
        rounded = -(-needed // _PREFIX_BLOCK) * _PREFIX_BLOCK
        return max(needed, min(rounded, self.config.max_positions - stream))


def _fill_up(sequences: list[np.ndarray], size: int) -> list[np.ndarray]:
    """Return so many sequences, the last one repeated."""
    return sequences + sequences[-1:] * (size - len(sequences))


def _pad(sequences: Sequence[np.ndarray], length: int) -> Prefix:
    """Return sequences padded in front."""
    ids = [np.pad(sequence, (length - len(sequence), 0), "edge") for sequence in sequences]
    return Prefix(
        ids=np.stack(ids).astype(np.int32), lengths=np.array([*map(len, sequences)], np.int32)
    )


@functools.lru_cache(maxsize=64)
def _make_draw_fn(
    config: ChameleonConfig,
    protocol: ImageProtocol,
    program: AutoregressiveProgram,
    mesh: Mesh,
    prefix_length: int,
    count: int,
    columns: int,
):
    """Return the jitted `(params, prefixes, rngs, plan) → codes [b count]`, -1 for none.

    There are two prefixes of every image, the second what guidance leads away from.
    """
    forced = rows.force_rows(count, columns, protocol.codebook_size)

    def run(params, prefixes, rngs, plan):
        prefix, null = prefixes
        model = config.make_cached(params, protocol.stream_ids, prefix_length)
        stream = autoregressive.decode(
            autoregressive.CausalPredictor(prefix_length, model.start, model.step),
            prefix,
            null,
            rngs,
            program,
            plan,
            count=len(forced),
            forced=forced,
        )
        return rows.take_codes(stream, forced)

    return jax.jit(run, out_shardings=sharding.replicated(mesh))
