"""Generation as one call: labels in, uint8 images out.

The public face of the generation path: label → condition → decoding loop → tokens → tokenizer →
uint8. What runs it, batch by batch, is in `generation.py`.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Int, UInt8

from maskgil_jax import editing, loading, sharding
from maskgil_jax.build import models as build
from maskgil_jax.build.sizes import check_size
from maskgil_jax.decoding.autoregressive import AutoregressiveConfig
from maskgil_jax.decoding.sampler import SamplerConfig
from maskgil_jax.drafts import (
    PREFIX,
    Begun,
    Call,
    CausalModel,
    Drafter,
    Shown,
    load_drafting,
    make_drafter,
)
from maskgil_jax.generation import (
    Callback,
    Generation,
    Labels,
    check_batch_size,
    decode_images,
    generate,
    padded_size,
    place,
)
from maskgil_jax.masking import check_choice
from maskgil_jax.models.base import TokenModelConfig
from maskgil_jax.models.captions import CaptionModelConfig
from maskgil_jax.models.conditioning import check_range
from maskgil_jax.pictures import grey_out, to_float
from maskgil_jax.text.base import TextEncoder
from maskgil_jax.tokenizers.base import Tokenizer

# Share of the tokens that a causal model draws, where nobody says.
AR_SHARE = 0.25
_NO_CAUSAL = "there is no causal model to begin with; name one, --ar_checkpoint or `ar_checkpoint=`"


class ImageGenerator:
    """A model and its tokenizer, ready to generate and to edit.

        generator = ImageGenerator.from_checkpoint("runs/digits")
        images = generator([3, 1, 4], seed=0, num_steps=8, guidance_scale=2.0)

    Sampler settings that a call leaves out are those of the run that trained the model; they are
    the fields of `SamplerConfig`. A call compiles where no earlier one had the same program (number
    of steps, order, kind of remasking, top-k, which steps are guided), size and batch; batches are
    padded to powers of two, so that few sizes occur. All other settings are numbers given to it.

    The random numbers of image i depend on the seed and on i alone. In float32 on a CPU so does the
    image, but for what rounding does: another batch size or number of devices sums in another
    order, which now and then decides between two nearly equal codes. With `batch_invariant` it does
    not: every image is computed alone, which takes longer.

    With a causal model beside it (`ar_model`, fusion), that one draws the first share of the tokens
    one by one, and the model completes the rest. The settings of its decoder, the fields of
    `AutoregressiveConfig`, are given as `ar_guidance_scale`, `ar_temperature` and so on. Beside a
    text-conditional model it may be a language model, `Lumina`.
    """

    def __init__(
        self,
        model: loading.Model,
        tokenizer: Tokenizer,
        *,
        ar_model: CausalModel | None = None,
        ar_share: float | None = None,
        text_encoder: TextEncoder | None = None,
        batch_size: int = 64,
        mesh: Mesh | None = None,
        batch_invariant: bool = False,
    ):
        """Bind a model to the tokenizer of its codes.

        Args:
            model: the model.
            tokenizer: the tokenizer.
            ar_model: a causal model that begins every image, from the same classes or captions; or
                a `Lumina`, from the prompts, which computes on its own mesh; none if `None`.
            ar_share: share of the tokens that it draws, 0 to 1, where a call does not say; a
                quarter if `None`.
            text_encoder: what turns prompts into features, of a model that was trained with them.
            batch_size: images at a time, rounded up to a power of two.
            mesh: devices to use; all of them if `None`.
            batch_invariant: whether every image is computed alone, so that in float32 on a CPU it
                has the same bits whatever the batch size, the other images and the number of
                devices.

        Raises:
            ValueError: if the tokenizer has another number of codes, the causal model or the text
                encoder does not go with the model, there is a share but no causal model,
                `batch_size` is below 1, or parameters are split over devices where
                `batch_invariant` needs them whole.
        """
        if model.config.codebook_size != tokenizer.spec.codebook_size:
            raise ValueError(
                f"the model predicts {model.config.codebook_size} codes, but the tokenizer has "
                f"{tokenizer.spec.codebook_size}; use the tokenizer that the model was trained on"
            )
        check_batch_size(batch_size)
        if text_encoder is not None:
            build.check_text_encoder(model.config, text_encoder)
        self.model, self.tokenizer, self.text_encoder = model, tokenizer, text_encoder
        self.batch_size, self.batch_invariant = batch_size, batch_invariant
        self.mesh = mesh or sharding.make_mesh({"data": -1})
        self._params = place(model.params, self.mesh)
        self.drafter: Drafter | None = None
        if ar_model is not None:
            share = AR_SHARE if ar_share is None else ar_share
            self.drafter = make_drafter(ar_model, share, model.config, tokenizer.spec, self.mesh)
        elif ar_share is not None:
            raise ValueError(f"ar_share {ar_share}: {_NO_CAUSAL}")
        self._decoder = dataclasses.replace(
            tokenizer, params=place(dict(tokenizer.params), self.mesh)
        )
        if batch_invariant:
            for params in (self._params, self._decoder.params):
                sharding.check_whole("batch_invariant", params, self.mesh)
            if self.drafter is not None:
                self.drafter.check_whole("batch_invariant")

    @classmethod
    def from_checkpoint(
        cls,
        path: os.PathLike | str,
        *,
        ar_checkpoint: os.PathLike | str | None = None,
        ar_share: float | None = None,
        tokenizer: os.PathLike | str | None = None,
        tokenizer_dtype: str | None = None,
        text_encoder: os.PathLike | str | None = None,
        tile_size: int | None = None,
        batch_size: int = 64,
        mesh: Mesh | None = None,
        batch_invariant: bool = False,
    ) -> "ImageGenerator":
        """Load what a training run or `tools/convert_checkpoint.py` wrote.

        Args:
            path: run directory or model directory; of the latter also the address on the Hugging
                Face hub, `hf://owner/repo[/folder][@revision]`.
            ar_checkpoint: run or model directory of a causal model that begins every image, or
                model directory of a Lumina-mGPT, which is split over the devices (with
                `batch_invariant`, whole on the first); none if `None`.
            ar_share: share of the tokens that it draws, 0 to 1, where a call does not say; a
                quarter if `None`.
            tokenizer: path or address of the tokenizer, or `asset:NAME`; by default the run's. A
                model directory names none.
            tokenizer_dtype: type in which the tokenizer computes; as stored if `None`.
            text_encoder: path or address of what makes features of prompts, for a model that reads
                such; by default the run's.
            tile_size: side in pixels of the tiles in which the tokenizer encodes and decodes larger
                images; every image is taken whole if `None`.
            batch_size: images at a time, rounded up to a power of two.
            mesh: devices to use; all of them if `None`.
            batch_invariant: whether every image is computed alone, so that in float32 on a CPU it
                has the same bits whatever the batch size, the other images and the number of
                devices.

        Raises:
            FileNotFoundError: if there is no model, or no checkpoint of it yet.
            ValueError: if something is damaged, names no tokenizer, does not fit, or the hub does
                not give it.
            ImportError: if something lies on the hub, whose client is not installed.
        """
        model = loading.load_model(path)
        vq = loading.open_tokenizer(
            model, path, tokenizer, dtype=tokenizer_dtype, tile_size=tile_size
        )
        encoder = loading.open_text_encoder(model, path, text_encoder)
        ar_model = None
        if ar_checkpoint is not None:
            ar_model = load_drafting(ar_checkpoint, vq, encoder, mesh=mesh, whole=batch_invariant)
        return cls(
            model,
            vq,
            ar_model=ar_model,
            ar_share=ar_share,
            text_encoder=encoder,
            batch_size=batch_size,
            mesh=mesh,
            batch_invariant=batch_invariant,
        )

    @overload
    def __call__(
        self, labels: Labels | None = None, *, return_trace: Literal[False] = False, **options: Any
    ) -> UInt8[np.ndarray, "b H W c"]: ...

    @overload
    def __call__(
        self, labels: Labels | None = None, *, return_trace: Literal[True], **options: Any
    ) -> Generation: ...

    def __call__(
        self,
        labels: Labels | None = None,
        *,
        prompts: Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        seed: int = 0,
        size: tuple[int, int] | None = None,
        rope_interpolation: bool = False,
        ar_share: float | None = None,
        first_index: int = 0,
        callback: Callback | None = None,
        return_trace: bool = False,
        **sampler: Any,
    ) -> UInt8[np.ndarray, "b H W c"] | Generation:
        """Generate one image per label, or per prompt.

        Args:
            labels: classes 0…C-1 (C means "no condition"); or float [b, C+1], the weights of a
                mixture of classes, see `mix_labels`.
            prompts: what the images show, for a text-conditional model, instead of labels.
            negative_prompt: what guidance leads away from, one for all images or one for each; by
                default no prompt at all.
            seed: seed of all images, 0…2³²-1.
            size: (H, W) in pixels, multiples of the tokenizer's factor; the trained one if `None`.
                Of a run with buckets, one of these.
            rope_interpolation: whether another size is spread over the trained positions, instead
                of reaching beyond them.
            ar_share: share of the tokens that the causal model draws, 0 to 1, if there is one.
            first_index: number of the first image, where a call makes part of a longer list.
            callback: called with `(step, tokens [b gh gw])` after every step of every batch; the
                loop then runs on the host, with the same result, and ends if the callback raises.
            return_trace: whether to return a `Generation` with the tokens of every step.
            **sampler: fields of `SamplerConfig` that differ from the run's, and with `ar_` in front
                those of `AutoregressiveConfig` that differ from the causal model's run. If the
                model itself is causal, its are of `AutoregressiveConfig`.

        Returns:
            uint8 images [b H W c]; or a `Generation`.

        Raises:
            ValueError: if a label, a prompt, the seed, the size or a setting is not allowed, or the
                model takes prompts and not labels, or the other way round.
        """
        made = self._generate(
            self._read(labels, prompts, negative_prompt),
            sampler,
            grid_size=self._grid(size),
            rope_interpolation=rope_interpolation,
            ar_share=ar_share,
            seed=seed,
            first_index=first_index,
            callback=callback,
            return_trace=return_trace,
        )
        return made if return_trace else made.images

    def tokens(
        self,
        labels: Labels | None = None,
        *,
        prompts: Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        seed: int = 0,
        size: tuple[int, int] | None = None,
        rope_interpolation: bool = False,
        ar_share: float | None = None,
        first_index: int = 0,
        callback: Callback | None = None,
        **sampler: Any,
    ) -> Int[np.ndarray, "b gh gw"]:
        """Generate the codes only; the arguments are those of a call, but for the trace.

        Raises:
            ValueError: as a call; or if a trace is asked for.
        """
        if "return_trace" in sampler:
            raise ValueError("return_trace has no meaning here; call the generator itself")
        return self._generate(
            self._read(labels, prompts, negative_prompt),
            sampler,
            decode=False,
            grid_size=self._grid(size),
            rope_interpolation=rope_interpolation,
            ar_share=ar_share,
            seed=seed,
            first_index=first_index,
            callback=callback,
        ).tokens

    def edit(
        self,
        images: UInt8[np.ndarray, "b H W c"],
        masks: Bool[np.ndarray, "b H W"],
        labels: Labels | None = None,
        *,
        grow: int = 0,
        feather: float = 0.0,
        **options: Any,
    ) -> Generation:
        """Make parts of images anew, as labels or prompts say, to fit what stays (inpainting).

        Every token that a marked pixel touches is generated; all others keep their codes. Outside
        the marked pixels the images are the given ones.

        Args:
            images: originals.
            masks: true where to generate.
            labels: classes of the results; a text-conditional model takes `prompts` instead.
            grow: cells by which the generated part of the token grid is widened on every side.
            feather: width in pixels of the transition from original to generated, outside the
                mask; 0 is a hard edge.
            **options: prompts, negative_prompt, seed, first_index, callback, return_trace,
                rope_interpolation and sampler settings, as in a call.

        Raises:
            ValueError: if images, masks and labels do not fit one another or the tokenizer, or a
                mask marks nothing or leaves nothing.
        """
        editing.check_masks(images, masks)
        editing.check_feather(feather)
        factor = self.tokenizer.spec.downsample_factor
        regions = editing.token_mask(masks, factor, grow)
        editing.check_regions(regions)
        start = np.where(regions, self.model.config.mask_token_id, self.encode(images))
        made = self._complete(labels, start, **options)
        blended = editing.composite(images, made.images, masks, feather)
        return dataclasses.replace(made, images=blended)

    def outpaint(
        self,
        images: UInt8[np.ndarray, "b H W c"],
        padding: tuple[int, int, int, int],
        labels: Labels | None = None,
        **options: Any,
    ) -> Generation:
        """Continue images beyond their edges.

        Args:
            images: originals.
            padding: pixels to add at the top, bottom, left and right; the result's sides must be
                multiples of the tokenizer's factor.
            labels: classes of the results.
            **options: those of `edit`.

        Raises:
            ValueError: if the padding is negative, zero altogether or no multiple of the factor.
        """
        wide, masks = editing.pad(images, padding)
        return self.edit(wide, masks, labels, **options)

    def vary(
        self,
        images: UInt8[np.ndarray, "b H W c"],
        labels: Labels | None = None,
        *,
        keep: float = 0.5,
        seed: int = 0,
        first_index: int = 0,
        **options: Any,
    ) -> Generation:
        """Draw variations: keep a random share of an image's tokens and generate the others.

        Args:
            images: originals.
            labels: classes of the results.
            keep: share of the tokens to keep, in [0, 1).
            seed: seed of all images, and of which tokens stay.
            first_index: number of the first image, where a call makes part of a longer list.
            **options: prompts, negative_prompt, callback, return_trace, rope_interpolation and
                sampler settings, as in a call.

        Raises:
            ValueError: if `keep` is out of range, or images and labels do not fit.
        """
        known = self.encode(images)
        kept = editing.draw_kept(known.shape, keep, seed, first_index)
        start = np.where(kept, known, self.model.config.mask_token_id)
        return self._complete(labels, start, seed=seed, first_index=first_index, **options)

    def encode(self, images: UInt8[np.ndarray, "b H W c"]) -> Int[np.ndarray, "b gh gw"]:
        """Turn uint8 images into codes.

        Raises:
            ValueError: if a side is no multiple of the tokenizer's factor, or the channels differ.
        """
        floats = to_float(images)
        if self.batch_invariant and len(images):
            # By itself, so that also the latents of tiles are quantised without the others.
            alone = [self.tokenizer.encode(image[None], batch_size=1) for image in floats]
            return np.concatenate(alone)
        size = padded_size(max(1, min(self.batch_size, len(images))), 1)
        return np.asarray(self.tokenizer.encode(floats, batch_size=size))

    def decode(self, tokens: Int[np.ndarray, "b gh gw"]) -> UInt8[np.ndarray, "b H W c"]:
        """Turn codes into uint8 images, clipped, never rescaled."""
        at_once = 1 if self.batch_invariant else self.batch_size
        return decode_images(self.tokenizer, tokens, batch_size=at_once)

    def show_steps(self, trace: Int[np.ndarray, "t b gh gw"]) -> UInt8[np.ndarray, "t b H W c"]:
        """Return pictures of the tokens after every step, with flat grey where they are masked.

        A masked token is decoded as what it is at the end of the trace (code 0 if it is masked
        there too), and its pixels are covered: a tokenizer's pixels depend on neighbouring codes,
        so this shows the decided ones as they will look.

        Args:
            trace: of a `Generation`; or tokens that a callback was given, [None] in front.

        Raises:
            ValueError: if a token is out of range, or there is no step.
        """
        trace, mask = np.asarray(trace), self.model.config.mask_token_id
        if trace.ndim != 4 or not len(trace):
            raise ValueError(f"the trace has shape {trace.shape}; give [t b gh gw], t at least 1")
        check_range("token", trace, mask + 1)
        last = np.where(trace[-1] == mask, 0, trace[-1])
        whole = np.where(trace == mask, last, trace)
        images = self.decode(whole.reshape(-1, *trace.shape[2:]))
        return grey_out(images.reshape(*trace.shape[:2], *images.shape[1:]), trace == mask)

    def sampler(
        self, grid_size: tuple[int, int] | None = None, /, **changes: Any
    ) -> SamplerConfig | AutoregressiveConfig:
        """Return the run's sampler settings with some changed.

        Args:
            grid_size: (gh, gw), whose tokens limit the number of steps; the trained one if `None`.
            **changes: fields of `SamplerConfig`, of a causal model of `AutoregressiveConfig`;
                `None` means no change.

        Raises:
            ValueError: if a name is unknown, with the nearest one, or a value is not allowed.
        """
        kind = AutoregressiveConfig if self.model.config.causal else SamplerConfig
        known = [field.name for field in dataclasses.fields(kind)]
        for name in changes:
            check_choice("sampler setting", name, known)
        run = self.model.run
        if grid_size not in (None, self.model.config.grid_size):
            run = run.copy_and_resolve_references()
            run.model.grid_size = grid_size
        return build.sampler_config(run, **changes)

    def split_settings(
        self, settings: Mapping[str, Any], ar_share: float | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return settings of the model's decoder, and of the causal model's without their prefix.

        Raises:
            ValueError: if there are some of the latter, or a share, but no causal model.
        """
        drafted = {name: value for name, value in settings.items() if name.startswith(PREFIX)}
        given = [name for name, value in drafted.items() if value is not None]
        if ar_share is not None:
            given.append("ar_share")
        if given and self.drafter is None:
            raise ValueError(f"{', '.join(given)}: {_NO_CAUSAL}")
        own = {name: value for name, value in settings.items() if name not in drafted}
        return own, {name.removeprefix(PREFIX): value for name, value in drafted.items()}

    def check_prompts(
        self,
        prompts: Sequence[str],
        negative_prompt: str | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        """Refuse prompts that a call would refuse; for a long list, before it is begun.

        The arguments are those of a call.

        Raises:
            ValueError: if one is empty, no text or longer than the models read, there are no
                images of that size, or the model takes no prompts.
        """
        model = self.model.config
        if not isinstance(model, CaptionModelConfig):
            raise ValueError(_describe_classes(model))
        if negative_prompt is not None:
            _check_negative([negative_prompt])
        for texts in (prompts, *([] if negative_prompt is None else [[negative_prompt]])):
            build.tokenize_prompts(model, texts, self.text_encoder)
            if self.drafter is not None:
                self.drafter.check_prompts(texts, self._grid(size))

    def _grid(self, size: tuple[int, int] | None) -> tuple[int, int]:
        if size is None:
            return self.model.config.grid_size
        sides = size if isinstance(size, Sequence) and not isinstance(size, str) else ()
        if len(sides) != 2 or not all(isinstance(side, int | np.integer) for side in sides):
            raise ValueError(f"size {size!r}: give (height, width) in pixels, whole numbers")
        check_size(self.model.run, (int(sides[0]), int(sides[1])))
        return self.tokenizer.spec.grid_size(*sides)

    def _complete(
        self,
        labels: Labels | None,
        start: np.ndarray,
        /,
        *,
        prompts: Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        rope_interpolation: bool = False,
        seed: int = 0,
        first_index: int = 0,
        callback: Callback | None = None,
        return_trace: bool = False,
        **sampler: Any,
    ) -> Generation:
        return self._generate(
            self._read(labels, prompts, negative_prompt),
            sampler,
            start=start,
            rope_interpolation=rope_interpolation,
            seed=seed,
            first_index=first_index,
            callback=callback,
            return_trace=return_trace,
        )

    def _read(
        self,
        labels: Labels | None,
        prompts: Sequence[str] | None,
        negative_prompt: str | Sequence[str] | None,
    ) -> Shown:
        """Return what images are to show, as models take it."""
        model = self.model.config
        if not isinstance(model, CaptionModelConfig):
            if labels is None or (prompts, negative_prompt) != (None, None):
                raise ValueError(_describe_classes(model))
            return Shown(condition=labels)
        if labels is not None or prompts is None:
            raise ValueError(
                f"a model of family {model.family!r} is conditioned on captions: give prompts, a "
                "list of texts, and no labels"
            )
        read = functools.partial(
            build.read_prompts,
            model,
            encoder=self.text_encoder,
            batch_size=1 if self.batch_invariant else self.batch_size,
        )
        caption = read(prompts)
        if negative_prompt is None:
            return Shown(condition=caption, prompts=prompts)
        if isinstance(negative_prompt, str):
            negative_prompt = [negative_prompt] * len(prompts)
        if len(negative_prompt) != len(prompts):
            raise ValueError(
                f"{len(negative_prompt)} negative prompts for {len(prompts)} prompts; give one for "
                "all of them, or one for each"
            )
        _check_negative(negative_prompt)
        return Shown(
            condition=caption,
            null_condition=read(negative_prompt),
            prompts=prompts,
            negative_prompts=negative_prompt,
        )

    def _generate(
        self,
        shown: Shown,
        sampler: Mapping[str, Any],
        *,
        start: np.ndarray | None = None,
        decode: bool = True,
        grid_size: tuple[int, int] | None = None,
        rope_interpolation: bool = False,
        ar_share: float | None = None,
        seed: int = 0,
        first_index: int = 0,
        callback: Callback | None = None,
        return_trace: bool = False,
    ) -> Generation:
        model = self.model.config
        sampler, drafted = self.split_settings(sampler, ar_share)
        # What is known at the start, the masked model alone can complete.
        if start is not None and (ar_share is not None or drafted):
            raise ValueError("an edit keeps tokens, which a causal model cannot begin before")
        if start is not None:
            grid_size = start.shape[1:]
        # Refuses what cannot be, before a token is drawn.
        config = self.sampler(grid_size, **sampler)
        if rope_interpolation:
            model = _interpolate(model)
        begun = Begun(start=start)
        if self.drafter is not None and start is None:
            call = Call(
                grid_size=grid_size or model.grid_size,
                seed=seed,
                first_index=first_index,
                batch_size=self.batch_size,
                batch_invariant=self.batch_invariant,
            )
            begun = self.drafter.begin(shown, call, drafted, ar_share)
        draft = begun.draft
        if rope_interpolation and draft is not None:
            draft = dataclasses.replace(draft, model=_interpolate(draft.model))
        return generate(
            model,
            self._params,
            shown.condition,
            config,
            draft=draft,
            tokenizer=self._decoder if decode else None,
            seed=seed,
            batch_size=self.batch_size,
            mesh=self.mesh,
            start=begun.start,
            null_condition=shown.null_condition,
            grid_size=grid_size,
            first_index=first_index,
            callback=callback,
            return_trace=return_trace,
            batch_invariant=self.batch_invariant,
        )


def _check_negative(prompts: Sequence[str]) -> None:
    """Raise a `ValueError` that speaks of the negative prompt if one is empty."""
    for prompt in prompts:
        if isinstance(prompt, str) and not prompt.strip():
            raise ValueError(f"negative_prompt {prompt!r} is empty; leave it out (None) for none")


def _describe_classes(model: TokenModelConfig) -> str:
    return f"a model of family {model.family!r} is conditioned on classes: give labels, not prompts"


def _interpolate(model: TokenModelConfig) -> Any:
    """Return the model with another grid's positions spread over the trained ones."""
    if not hasattr(model, "rope_interpolation"):
        raise ValueError(f"a model of family {model.family!r} has no rotary positions")
    changed: Any = {"rope_interpolation": True}
    return dataclasses.replace(model, **changed)
