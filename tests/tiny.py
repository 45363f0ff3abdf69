"""The smallest real run: a random tokenizer, a folder of pictures, a one-layer model.

As a config file: `--config tests/tiny.py --config.data.path=… --config.tokenizer.path=…`; or
`--config tests/tiny.py:captions --config.tokenizer.path=…`, which learns from captions, and
`causal_captions`, which learns to draw token by token from them.
"""

import os
import pathlib
import subprocess
import sys

import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[1]


def get_config(preset: str = "recommended"):
    from maskgil_jax import config as schema

    captions = preset in ("captions", "causal_captions")
    config = schema.preset("recommended" if captions else preset)
    config.model.update(
        num_layers=1,
        width=32,
        num_heads=2,
        mlp_width=64,
        codebook_size=32,
        num_classes=2,
        grid_size=(4, 4),
        dtype="float32",
    )
    config.data.image_size = (16, 16)
    config.data.num_threads = 1
    config.training.batch_size = 8
    config.training.num_steps = 12
    config.training.ema_decay = 0.9
    config.optimizer.learning_rate = 1e-3
    config.logging.every = 2
    config.logging.checkpoint_every = 4
    config.logging.sample_every = 0
    config.sampler.num_steps = 2
    if captions:
        config.model.update(family="maskgil-text", text="bytes", text_width=16, text_length=64)
        config.model.num_classes = schema.default().model.num_classes
        config.model.grid_size = (16, 16)
        config.data.update(name="canvases", flip=False, image_size=(64, 64))
        config.data.buckets, config.data.bucket_sizes = "listed", ((64, 64), (64, 96))
    if preset == "causal_captions":
        config.model.family = "llamagen-text"
        config.sampler.num_steps = schema.default().sampler.num_steps  # which it has not
    return config


def set_family(config, family: str) -> None:
    """Choose a model family, and leave alone what its decoder has not."""
    from maskgil_jax import config as schema
    from maskgil_jax.build import models as build

    config.model.family = family
    if build.find_model(family).causal:
        config.sampler.num_steps = schema.default().sampler.num_steps


def make_tokenizer_dir(path: pathlib.Path, levels: int = 3) -> pathlib.Path:
    """Write a LlamaGen-VQ with random weights: 32 codes, 4× down-sampling, 2× more a level."""
    import jax

    from maskgil_jax import checkpoints
    from maskgil_jax.tokenizers.llamagen_vq import LlamaGenVQConfig

    config = LlamaGenVQConfig(
        codebook_size=32,
        channels=32,
        channel_multipliers=(1,) * levels,
        num_res_blocks=1,
        latent_channels=32,
    )
    # Drawn here: to compile Flax's own draw takes ten seconds.
    images, rng = jax.ShapeDtypeStruct((1, 16, 16, 3), np.float32), np.random.default_rng(0)
    shapes = jax.eval_shape(config.make_module().init, jax.random.key(0), images)["params"]

    def draw(path, leaf):
        if path[-1].key in ("bias", "scale"):
            return np.full(leaf.shape, path[-1].key == "scale", np.float32)
        fan_in = np.prod(leaf.shape[:-1]) if path[-1].key == "kernel" else 1
        return rng.normal(0, fan_in**-0.5, leaf.shape).astype(np.float32)

    checkpoints.write_model_dir(
        path,
        kind="tokenizer",
        family="llamagen-vq",
        config=config.to_dict(),
        params=jax.tree_util.tree_map_with_path(draw, shapes),
    )
    return path


def make_generator(
    tokenizer: pathlib.Path, family: str = "maskgil", fields=None, *, devices: int = 1, **options
):
    """Return a generator of 4×4 tokens whose model has random weights, the head's too."""
    import jax
    from flax import linen as nn

    from maskgil_jax import generator, loading, sharding
    from maskgil_jax.build import models as build

    config, vq = get_config(), loading.load_tokenizer(tokenizer)
    side = 4 * vq.spec.downsample_factor
    config.data.image_size = (side, side)
    if family in ("maskgil-text", "llamagen-text"):
        config = get_config("captions")
        config.model.grid_size = (4, 4)
        config.data.update(image_size=(side, side), buckets="listed")
        config.data.bucket_sizes = ((side, side), (side, 3 * side // 2))
    set_family(config, family)
    config.model.update(fields or {})
    model = build.model_config(config)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return (centre + 0.3 * rng.standard_normal(leaf.shape)).astype(np.float32)

    shapes = nn.unbox(jax.eval_shape(build.init_model(model), jax.random.key(0)))
    params = jax.tree_util.tree_map_with_path(draw, shapes)
    return generator.ImageGenerator(
        loading.Model(config=model, params=params, run=config),
        vq,
        mesh=sharding.make_mesh({"data": -1}, jax.devices()[:devices]),
        **{"batch_size": 4} | options,
    )


def make_image_folder(path: pathlib.Path, count: int = 10) -> pathlib.Path:
    """Write `train/<class>/<i>.png`, two classes of `count` noisy pictures."""
    rng = np.random.default_rng(0)
    for label in ("dark", "light"):
        folder = path / "train" / label
        folder.mkdir(parents=True)
        for index in range(count):
            low = 0 if label == "dark" else 128
            pixels = rng.integers(low, low + 128, size=(20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.png")
    return path


def make_inputs(path: pathlib.Path) -> list[str]:
    """Write tokenizer and pictures under `path` and return the command-line flags naming them."""
    tokenizer = make_tokenizer_dir(path / "tokenizer")
    images = make_image_folder(path / "images")
    return [
        f"--config={ROOT / 'tests' / 'tiny.py'}",
        f"--config.tokenizer.path={tokenizer}",
        f"--config.data.path={images}",
    ]


def command(*arguments: str) -> list[str]:
    """Return the command that trains, with warnings as errors in our own modules."""
    return [sys.executable, "-m", "maskgil_jax.train", *arguments]


def environment(devices: int = 1) -> dict[str, str]:
    """Return an environment with `devices` fake CPU devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags,
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
    }


def run(*arguments: str, devices: int = 1, timeout: float = 240) -> subprocess.CompletedProcess:
    """Run a training to its end."""
    return subprocess.run(
        command(*arguments),
        env=environment(devices),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
