"""Our side of the benchmarks: configurations, arithmetic, and the calls that are timed."""

import dataclasses
import functools
import math
import pathlib
import runpy
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from benchmarks.flops import count_flops
from flax import linen as nn
from ml_collections import ConfigDict

from maskgil_jax import config as schema
from maskgil_jax import programs, sharding
from maskgil_jax.build import data as build_data
from maskgil_jax.build import models as build_models
from maskgil_jax.build import training as build_training
from maskgil_jax.build.tasks import Task
from maskgil_jax.decoding import masked, prediction
from maskgil_jax.decoding.sampler import SamplerConfig
from maskgil_jax.evals.extractor import FeatureExtractor
from maskgil_jax.evals.inception import INPUT_SIDE, Inception, InceptionConfig
from maskgil_jax.generator import ImageGenerator
from maskgil_jax.loading import Model
from maskgil_jax.models.base import TokenModelConfig
from maskgil_jax.models.llamagen import LlamaGenConfig
from maskgil_jax.models.maskgil import MaskGIL, MaskGILConfig
from maskgil_jax.models.sizes import SIZES
from maskgil_jax.tokenizers.base import Tokenizer
from maskgil_jax.tokenizers.llamagen_vq import LlamaGenVQConfig

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
TRIAL_SIZE = "tiny"
ALL_SIZES = (*SIZES, TRIAL_SIZE)


def make_config(
    size: str, batch_size: int, dtype: str, family: str = MaskGILConfig.family
) -> ConfigDict:
    """Return what `configs/SIZE.py` trains, with another batch size and type.

    Args:
        size: one of `ALL_SIZES`; `tiny` tries the tool out in seconds and measures nothing true.
        batch_size: images per update.
        dtype: type of the computation.
        family: `maskgil`, or `llamagen`, as `configs/llamagen_b.py` trains it in any size.

    Raises:
        ValueError: if there is no such file.
    """
    if size == TRIAL_SIZE:
        config = schema.preset()
        config.model.family = family
        config.model.update(num_layers=2, width=64, num_heads=2, mlp_width=128)
        config.model.update(codebook_size=100, num_classes=10, grid_size=(4, 4))
    elif family == LlamaGenConfig.family:
        config = runpy.run_path(str(CONFIGS / "llamagen_b.py"))["get_config"](size=size)
    elif not (path := CONFIGS / f"{size}.py").exists():
        raise ValueError(f"size {size!r} has no MaskGIL (configs/{size}.py); rows 6 and 7a take it")
    else:
        config = runpy.run_path(str(path))["get_config"]()
    config.model.dtype = dtype
    config.training.batch_size = batch_size
    return config


def forward_flops(config: MaskGILConfig) -> int:
    """Return the operations of one image's forward pass, 2 per multiply-add.

    Matmuls only, over the image tokens and the class token; the head over the image tokens.
    """
    e, length = config.width, config.seq_len + 1
    layer = length * (4 * e**2 + 3 * e * config.mlp_width) + 2 * length**2 * e
    head = config.seq_len * e * (config.codebook_size + 1)
    return 2 * (config.num_layers * layer + head)


def training_flops(config: MaskGILConfig) -> int:
    """Return the operations of one image in a training step; recomputation earns no credit."""
    return 3 * forward_flops(config)


def decode_flops(config: LlamaGenVQConfig, grid_size: tuple[int, int]) -> int:
    """Return the operations of turning one grid of tokens (gh, gw) into pixels."""
    module = config.make_module()
    side = config.downsample_factor
    image = jax.ShapeDtypeStruct((1, side, side, config.image_channels), jnp.float32)
    params = jax.eval_shape(module.init, jax.random.key(0), image)
    tokens = jax.ShapeDtypeStruct((1, *grid_size), jnp.int32)
    return count_flops(functools.partial(module.apply, method="decode"), params, tokens)


def model_config(config: ConfigDict) -> MaskGILConfig:
    """Return the model section of a configuration.

    Raises:
        ValueError: if it is no MaskGIL, the family that the rows are about.
    """
    model = build_models.model_config(config)
    if not isinstance(model, MaskGILConfig):
        raise ValueError(f"model.family is {model.family!r}; only 'maskgil' is benchmarked")
    return model


def init_params(model: TokenModelConfig) -> Any:
    """Return the random parameters of a new model, whose head is zero."""
    return nn.unbox(jax.jit(build_models.init_model(model))(jax.random.key(0)))


def draw_batch(config: ConfigDict) -> dict[str, np.ndarray]:
    """Return random tokens int32 [b, gh, gw] and labels int32 [b]."""
    rng, b = np.random.default_rng(0), config.training.batch_size
    shape = (b, *config.model.grid_size)
    return {
        "tokens": rng.integers(config.model.codebook_size, size=shape, dtype=np.int32),
        "label": rng.integers(config.model.num_classes, size=b, dtype=np.int32),
    }


def make_task(config: ConfigDict) -> Task:
    """Return the training task on one device."""
    return build_training.make_maskgil_task(config, sharding.make_mesh({}, jax.devices()[:1]))


class Ours:
    """Our model in training, as `maskgil_jax.train` runs it, on one device and one batch."""

    def __init__(self, config: ConfigDict):
        task = make_task(config)
        self._step, self._state, self._metrics = task.step, task.init(), task.empty_metrics()
        self._batch = jax.device_put(draw_batch(config), jax.devices()[0])
        module = MaskGIL(model_config(config))
        self._forward = jax.jit(lambda params, *inputs: module.apply({"params": params}, *inputs))

    def forward(self) -> None:
        """Compute the logits of the batch."""
        inputs = self._batch["tokens"], self._batch["label"]
        self._forward(self._state.params, *inputs).block_until_ready()

    def train(self) -> None:
        """Update the state once."""
        self._state, self._metrics = self._step(self._state, self._metrics, self._batch)
        jax.block_until_ready((self._state, self._metrics))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoding:
    """A tokenizer and a batch of square images that it encodes.

    Attributes:
        config: shape of the tokenizer.
        image_size: side in pixels.
        batch_size: number of images.
    """

    config: LlamaGenVQConfig
    image_size: int
    batch_size: int

    def __str__(self) -> str:
        side, multipliers = self.image_size, self.config.channel_multipliers
        return f"{side}×{side} px, {self.config.channels} channels × {multipliers}"

    def draw_images(self) -> np.ndarray:
        """Return random images float32 [b, H, W, 3] in [-1, 1]."""
        shape = (self.batch_size, self.image_size, self.image_size, 3)
        return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)

    def init_params(self) -> dict:
        """Return random parameters."""
        images = np.zeros((1, self.image_size, self.image_size, 3), np.float32)
        return jax.jit(self.config.make_module().init)(jax.random.key(0), images)["params"]


DIGITS = LlamaGenVQConfig(
    codebook_size=128,
    channels=32,
    channel_multipliers=(1, 1, 1),
    num_res_blocks=1,
    latent_channels=32,
)
ENCODINGS = (
    Encoding(config=DIGITS, image_size=32, batch_size=64),
    Encoding(config=LlamaGenVQConfig(channels=64), image_size=128, batch_size=16),
)
TRIAL_VQ = LlamaGenVQConfig(
    codebook_size=100, channels=32, channel_multipliers=(1, 1), num_res_blocks=1, latent_channels=32
)
TRIAL_ENCODINGS = (Encoding(config=DIGITS, image_size=8, batch_size=2),)


class OursVQ:
    """Our tokenizer encoding one batch, as `tools/extract_tokens.py` does.

    On a CPU it uses all devices, which are the same cores for the peer; else one.
    """

    def __init__(self, encoding: Encoding, params: dict):
        devices = jax.devices()
        count = math.gcd(len(devices), encoding.batch_size) if devices[0].platform == "cpu" else 1
        mesh = sharding.make_mesh({"data": -1}, devices[:count])
        self._images = jax.device_put(encoding.draw_images(), sharding.batch_sharding(mesh))
        tokenizer = Tokenizer(config=encoding.config, params=params)
        self._encode = build_data.make_encoder(tokenizer, mesh)

    def encode(self) -> np.ndarray:
        """Return the tokens of the batch."""
        return np.asarray(self._encode({"image": self._images, "label": None})["tokens"])


INCEPTION_BATCH = 16
_INCEPTION_SIDES = {TRIAL_SIZE: 32}  # of the images; the net sees 299 × 299 pixels of any


class OursInception:
    """Our extraction of FID's features from one batch, with random weights.

    Attributes:
        config: shape of the net.
        params: its parameters.
        images: uint8 [b, H, W, 3].
    """

    def __init__(self, size: str):
        tiny = size == TRIAL_SIZE
        self.config = InceptionConfig(channels=2) if tiny else InceptionConfig()
        side, batch_size = _INCEPTION_SIDES.get(size, 256), 4 if tiny else INCEPTION_BATCH
        shape = (batch_size, side, side, 3)
        self.images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        self.params = self._draw_params()
        # On a CPU its devices are the same cores for the peer; else one.
        devices, count = jax.devices(), 1
        if devices[0].platform == "cpu":
            count = math.gcd(len(devices), batch_size)
        net = Inception(config=self.config, params=self.params, sha256="", fingerprint="")
        mesh = sharding.make_mesh({"data": -1}, devices[:count])
        self._extract = FeatureExtractor(net, features=("pool",), mesh=mesh)

    def _draw_params(self) -> dict:
        """Return random parameters, drawn by NumPy: the net's `init` compiles for a minute."""
        inputs, rng = np.zeros((1, INPUT_SIDE, INPUT_SIDE, 3), np.float32), np.random.default_rng(0)
        module = self.config.make_module()
        shapes = jax.eval_shape(module.init, jax.random.key(0), inputs)["params"]

        def draw(path: Any, leaf: Any) -> np.ndarray:
            if leaf.ndim == 1:
                return np.full(leaf.shape, path[-1].key in ("scale", "var"), np.float32)
            gain = np.sqrt(2 / math.prod(leaf.shape[:-1]), dtype=np.float32)
            return gain * rng.standard_normal(leaf.shape, np.float32)

        return jax.tree_util.tree_map_with_path(draw, shapes)

    def extract(self) -> np.ndarray:
        """Return the features of the batch."""
        return self._extract(self.images)["pool"]


def vq_config(size: str, dtype: str) -> LlamaGenVQConfig:
    """Return the tokenizer that a model of this size decodes with."""
    config = TRIAL_VQ if size == TRIAL_SIZE else LlamaGenVQConfig()
    return dataclasses.replace(config, dtype=dtype)


class OursSampler:
    """Our generator, from labels to pixels, with random weights (and the zero head of a new model).

    On a CPU it uses all devices, which are the same cores for the peer; else one.

    Args:
        size: of the model.
        batch_size: images.
        settings: of the sampler.
        dtype: type of the computation, of the tokenizer's too.

    Attributes:
        model: architecture of the model.
        params: random parameters.
        vq: architecture of the tokenizer.
        vq_params: random parameters.
        labels: classes of the batch.
    """

    def __init__(self, size: str, batch_size: int, settings: dict, dtype: str = "float32"):
        config = make_config(size, batch_size, dtype)
        self.model, self.vq = model_config(config), vq_config(size, dtype)
        self.labels = [i % config.model.num_classes for i in range(batch_size)]
        self.params = init_params(self.model)
        side = self.vq.downsample_factor
        images = np.zeros((1, side, side, 3), np.float32)
        self.vq_params = jax.jit(self.vq.make_module().init)(jax.random.key(1), images)["params"]
        self._run, self._settings = config, settings
        self.replace_params(self.params, self.vq_params)

    def replace_params(self, params: Any, vq_params: Any) -> None:
        """Generate with other parameters from now on."""
        self.params, self.vq_params = params, vq_params
        devices, count = jax.devices(), 1
        if devices[0].platform == "cpu":
            count = math.gcd(len(devices), len(self.labels))
        self._generator = ImageGenerator(
            Model(config=self.model, params=params, run=self._run),
            Tokenizer(config=self.vq, params=vq_params),
            batch_size=len(self.labels),
            mesh=sharding.make_mesh({"data": -1}, devices[:count]),
        )

    def sample(self) -> np.ndarray:
        """Return uint8 images [b, H, W, 3]."""
        return self._generator(self.labels, **self._settings)

    def sample_tokens(self) -> np.ndarray:
        """Return the codes [b, gh, gw] only."""
        return self._generator.tokens(self.labels, **self._settings)


class SamplerTail:
    """One guided decoding step with and without its model: what the sampler itself costs.

    Args:
        size: of the model.
        batch_size: images.
        settings: of the sampler.
    """

    def __init__(self, size: str, batch_size: int, settings: dict):
        config = make_config(size, batch_size, "float32")
        model, sampler = model_config(config), SamplerConfig(**settings)
        length, mask = model.seq_len, model.mask_token_id
        tokens = jnp.full((batch_size, length), mask)
        labels, null = jnp.zeros(batch_size, jnp.int32), jnp.full(batch_size, model.null_label)
        batch = start_batch(model, batch_size, sampler, model.grid_size)
        batch = dataclasses.replace(batch, condition=labels, null_condition=null)
        state = masked.start_state(tokens)

        def step(logits, i, state):
            # What the head reads would be shorter at masked positions; here it is given whole.
            model = prediction.whole(lambda tokens, _: logits[: len(tokens)])
            one = masked.make_step(model, batch, sampler.program(), mask_token_id=mask)
            return one(i, state)

        module = model.make_module()

        @jax.jit
        def predict(params, tokens, labels):
            grids = tokens.reshape(-1, *model.grid_size)
            return module.apply({"params": params}, grids, labels)

        params = init_params(model)
        both = jnp.concatenate([tokens, tokens]), jnp.concatenate([labels, null])
        logits, middle, jitted = predict(params, *both), sampler.num_steps // 2, jax.jit(step)
        self.tail = lambda: jax.block_until_ready(jitted(logits, middle, state))
        self.forward = lambda: jax.block_until_ready(predict(params, *both))


def start_batch(
    model: MaskGILConfig, batch_size: int, sampler: SamplerConfig, grid_size: tuple[int, int]
) -> masked.Batch:
    """Return a batch of which nothing is known, of different classes."""
    length = math.prod(grid_size)
    return masked.Batch(
        tokens=jnp.full((batch_size, length), model.mask_token_id, jnp.int32),
        condition=jnp.arange(batch_size, dtype=jnp.int32) % model.num_classes,
        null_condition=None,
        rngs=masked.image_keys(0, np.arange(batch_size)),
        plan=sampler.plan(jnp.full(batch_size, length), length),
    )


def lower_sampler(
    params: Any,
    vq_params: Any,
    batch: masked.Batch,
    model: MaskGILConfig,
    sampler: SamplerConfig,
    grid_size: tuple[int, int],
    vq: LlamaGenVQConfig | None = None,
) -> Any:
    """Trace and lower the generator's program without a draft, for one device.

    Arrays or their shapes; codes only without a tokenizer.
    """
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    run = programs.make_generate_fn(model, sampler.program(), mesh, grid_size, tokenizer=vq)
    with jax.set_mesh(mesh):
        return run.lower((params, None), vq_params, (batch, None))


def sampler_compiler(size: str, batch_size: int, settings: dict) -> Callable[[], Any]:
    """Return what traces, lowers and compiles labels to pixels, from nothing every time."""
    model, vq = model_config(make_config(size, batch_size, "float32")), vq_config(size, "float32")
    sampler = SamplerConfig(**settings)
    image = jnp.zeros((1, vq.downsample_factor, vq.downsample_factor, 3))
    shapes = jax.eval_shape(
        lambda: (
            nn.unbox(build_models.init_model(model)(jax.random.key(0))),
            vq.make_module().init(jax.random.key(0), image)["params"],
            start_batch(model, batch_size, sampler, model.grid_size),
        )
    )

    def compile_all() -> None:
        jax.clear_caches()
        programs.make_generate_fn.cache_clear()
        params, vq_params, batch = shapes
        lowered = lower_sampler(params, vq_params, batch, model, sampler, model.grid_size, vq)
        lowered.compile()

    return compile_all


class SampledGrid:
    """Codes of one grid size drawn by one program, and what it needs.

    Args:
        model: architecture.
        params: its parameters; those of 2D RoPE models serve every grid.
        grid_size: (gh, gw).
        batch_size: images.
        settings: of the sampler.

    Attributes:
        length: number of tokens.
        flops: operations of one forward pass of one image.
        temp_bytes: memory that the program takes besides its arguments and its result.
    """

    def __init__(
        self,
        model: MaskGILConfig,
        params: Any,
        grid_size: tuple[int, int],
        batch_size: int,
        settings: dict,
    ):
        self.length = math.prod(grid_size)
        self.flops = forward_flops(dataclasses.replace(model, grid_size=grid_size))
        sampler = SamplerConfig(**settings)
        batch = start_batch(model, batch_size, sampler, grid_size)
        self._run = lower_sampler(params, None, batch, model, sampler, grid_size).compile()
        self.temp_bytes = _temp_bytes(self._run)
        self._inputs = (params, None), None, (batch, None)

    def run(self) -> None:
        """Draw the codes of the batch."""
        jax.block_until_ready(self._run(*self._inputs))


class TrainedGrid:
    """The training step of one grid size, and what it needs; the attributes are `SampledGrid`'s.

    Args:
        config: of a run on grids of any size.
        grid_size: (gh, gw).
    """

    def __init__(self, config: ConfigDict, grid_size: tuple[int, int]):
        config = config.copy_and_resolve_references()
        config.model.grid_size = grid_size
        self.length, self.flops = math.prod(grid_size), forward_flops(model_config(config))
        self.temp_bytes = _temp_bytes(lower_step(config).compile())
        self.run = Ours(config).train


def lower_step(config: ConfigDict) -> Any:
    """Trace and lower the training step."""
    task = make_task(config)
    batch = jax.eval_shape(lambda: draw_batch(config))
    return task.step.lower(task.abstract, jax.eval_shape(task.empty_metrics), batch)


def compile_step(config: ConfigDict) -> None:
    """Trace, lower and compile the training step from nothing."""
    jax.clear_caches()
    lower_step(config).compile()


def _temp_bytes(compiled: Any) -> int:
    return int(compiled.memory_analysis().temp_size_in_bytes)
