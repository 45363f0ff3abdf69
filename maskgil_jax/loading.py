"""Trained things ready to use: load a model or a tokenizer from where it was written.

A run directory (`python -m maskgil_jax.train`), a model directory (`tools/convert_checkpoint.py`),
here or on the Hugging Face hub, or an asset of the package.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Integer
from ml_collections import ConfigDict

from maskgil_jax import checkpoints, config, convert, hub, workdir
from maskgil_jax.build import models as build
from maskgil_jax.convert.files import open_checkpoint
from maskgil_jax.evals.inception import Inception, InceptionConfig
from maskgil_jax.models.base import TokenModelConfig, count_classes
from maskgil_jax.models.captions import CaptionModelConfig
from maskgil_jax.models.conditioning import check_range
from maskgil_jax.text import gemma_encoder, transformers_encoder
from maskgil_jax.text.base import TextEncoder
from maskgil_jax.text.gemma import GemmaConfig
from maskgil_jax.text.gemma_encoder import GemmaEncoder
from maskgil_jax.text.tokenization import TOKENIZER_FILE, PromptTokenizer
from maskgil_jax.text.transformers_encoder import TransformersEncoder
from maskgil_jax.tokenizers.base import Tokenizer, update_digest
from maskgil_jax.tokenizers.tiling import Tiling

# What decides, beside the encoder itself, which features a model reads.
TEXT_SETTINGS = ("hidden_layer", "dtype")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A model with its parameters.

    Attributes:
        config: architecture.
        params: tree of float32 parameters.
        run: the configuration of the run that trained it (defaults where it was imported).
    """

    config: TokenModelConfig
    params: Any = dataclasses.field(repr=False)
    run: ConfigDict = dataclasses.field(repr=False)

    @property
    def num_classes(self) -> int:
        """Number of classes; a `ValueError` if the model is conditioned on something else."""
        return count_classes(self.config)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of family, architecture and parameters."""
        fields = [self.config.family, self.config.to_dict()]
        digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
        update_digest(digest, self.params)
        return digest.hexdigest()

    def logits(
        self,
        tokens: Integer[Array | np.ndarray, "b gh gw"],
        condition: Any,
    ) -> Float[Array, "b l v"]:
        """Return float32 logits [b, gh·gw, v] of every image token, in raster order.

        Those of a masked model are of K codes and the mask token, v = K+1; those of a causal one
        are of the K codes, and of a token given those before it.

        Args:
            tokens: codes 0…K-1, or K where masked, which a causal model does not know.
            condition: classes 0…C-1, where C means "no condition", or mixtures of them; of a text
                model a `Caption`.

        Raises:
            ValueError: if a token or label is out of range, or the shapes do not fit.
        """
        tokens, condition = np.asarray(tokens), self.config.check_condition(condition)
        count = len(jax.tree.leaves(condition)[0])
        if tokens.ndim != 3 or count != len(tokens):
            raise ValueError(
                f"tokens {tokens.shape} must be [b, gh, gw], and there are {count} conditions"
            )
        check_range("token", tokens, self.config.num_tokens)
        module = self.config.make_module()
        return _apply(module, self.params, jnp.asarray(tokens, jnp.int32), condition)


@functools.partial(jax.jit, static_argnums=0)
def _apply(module, params, tokens, condition):
    return module.apply({"params": params}, tokens, condition)


def load_tokenizer(
    path: os.PathLike | str, *, dtype: str | None = None, tile_size: int | None = None
) -> Tokenizer:
    """Load a tokenizer from a model directory, a run directory, or `asset:NAME`.

    Args:
        path: what `tools/convert_checkpoint.py` or a training run of kind `tokenizer` wrote; a
            model directory of the hub, `hf://owner/repo[/folder][@revision]`; or the name of a
            tokenizer that the package ships, e.g. `asset:digits_tokenizer`.
        dtype: type in which its nets compute, `float32` or `bfloat16`; as stored if `None`.
            Parameters and the quantiser are float32.
        tile_size: side in pixels of the tiles in which larger images are encoded and decoded, see
            `Tiling`; every image is taken whole if `None`.

    Raises:
        FileNotFoundError: if there is none of them.
        ValueError: if the directory holds something else or is damaged, the hub does not give it,
            for another type, or for a tile size that does not suit the tokenizer.
        ImportError: if it lies on the hub, whose client is not installed.
    """
    tokenizer = _open_tokenizer(path)
    if tile_size is not None:
        tokenizer = dataclasses.replace(tokenizer, tiling=Tiling(tile_size=tile_size))
    if dtype is None:
        return tokenizer
    fields = tokenizer.config.to_dict() | {"dtype": dtype}
    return dataclasses.replace(tokenizer, config=tokenizer.config.from_dict(fields))


def open_tokenizer(
    model: Model,
    workdir: os.PathLike | str,
    path: os.PathLike | str | None = None,
    *,
    dtype: str | None = None,
    tile_size: int | None = None,
) -> Tokenizer:
    """Load the tokenizer of a model, and check that both fit.

    Args:
        model: the model.
        workdir: where it was loaded from.
        path: the tokenizer; by default the one that the model's run names.
        dtype: type in which its nets compute; as stored if `None`.
        tile_size: side of its tiles in pixels, as `load_tokenizer` takes it.

    Raises:
        ValueError: if none is named, or it has other codes or another size than the model's run.
    """
    chosen = path or model.run.tokenizer.path
    if not chosen:
        raise ValueError(
            f"{workdir} names no tokenizer; name the right one, --tokenizer or `tokenizer=`"
        )
    tokenizer = load_tokenizer(chosen, dtype=dtype, tile_size=tile_size)
    run = model.run.copy_and_resolve_references()
    if hub.is_address(workdir) or checkpoints.is_model_dir(workdir):
        # It records no image size, so the grid decides.
        factor = tokenizer.spec.downsample_factor
        run.data.image_size = tuple(side * factor for side in model.config.grid_size)
    build.check_fit(run, tokenizer.spec, num_classes=None)
    return tokenizer


def _open_tokenizer(path: os.PathLike | str) -> Tokenizer:
    is_remote = hub.is_address(path)
    directory = hub.find_directory(path) if is_remote else build.resolve_path(str(path))
    if checkpoints.is_model_dir(directory):
        stored = checkpoints.read_model_dir(directory)
        _check_kind(path, stored.kind, "tokenizer")
        return build.create_tokenizer(stored.family, stored.config, stored.params)
    run = workdir.read_run_config(directory)
    _check_kind(path, run.kind, "tokenizer")
    vq = build.tokenizer_config(run)
    images = jnp.zeros(
        (1, vq.spec.downsample_factor, vq.spec.downsample_factor, vq.spec.image_channels)
    )
    module = vq.make_module()
    params = _restore_params(directory, lambda rng: module.init(rng, images)["params"])
    return Tokenizer(config=vq, params=params)


def load_model(path: os.PathLike | str) -> Model:
    """Load a model from a model directory or a training run's directory.

    Of a run, the newest verified checkpoint is read: the average of the parameters where the run
    keeps one, else the parameters.

    Args:
        path: what `tools/convert_checkpoint.py` or `python -m maskgil_jax.train` wrote; or a model
            directory of the hub, `hf://owner/repo[/folder][@revision]`.

    Raises:
        FileNotFoundError: if there is neither.
        ValueError: if the directory holds something else or is damaged, or the hub does not give
            it.
        ImportError: if it lies on the hub, whose client is not installed.
    """
    directory = hub.find_directory(path)
    if checkpoints.is_model_dir(directory):
        stored = checkpoints.read_model_dir(directory)
        _check_kind(path, stored.kind, "model")
        model = build.find_model(stored.family).from_dict(stored.config)
        run = config.preset(model.preset)
        run.model.update(model.to_dict() | {"family": model.family, "grid_size": model.grid_size})
        _take_over_text(path, run, stored.source)
        params = jax.tree.map(jnp.asarray, stored.params)
        return Model(config=model, params=params, run=run)
    run = workdir.read_run_config(directory)
    _check_kind(path, run.kind, "maskgil")
    model = build.model_config(run)
    return Model(config=model, params=_restore_params(directory, build.init_model(model)), run=run)


def _take_over_text(path: os.PathLike | str, run: ConfigDict, source: Mapping[str, Any]) -> None:
    """Let a run read the features that the one did whose weights were exported.

    Raises:
        ValueError: if what is said of them is damaged.
    """
    text = source.get("text", {})
    try:
        run.text.update({name: text[name] for name in TEXT_SETTINGS if name in text})
    except (TypeError, KeyError) as error:
        raise ValueError(
            f"{path} says of the features that its model reads: {text!r}; export it again"
        ) from error


def open_text_encoder(
    model: Model, workdir: os.PathLike | str, path: os.PathLike | str | None = None
) -> TextEncoder | None:
    """Load the text encoder whose features a model reads; `None` for a model that reads none.

    Args:
        model: the model.
        workdir: where it was loaded from.
        path: the encoder; by default the one that the model's run names.

    Raises:
        FileNotFoundError: if there is none, or its tokenizer is missing.
        ValueError: if none is named, one is named that the model has no use for, or it does not
            fit.
        ImportError: if a library that it needs is not installed.
    """
    shape, run = model.config, model.run
    chosen = path or run.text.encoder
    if not isinstance(shape, CaptionModelConfig) or shape.text != "features":
        if path:
            raise ValueError(f"the model in {workdir} reads no features; leave {path} out")
        return None
    if not chosen:
        raise ValueError(
            f"{workdir} names no text encoder; name the right one, --text_encoder or "
            "`text_encoder=`"
        )
    encoder = load_text_encoder(
        chosen,
        max_length=shape.text_length,
        hidden_layer=run.text.hidden_layer,
        dtype=run.text.dtype,
    )
    build.check_text_encoder(shape, encoder)
    return encoder


def load_text_encoder(
    path: os.PathLike | str,
    *,
    max_length: int = 120,
    hidden_layer: int = -1,
    dtype: str | None = None,
    device: str = "cpu",
) -> TextEncoder:
    """Load a text encoder: Gemma from a model directory, any other from Hugging Face's layout.

    Args:
        path: what `tools/convert_checkpoint.py` made of a Gemma; a model directory of the hub,
            `hf://owner/repo[/folder][@revision]`; or a directory of a model that `transformers`
            knows as a text encoder, T5 say.
        max_length: tokens to which prompts are padded, and at which they are cut.
        hidden_layer: which hidden layer the features are, as transformers counts: 0 the embeddings,
            n the output of block n, -1 the last, normed. Of Gemma, layers beyond it are not kept.
        dtype: type in which it computes and of its parameters, `float32` or `bfloat16`; if `None`,
            that of Gemma's stored parameters, and float32 for others.
        device: where torch computes models that are not in JAX, such as "cpu" or "cuda:0".

    Raises:
        FileNotFoundError: if there is none of them, or its tokenizer is missing.
        ValueError: if the directory holds something else or is damaged, the hub does not give it,
            or a setting does not suit it.
        ImportError: if a library that it needs is not installed.
    """
    directory = hub.find_directory(path)
    if not checkpoints.is_model_dir(directory):
        return TransformersEncoder.from_pretrained(
            directory,
            max_length=max_length,
            hidden_layer=hidden_layer,
            dtype=dtype or "float32",
            device=device,
        )
    if device != "cpu":
        raise ValueError(
            f"device {device!r} is for encoders in torch; {path} is computed where JAX computes"
        )
    stored = checkpoints.read_model_dir(directory)
    _check_gemma(path, stored.kind, stored.family)
    shape = GemmaConfig.from_dict(stored.config)
    if TOKENIZER_FILE not in stored.hashes:
        raise FileNotFoundError(
            f"{path} holds no {TOKENIZER_FILE}; convert the checkpoint again, with that file "
            "of its repository beside it"
        )
    tokenizer = PromptTokenizer.from_file(
        directory / TOKENIZER_FILE,
        max_length=max_length,
        vocab_size=shape.vocab_size,
        pad_id=shape.pad_id,
        bos_id=shape.bos_id,
    )
    return GemmaEncoder.create(
        shape,
        stored.params,
        tokenizer,
        name=pathlib.Path(str(path).partition("@")[0]).name,
        hashes=stored.hashes,
        hidden_layer=hidden_layer,
        dtype=dtype,
    )


def _check_gemma(path: os.PathLike | str, kind: str, family: str) -> None:
    _check_kind(path, kind, "text-encoder")
    if family != GemmaConfig.family:
        raise ValueError(f"{path} is of family {family!r}; allowed: {GemmaConfig.family!r}")


class TextIdentity(NamedTuple):
    """Which text encoder lies in a directory.

    Attributes:
        fingerprint: that it has when it is loaded with the settings asked for.
        dtype: type in which it computes if none is asked for.
    """

    fingerprint: str
    dtype: str


def identify_text_encoder(
    path: os.PathLike | str, *, max_length: int, hidden_layer: int, dtype: str
) -> TextIdentity:
    """Tell which text encoder would be loaded, without loading it.

    Of a Gemma its `config.json` alone is read, and trusted; of others the files of weights are. No
    extra is needed.

    Args:
        path: as `load_text_encoder` takes it.
        max_length: as there.
        hidden_layer: as there.
        dtype: as there, `float32` or `bfloat16`.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if the directory holds something else or is damaged, the hub does not give it,
            or there is no such hidden layer.
        ImportError: if it lies on the hub, whose client is not installed.
    """
    settings: dict[str, Any] = {"max_length": max_length, "hidden_layer": hidden_layer}
    name = checkpoints.MODEL_FILES[0]
    if hub.is_address(path):
        file = hub.HubFolder.parse(path).file(name).download()
    elif checkpoints.is_model_dir(path):
        file = pathlib.Path(path) / name
    else:
        found = transformers_encoder.find_fingerprint(path, **settings, dtype=dtype)
        return TextIdentity(found, "float32")
    header = checkpoints.read_header(file)
    _check_gemma(path, header["kind"], header["family"])
    shape = GemmaConfig.from_dict(header["config"])
    found = gemma_encoder.find_fingerprint(shape, header["sha256"], **settings, dtype=dtype)
    return TextIdentity(found, shape.param_dtype)


# For messages: the weights of FID's Inception, and where they are.
INCEPTION_WEIGHTS = (
    "pt_inception-2015-12-05-6726825d.pth (of the release fid_weights of "
    "https://github.com/mseitzer/pytorch-fid), or a model directory made from it"
)


def load_inception(path: os.PathLike | str) -> Inception:
    """Load the InceptionV3 of FID from its published file, or from a model directory.

    Args:
        path: `pt_inception-2015-12-05-6726825d.pth` (which needs PyTorch, of the extra `torch`), a
            `.safetensors` file of the same tensors, or what `tools/convert_checkpoint.py` made.

    Raises:
        FileNotFoundError: if there is neither.
        ValueError: if the file or directory holds something else or is damaged.
        ImportError: if it is a `.pth` file and PyTorch is not installed.
    """
    path = pathlib.Path(path)
    family = InceptionConfig.family
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give {INCEPTION_WEIGHTS}")
    if path.is_dir():
        stored = checkpoints.read_model_dir(path)
        if stored.family != family:
            raise ValueError(
                f"{path} holds a {stored.kind} of family {stored.family!r}, but one of family "
                f"{family!r} is needed"
            )
        shape, params = InceptionConfig.from_dict(stored.config), stored.params
        sha256 = str(stored.source.get("sha256", ""))
    else:
        wrappers = convert.find_family(family).wrappers
        with open_checkpoint(path, wrappers=wrappers) as checkpoint:
            shape, params = convert.import_state_dict(family, checkpoint.state_dict)
            sha256 = checkpoint.sha256
    digest = hashlib.sha256(json.dumps(shape.to_dict(), sort_keys=True).encode())
    update_digest(digest, params)
    return Inception(config=shape, params=params, sha256=sha256, fingerprint=digest.hexdigest())


def _check_kind(path: os.PathLike | str, kind: str, wanted: str) -> None:
    if kind != wanted:
        raise ValueError(f"{path} holds a {kind}, but a {wanted} is needed")


def _restore_params(directory: pathlib.Path, init: Any) -> Any:
    store = checkpoints.Checkpoints(directory, read_only=True)
    try:
        # The optimiser's moments, twice as large, are not read.
        step = store.latest_step(("params", "ema"))
        if step is None:
            raise FileNotFoundError(f"{directory} holds no finished checkpoint yet")
        name = "ema" if "ema" in store.item_names(step) else "params"
        abstract = nn.unbox(jax.eval_shape(init, jax.random.key(0)))
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), abstract
        )
        return store.restore(step, {name: abstract})[name]
    finally:
        store.close()
