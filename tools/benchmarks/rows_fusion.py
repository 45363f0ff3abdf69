"""The row about fusion from texts: a language model alone, and one that only begins the image."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from benchmarks import ours
from benchmarks.results import CPU, GPU, Result, seconds, summarise
from benchmarks.timing import Effort, measure
from flax import linen as nn

from maskgil_jax import generation, sharding
from maskgil_jax.build import models as build_models
from maskgil_jax.decoding.sampler import SamplerConfig
from maskgil_jax.lumina import Lumina
from maskgil_jax.models.captions import Caption
from maskgil_jax.models.chameleon import ChameleonConfig
from maskgil_jax.models.maskgil_text import MaskGILTextConfig
from maskgil_jax.text.base import Tokenized
from maskgil_jax.text.image_protocol import ImageProtocol
from maskgil_jax.text.tokenization import PromptTokenizer

# What MaskGIL's figure 8 has: a quarter of the codes, and the rest in eight steps.
SHARE, NUM_STEPS, GUIDANCE_SCALE = 0.25, 8, 4.0
# Codes a column and a row of 512×512 pixels, and how many there are; of a trial.
_GRID, _CODES = (32, 32), 8192
_TRIAL_GRID, _TRIAL_CODES = (4, 4), 100
_PROMPT_IDS, _CAPTION_TOKENS, _FEATURE_WIDTH = 64, 64, 2048
# Ids of the published vocabulary.
_FIRST_CODE, _FIRST_SIZE, _NUM_SIZES = 4, 8804, 32
_IDS = dict(start=8197, end=8196, new_line=8803, begin_text=0, end_turn=8710)


class PromptIds(PromptTokenizer):
    """In place of a vocabulary: every prompt is as many ids, which stand for words."""

    def __call__(self, prompts: Sequence[str]) -> Tokenized:
        """Return the ids; see the base."""
        shape = (len(prompts), self.max_length)
        return Tokenized(
            np.full(shape, _FIRST_SIZE + _NUM_SIZES, np.int32),
            np.full(shape[:1], self.max_length, np.int32),
            np.zeros(shape[:1], bool),
        )


class TextFusion:
    """Codes of one image of 512×512 pixels from a prompt, all weights random.

    Args:
        size: of the MaskGIL; `tiny` takes a tiny language model too.
        dtype: type of the computation, and of the language model's parameters.
    """

    def __init__(self, size: str, dtype: str):
        trial = size == ours.TRIAL_SIZE
        self.grid_size, codes = (_TRIAL_GRID, _TRIAL_CODES) if trial else (_GRID, _CODES)
        self._mesh = sharding.make_mesh({}, jax.devices()[:1])
        self._lumina = _make_lumina(trial, codes, dtype, self._mesh)
        like: Any = build_models.model_config(ours.make_config(size, 1, dtype))
        self._model = MaskGILTextConfig(
            num_layers=like.num_layers,
            width=like.width,
            num_heads=like.num_heads,
            mlp_width=like.mlp_width,
            dtype=dtype,
            codebook_size=codes,
            grid_size=self.grid_size,
            text="features",
            text_width=_FEATURE_WIDTH,
        )
        self._params = generation.place(ours.init_params(self._model), self._mesh)
        features = np.random.default_rng(0).standard_normal((1, _CAPTION_TOKENS, _FEATURE_WIDTH))
        self._caption = Caption(features.astype(np.float32), np.full(1, _CAPTION_TOKENS, np.int32))
        self._sampler = SamplerConfig(num_steps=NUM_STEPS, guidance_scale=GUIDANCE_SCALE)

    def begin(self, share: float) -> np.ndarray:
        """Return the first share of the codes, drawn by the language model."""
        return self._lumina.draw(["a prompt"], self.grid_size, share=share)

    def fuse(self) -> np.ndarray:
        """Return all codes, of which the language model draws the first."""
        return generation.generate_tokens(
            self._model,
            self._params,
            self._caption,
            self._sampler,
            start=self.begin(SHARE),
            batch_size=1,
            mesh=self._mesh,
        )


def _make_lumina(trial: bool, codes: int, dtype: str, mesh: Any) -> Lumina:
    """Return a Lumina-mGPT of 7B parameters; a tiny one for a trial."""
    sizes: dict[str, Any] = dict(num_layers=32, width=4096, num_heads=32, mlp_width=11008)
    if trial:
        sizes = dict(num_layers=2, width=64, num_heads=2, mlp_width=128)
    protocol = ImageProtocol(
        **_IDS,
        sizes=tuple(range(_FIRST_SIZE, _FIRST_SIZE + _NUM_SIZES)),
        codes=np.arange(_FIRST_CODE, _FIRST_CODE + codes, dtype=np.int32),
        vocab_size=65536 if not trial else _FIRST_SIZE + _NUM_SIZES + 1,
    )
    config = ChameleonConfig(
        **sizes,
        vocab_size=protocol.vocab_size,
        num_kv_heads=sizes["num_heads"],
        dtype=dtype,
        param_dtype=dtype,
    )
    ids = jnp.zeros((1, 1), jnp.int32)
    params = nn.unbox(jax.jit(config.make_module().init)(jax.random.key(0), ids)["params"])
    tokenizer = PromptIds(library=None, max_length=_PROMPT_IDS, pad_id=0)
    return Lumina.create(config, params, protocol, tokenizer, hashes={}, mesh=mesh)


def text_fusion(
    row: str, size: str, effort: Effort, *, goals: Mapping[str, float]
) -> Iterator[Result]:
    """Measure how many times as long a language model takes alone as when it only begins."""
    dtype = "float32" if jax.default_backend() == CPU else "bfloat16"
    side = TextFusion(size, dtype)
    contenders: dict[str, Callable[[], Any]] = {
        "alone": functools.partial(side.begin, 1.0),
        "fusion": side.fuse,
    }
    times = measure(contenders, dtype, effort)
    gh, gw = side.grid_size
    yield Result(
        row=row,
        name=(
            f"codes of one image from a prompt, time of Lumina-mGPT alone ÷ {SHARE:.0%} of it and "
            f"MaskGIL-{size.upper()} in {NUM_STEPS} steps, {gh}x{gw} codes"
        ),
        **summarise(times.seconds["alone"] / times.seconds["fusion"]),
        goal=goals.get(size) if jax.default_backend() == GPU else None,
        times=times,
        figures={
            "batch": 1,
            "dtype": dtype,
            "guidance_scale": GUIDANCE_SCALE,
            **{f"{name}_seconds": seconds(times, name) for name in contenders},
        },
    )
