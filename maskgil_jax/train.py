"""Train a MaskGIL or a tokenizer: `python -m maskgil_jax.train --config FILE --workdir DIR`.

Started again with the same command, a run resumes from its newest verified checkpoint. Any field
can be changed on the command line, e.g. `--config.training.num_steps=500`; a preset is chosen by
`--config configs/l.py:paper`.

Several processes: give each `--coordinator HOST:PORT --num_processes N --process_id I`; on Cloud
TPU pods and SLURM `--distributed` alone finds them.
"""

import contextlib
import functools
import json
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorboardX
from absl import app, flags
from clu import parameter_overview
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from maskgil_jax import (
    checkpoints,
    cli,
    hub,
    loading,
    memory,
    monitor,
    pictures,
    processes,
    report,
    sharding,
)
from maskgil_jax.build import captions as build_captions
from maskgil_jax.build import data as build_data
from maskgil_jax.build import models as build_models
from maskgil_jax.build import tasks as build_tasks
from maskgil_jax.build import tokenizers as build_tokenizers
from maskgil_jax.build import training as build_training
from maskgil_jax.cli import say
from maskgil_jax.data.buckets import Size
from maskgil_jax.data.token_dataset import TextOrigin
from maskgil_jax.data.transforms import Chain, PickCrop
from maskgil_jax.text.base import TextEncoder
from maskgil_jax.tokenizers.base import Tokenizer
from maskgil_jax.tokenizers.lpips import LPIPSConfig
from maskgil_jax.training import loop
from maskgil_jax.training.adversarial import AdversarialState
from maskgil_jax.workdir import claim_workdir

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, e.g. configs/digits.py.")


def train(config: ConfigDict, workdir: os.PathLike | str) -> dict[str, Any]:
    """Train, sample and report; return the report that the run's last line prints.

    Args:
        config: from a config file, or `maskgil_jax.config.preset()`.
        workdir: directory of the run; a run of the same configuration in it is resumed.

    Raises:
        ValueError: if the configuration, the data, the devices or the directory do not fit; before
            anything is compiled or written.
        NonFiniteError: if the loss stops being finite.
    """
    started = time.monotonic()
    config = _resolve(config)
    build_training.validate(config)
    mesh = sharding.make_mesh(config.mesh.to_dict())
    build_training.check_batch(config, mesh)
    sources = build_data.make_sources(config)
    build_data.check_cached_captions(config, sources)
    tokenizer = _open_tokenizer(config, sources)
    stored = build_captions.find_stored_features(config, sources)
    encoder = _open_text_encoder(config, stored)
    # A run that has checkpoints needs the model that it began with no more.
    begin = [] if os.path.isdir(os.path.join(workdir, "checkpoints")) else [_open_begin(config)]
    perceptual = _open_perceptual(config)
    watch = monitor.open_monitor(config, mesh, tokenizer)
    claim = claim_workdir(workdir, config)
    with processes.enter_first(claim, workdir), jax.set_mesh(mesh):
        task = (
            build_training.make_maskgil_task(config, mesh)
            if config.kind == "maskgil"
            else build_tokenizers.make_tokenizer_task(config, mesh, perceptual)
        )
        batches = _open_batches(config, sources, tokenizer, encoder, mesh)
        captions = report.example_captions(config, sources, encoder)

        def draw(state: Any) -> np.ndarray:
            return report.draw_grid(config, mesh, tokenizer, state, captions)

        state, best = _run(config, workdir, task, batches, draw, watch, begin)
        measured = report.measure(config, mesh, tokenizer, state, encoder) | best
    measured["seconds"] = round(time.monotonic() - started, 1)
    say(json.dumps(measured))
    return measured


def _run(
    config: ConfigDict,
    workdir: os.PathLike | str,
    task: build_tasks.Task,
    batches: loop.DeviceBatches,
    draw: Callable[[Any], np.ndarray],
    watch: monitor.Monitor | None,
    begin: list[loading.Model | None],
) -> tuple[Any, dict[str, Any]]:
    """Restore or initialise the state, update it to the end, and draw the last samples.

    Returns:
        The state, and step and figure of the best parameters if they are kept.
    """
    best: monitor.BestCheckpoint | None = None
    with contextlib.ExitStack() as stack:
        if watch is not None and config.evaluation.keep_best:
            best = stack.enter_context(contextlib.closing(monitor.BestCheckpoint(workdir, watch)))
        store = checkpoints.Checkpoints(workdir, keep=config.logging.keep_checkpoints)
        stack.enter_context(contextlib.closing(store))
        writer = stack.enter_context(_open_writer(workdir))
        state, first_step = _restore(config, store, task, batches, begin)
        if first_step > config.training.num_steps:
            raise ValueError(
                f"{workdir} is at step {first_step}, beyond training.num_steps "
                f"{config.training.num_steps}; give at least {first_step}, or another --workdir"
            )
        if first_step == 0:
            say(parameter_overview.get_parameter_overview(state.params, include_stats=False))
        rate = build_tasks.rate_schedule(config)

        def log(step: int, scalars: Mapping[str, float]) -> None:
            scalars = {**scalars, "learning_rate": float(rate(step - 1))}
            say(loop.format_progress(step, config.training.num_steps, scalars))
            for name, value in scalars.items():
                writer.add_scalar(name, value, step)

        def sample(step: int, state: Any) -> None:
            grid = draw(state)
            if jax.process_index() == 0:
                path = os.path.join(workdir, "samples", f"{step:07}.png")
                pictures.save_png(path, grid)
                writer.add_image("samples", grid, step, dataformats="HWC")
                say(f"step {step}: samples in {path}")

        def save(step: int, state: Any) -> None:
            store.save(step, _as_trees(state), batches)

        def skip(step: int, state: Any) -> None:
            """Evaluate nothing: `evaluation.every_steps` is 0."""

        evaluate: Callable[[int, Any], None] = skip
        if watch is not None:
            evaluate = monitor.make_hook(watch, best, say, writer.add_scalar)
        hooks = loop.Hooks(log=log, save=save, sample=sample, evaluate=evaluate)
        state = loop.run_loop(
            task.step,
            state,
            task.empty_metrics,
            batches,
            build_training.loop_config(config),
            hooks,
            first_step,
        )
        sample(config.training.num_steps, state)
    return state, {} if best is None else best.describe()


def _restore(
    config: ConfigDict,
    store: checkpoints.Checkpoints,
    task: build_tasks.Task,
    batches: loop.DeviceBatches,
    begin: list[loading.Model | None],
) -> tuple[Any, int]:
    """Return the newest verified state and its step, or a fresh state and 0.

    A fresh state has the parameters of the model that is taken out of `begin`, or else opened;
    random ones if it is `None`.
    """
    step = store.latest_step()
    if step is None:
        return _begin(task, begin.pop() if begin else _open_begin(config)), 0
    trees = store.restore(step, _as_trees(task.abstract), batches)
    say(f"resumed from step {step}")
    progress = trees["progress"]
    state = task.abstract.replace(
        step=progress["step"],
        params=trees["params"],
        opt_state=progress["opt_state"],
        ema=trees.get("ema"),
        **{name: trees[name] for name in ("discriminator",) if name in trees},
    )
    return state, step


def _begin(task: build_tasks.Task, begin: loading.Model | None) -> Any:
    """Return a fresh state, with the parameters of another model if there is one."""
    state = task.init()
    if begin is None:
        return state
    params = jax.device_put(begin.params, jax.tree.map(lambda x: x.sharding, state.params))
    # Copied, as the step gives the memory of both away.
    ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
    return state.replace(params=params, ema=ema)


def _open_begin(config: ConfigDict) -> loading.Model | None:
    """Return the model whose parameters the run begins with, checked; `None` if there is none."""
    if not config.init_from:
        return None
    begin = loading.load_model(config.init_from)
    wanted = build_models.model_config(config)
    key = jax.random.key(0)
    trees = [jax.eval_shape(build_models.init_model(m), key) for m in (begin.config, wanted)]
    shapes = [jax.tree.map(lambda x: x.shape, nn.unbox(tree)) for tree in trees]
    if begin.config.family != wanted.family or shapes[0] != shapes[1]:
        theirs, ours = begin.config.to_dict(), wanted.to_dict()
        differing = [
            f"{name} {theirs.get(name)!r} there, {ours.get(name)!r} here"
            for name in sorted(theirs | ours)
            if theirs.get(name) != ours.get(name)
        ]
        raise ValueError(
            f"init_from {config.init_from} has parameters of other shapes than the run's model: "
            f"{'; '.join([f'family {begin.config.family!r}, {wanted.family!r}', *differing])}"
        )
    return begin


def _as_trees(state: Any) -> dict[str, Any]:
    """Return the state as the named trees of a checkpoint."""
    trees = {
        "params": state.params,
        "progress": {"step": state.step, "opt_state": state.opt_state},
    }
    if isinstance(state, AdversarialState):
        trees["discriminator"] = state.discriminator
    return trees if state.ema is None else trees | {"ema": state.ema}


def _open_tokenizer(config: ConfigDict, sources: Mapping[Size, Any]) -> Tokenizer | None:
    """Return the tokenizer of a model run, checked against model and data."""
    if config.kind == "tokenizer":
        return None
    tokenizer = loading.load_tokenizer(config.tokenizer.path)
    for source in sources.values():
        if config.data.name == "tokens":
            build_data.check_stored_tokens(config, source, tokenizer)
        classes = None if build_captions.is_captioned(config) else source.num_classes
        build_models.check_fit(config, tokenizer.spec, classes)
    return tokenizer


def _open_text_encoder(config: ConfigDict, stored: TextOrigin | None = None) -> TextEncoder | None:
    """Return the encoder that a run computes features with; `None` if it needs none.

    Args:
        config: of the run.
        stored: what made the features that its records hold; then the encoder that it names is
            only compared with that, and need not be there if it names none.
    """
    if not build_captions.is_captioned(config) or config.model.text != "features":
        return None
    if stored is not None:
        found: tuple[str | None, str | None] = (None, None)
        if config.text.encoder:
            try:
                found = loading.identify_text_encoder(
                    config.text.encoder,
                    max_length=stored.length,
                    hidden_layer=stored.hidden_layer,
                    dtype=stored.dtype,
                )
            except FileNotFoundError as error:
                raise FileNotFoundError(
                    f"text.encoder: {error}. It may be empty: the tokens in {config.data.path} "
                    "hold the features"
                ) from error
            except ValueError as error:  # such as fewer layers
                raise ValueError(
                    f"text.encoder {config.text.encoder} is not what made the features in "
                    f"{config.data.path} ({stored.describe()}): {error}"
                ) from error
        build_captions.check_stored_features(config, stored, *found)
        return None
    if not config.text.encoder:
        raise ValueError(
            f"the tokens in {config.data.path} hold no features, which model.text 'features' "
            "reads; name what computes them, text.encoder, or extract them with --text_encoder"
        )
    encoder = loading.load_text_encoder(
        config.text.encoder,
        max_length=config.model.text_length,
        hidden_layer=config.text.hidden_layer,
        dtype=config.text.dtype,
    )
    build_models.check_text_encoder(build_models.model_config(config), encoder)
    return encoder


def _open_perceptual(config: ConfigDict) -> tuple[Any, Any] | None:
    """Return the module and the weights of the perceptual term; `None` if it has no weight."""
    path = config.vq_loss.lpips_path
    if config.kind != "tokenizer" or not path:
        return None
    stored = checkpoints.read_model_dir(hub.find_directory(path))
    if (stored.kind, stored.family) != ("perceptual", LPIPSConfig.family):
        raise ValueError(
            f"vq_loss.lpips_path {path} holds a {stored.kind} of family {stored.family!r}; give a "
            f"directory that tools/convert_checkpoint.py wrote with --family {LPIPSConfig.family}"
        )
    return LPIPSConfig.from_dict(stored.config).make_module(), stored.params


def _open_batches(
    config: ConfigDict,
    sources: Mapping[Size, Any],
    tokenizer: Tokenizer | None,
    encoder: TextEncoder | None,
    mesh: Mesh,
) -> loop.DeviceBatches:
    """Return batches of tokens and conditions (of images, for a tokenizer run) on the devices."""
    put: Callable[[Any], Any] = functools.partial(sharding.put_batch, mesh=mesh)
    read_caption = None
    if build_captions.is_captioned(config):
        stored = build_captions.find_stored_features(config, sources) is not None
        if not stored:
            for line in build_captions.describe_cut(config, sources, encoder):
                say(line)
        read_caption = build_captions.make_transform(config, encoder, stored=stored)
    encodes = [] if encoder is None else [build_captions.make_encoder(encoder, mesh)]

    def make_transform(size: Size) -> Chain:
        images = config.data.name != "tokens"
        first = build_data.image_transform(config, size) if images else PickCrop()
        return Chain(transforms=(first,) if read_caption is None else (first, read_caption))

    if tokenizer is not None and config.data.cache_tokens:
        began = time.monotonic()
        sources = build_data.cache_tokens(config, sources, tokenizer, read_caption)
        count = sum(map(len, sources.values()))
        say(f"encoded {count:,} images in {time.monotonic() - began:.1f} s")
        batches = build_data.make_batches(config, sources, None)
    else:
        if tokenizer is not None and config.data.name != "tokens":
            encodes.insert(0, build_data.make_encoder(tokenizer, mesh))
        batches = build_data.make_batches(config, sources, make_transform)

    def prepare(batch):
        batch = put(batch)
        for encode in encodes:
            batch = encode(batch)
        return batch

    return loop.DeviceBatches(batches, prepare, config.data.prefetch)


def _open_writer(workdir: os.PathLike | str) -> tensorboardX.SummaryWriter:
    """Return a TensorBoard writer; only process 0 writes files."""
    first = jax.process_index() == 0
    return tensorboardX.SummaryWriter(os.path.join(workdir, "tensorboard"), write_to_disk=first)


def _resolve(config: ConfigDict) -> ConfigDict:
    """Return a copy whose tokenizer and perceptual weights are found from any directory.

    Those on the hub are named with their commit, as a resumed run must read the same.
    """
    config = config.copy_and_resolve_references()
    fields = [(config.tokenizer, "path"), (config.vq_loss, "lpips_path"), (config.text, "encoder")]
    fields.append((config, "init_from"))
    for section, field in fields:
        if hub.is_address(section[field]):
            section[field] = str(hub.HubFolder.parse(section[field]).pin())
        elif section[field] and not section[field].startswith(build_models.ASSET):
            section[field] = os.path.abspath(section[field])
    return config


def main(argv: list[str]) -> None:
    """Join the other processes and train."""
    cli.start(argv)
    memory.keep_freed_memory()
    cli.join_processes()
    cli.exit_on_user_error(
        lambda: train(_CONFIG.value, cli.WORKDIR.value), loop.NonFiniteError, ImportError
    )


if __name__ == "__main__":
    flags.adopt_module_key_flags(cli)  # so that --help lists --workdir
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
