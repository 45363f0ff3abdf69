"""Evaluation while a model trains, and the best parameters by one of its metrics.

Samples of the parameters as they are, measured by the code of `python -m maskgil_jax.evaluate`;
`train.py` says when. They depend on the parameters and the seed of the run alone, and nothing of
the training's randomness is used.

The best parameters lie in WORKDIR/best, a run directory of its own with one checkpoint, whose
record holds the figures: what reads a run reads it too.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from maskgil_jax import config as schema
from maskgil_jax import loading
from maskgil_jax.build import models as build_models
from maskgil_jax.checkpoints import Checkpoints, write_text_atomically
from maskgil_jax.evaluation.extraction import collect, collect_statistics
from maskgil_jax.evaluation.image_sets import GeneratedImages, draw_labels
from maskgil_jax.evaluation.measure import SVM_FIGURES, check_measurable, measure
from maskgil_jax.evaluation.nets import FeatureNet, describe_net, open_net
from maskgil_jax.evaluation.protocols import (
    HIGHER_IS_BETTER,
    LOWER_IS_BETTER,
    NEED_REAL_IMAGES,
    SVM,
    Protocol,
    describe_changes,
    find_protocol,
)
from maskgil_jax.evaluation.references import Reference, open_reference
from maskgil_jax.generator import ImageGenerator
from maskgil_jax.masking import check_choice
from maskgil_jax.models.base import count_classes
from maskgil_jax.tokenizers.base import Tokenizer
from maskgil_jax.workdir import RUN_CONFIG

BEST = "best"  # folder of a run directory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Monitor:
    """What a run's samples are measured by, opened and checked.

    Attributes:
        run: configuration of the run.
        mesh: devices to generate on.
        tokenizer: of the model's codes.
        protocol: which figures, of how many samples.
        net: what features are compared of.
        reference: what samples are compared with.
    """

    run: ConfigDict
    mesh: Mesh
    tokenizer: Tokenizer
    protocol: Protocol
    net: FeatureNet
    reference: Reference

    @property
    def settings(self) -> dict[str, Any]:
        """All that figures depend on besides the parameters, as JSON has it."""
        # Which other metrics are measured changes none of them.
        protocol = {k: v for k, v in self.protocol.to_dict().items() if k != "metrics"}
        settings = {
            "protocol": protocol,
            "net": describe_net(self.net),
            "reference": dict(self.reference.settings),
            "tokenizer": self.tokenizer.fingerprint,
            # Pixels depend on both, on the batch by rounding only.
            "tokenizer_dtype": self.tokenizer.config.to_dict()["dtype"],
            "batch_size": min(self.run.evaluation.batch_size, self.protocol.num_images),
            "sampler": dataclasses.asdict(build_models.sampler_config(self.run)),
            "seed": self.run.seed,
        }
        return json.loads(json.dumps(settings))

    @property
    def notes(self) -> list[str]:
        """What has to be said of all figures."""
        return [*describe_changes(self.protocol), *self.net.notes, *self.reference.notes]

    @functools.cached_property
    def _compared(self) -> tuple[Reference, Mapping[str, np.ndarray]]:
        """Reference with all the statistics that metrics need, and features of its images."""
        reference, metrics = self.reference, self.protocol.metrics
        images, names = reference.images, reference.wanted_features(metrics)
        if images is None or not names:
            return reference, {}
        # Held until the run ends: single features only where a metric looks at them.
        single = ("pool",) if set(metrics) & set(NEED_REAL_IMAGES) and "pool" in names else ()
        chunk_size = self.run.evaluation.batch_size
        found = collect(images, self.net, single, chunk_size=chunk_size) if single else {}
        if others := [name for name in names if name not in single]:
            statistics = collect_statistics(images, self.net, others, chunk_size=chunk_size)
            reference = dataclasses.replace(
                reference,
                statistics=statistics.get("pool", reference.statistics),
                spatial_statistics=statistics.get("spatial", reference.spatial_statistics),
            )
        return reference, found

    def measure(self, params: Any) -> tuple[dict[str, float], list[str]]:
        """Return the figures of samples of a model with these parameters, and notes on them.

        Args:
            params: of the model, on the devices of the mesh.

        Raises:
            ValueError: if the model or the net gives numbers that are not finite.
        """
        model = build_models.model_config(self.run)
        generator = ImageGenerator(
            loading.Model(config=model, params=params, run=self.run),
            self.tokenizer,
            batch_size=self.run.evaluation.batch_size,
            mesh=self.mesh,
        )
        labels: np.ndarray = draw_labels(
            self.protocol.labels, self.protocol.num_images, count_classes(model), self.run.seed
        )
        images = GeneratedImages(
            generator,
            labels,
            seed=self.run.seed,
            size=tuple(self.run.data.image_size),
            sampler={},
        )
        names = tuple(dict.fromkeys(("pool", *self.protocol.features)))
        features = collect(images, self.net, names, chunk_size=images.chunk_size)
        return measure(self.protocol, features, labels, images.image_shape, *self._compared)


def open_monitor(config: ConfigDict, mesh: Mesh, tokenizer: Tokenizer | None) -> Monitor | None:
    """Return what `config.evaluation` asks for; `None` if nothing.

    Args:
        config: of the run.
        mesh: devices to generate on.
        tokenizer: of the model's codes; `None` if a tokenizer is trained.

    Raises:
        FileNotFoundError: if the reference or the weights of Inception are missing.
        ValueError: if a setting is not allowed, or files are damaged or do not fit the protocol.
    """
    section = config.evaluation
    if section.every_steps == 0:
        return None
    if tokenizer is None:
        raise ValueError(
            "evaluation.every_steps is for kind 'maskgil': a tokenizer generates no samples; set "
            "it to 0 (report.name measures reconstructions)"
        )
    if jax.process_count() > 1:
        raise ValueError(
            f"evaluation.every_steps {section.every_steps} needs a single process, and this run "
            f"has {jax.process_count()}; set it to 0, and measure checkpoints with "
            "python -m maskgil_jax.evaluate"
        )
    try:
        protocol = find_protocol(
            section.protocol,
            metrics=tuple(section.metrics) or None,
            num_images=section.num_images,
        )
        _check_protocol(config, protocol)
        net = open_net(protocol.net, section.inception or None)
        net.check_shape("samples", (*config.data.image_size, tokenizer.spec.image_channels))
        reference = open_reference(protocol, net, section.reference or None)
        check_measurable(protocol, net, reference, labelled=True)
        _check_best(section.keep_best, protocol)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"config.evaluation: {error}") from error
    except ValueError as error:
        raise ValueError(f"config.evaluation: {error}") from error
    return Monitor(
        run=config,
        mesh=mesh,
        tokenizer=tokenizer,
        protocol=protocol,
        net=net,
        reference=reference,
    )


def _check_protocol(config: ConfigDict, protocol: Protocol) -> None:
    """Refuse what `evaluate` names by its flags, by the names of fields."""
    section = config.evaluation
    classes = count_classes(build_models.model_config(config))
    if protocol.num_images % classes:
        nearest = max(1, round(protocol.num_images / classes)) * classes
        raise ValueError(
            f"num_images {protocol.num_images} is no multiple of the model's {classes} classes; "
            f"give {nearest}"
        )
    needed = ("reference", "inception")
    if protocol.split is None:
        for name in needed:
            if not section[name]:
                raise ValueError(f"protocol {protocol.name} needs {name}: the path of a file")
            if not pathlib.Path(section[name]).exists():
                raise FileNotFoundError(f"{name} {section[name]} does not exist")
        return
    if config.data.name != "digits":
        raise ValueError(
            f"protocol {protocol.name!r} needs data.name 'digits', not {config.data.name!r}"
        )
    if given := [name for name in needed if section[name]]:
        raise ValueError(
            f"{given[0]} {section[given[0]]}: protocol {protocol.name} needs none; leave it empty"
        )


def _check_best(metric: str, protocol: Protocol) -> None:
    if not metric:
        return
    measured = [*protocol.metrics, *(SVM_FIGURES if SVM in protocol.metrics else ())]
    allowed = [name for name in measured if name in HIGHER_IS_BETTER | LOWER_IS_BETTER]
    ranks = metric in HIGHER_IS_BETTER | LOWER_IS_BETTER
    source = SVM if metric in SVM_FIGURES else metric
    if ranks and metric not in allowed and source in protocol.allowed_metrics:
        raise ValueError(
            f"keep_best {metric!r} is not measured; add {source!r} to config.evaluation.metrics, "
            f"which are {protocol.metrics}"
        )
    check_choice("keep_best", metric, allowed)


class BestCheckpoint:
    """The parameters with the best figure so far, in the folder `best` of a run directory.

    A step is on disk whole, with its figures, before the one that it replaces goes.

    Args:
        workdir: directory of the run, which the caller holds.
        monitor: of the run, with `run.evaluation.keep_best`.

    Raises:
        ValueError: if what is there was chosen by another metric or under other settings.
    """

    def __init__(self, workdir: os.PathLike | str, monitor: Monitor):
        self.path = pathlib.Path(workdir) / BEST
        self._metric = monitor.run.evaluation.keep_best
        self._settings = monitor.settings
        self._store = Checkpoints(self.path, keep=None)
        try:
            self.step: int | None = None
            self._best = math.nan
            for step in self._store.steps():
                record = self._store.read_record(step)
                self._check_same(record)
                value = record["figures"][self._metric]
                if self._is_better(value):
                    self.step, self._best = step, value
            self._drop_others()
            text = schema.to_json(monitor.run)
            write_text_atomically(self.path / RUN_CONFIG, text)
        except BaseException:
            self._store.close()
            raise

    def offer(self, step: int, figures: Mapping[str, float], trees: Mapping[str, Any]) -> bool:
        """Keep the parameters if they are the best so far, and return whether they are.

        Args:
            step: number of updates done.
            figures: of their samples.
            trees: the parameters, under the name that checkpoints have for them.
        """
        value = figures[self._metric]
        # A resumed run meets again what it has kept.
        if step == self.step or not self._is_better(value):
            return False
        record = {
            "step": step,
            "metric": self._metric,
            "figures": dict(figures),
            "settings": self._settings,
        }
        self._store.save(step, trees, record=record)
        # On disk before the run's next checkpoint: resumed from there, it will not come here again.
        self._store.wait()
        self.step, self._best = step, value
        self._drop_others()
        return True

    def describe(self) -> dict[str, Any]:
        """Return step and figure of the best parameters, for the report."""
        if self.step is None:
            return {}
        return {"best_step": self.step, f"best_{self._metric}": round(self._best, 4)}

    def close(self) -> None:
        """Release the directory."""
        self._store.close()

    def _drop_others(self) -> None:
        """Remove what was replaced; a kill may have left it, and the better one may be earlier."""
        for step in self._store.steps():
            if step != self.step:
                self._store.drop(step)

    def _is_better(self, value: float) -> bool:
        if math.isnan(value):
            return False
        if math.isnan(self._best):
            return True
        return value < self._best if self._metric in LOWER_IS_BETTER else value > self._best

    def _check_same(self, record: Mapping[str, Any]) -> None:
        there = {"keep_best": record["metric"], **record["settings"]}
        here = {"keep_best": self._metric, **self._settings}
        lines = _differences(there, here)
        if lines:
            raise ValueError(
                f"{self.path} was chosen by other figures:\n  "
                + "\n  ".join(lines)
                + f"\nSet these back, or move {self.path} away to choose anew from here on."
            )


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    lines: list[str] = []
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a!r} → {b!r}")
    return lines


def make_hook(
    monitor: Monitor,
    best: BestCheckpoint | None,
    say: Callable[[str], None],
    add_scalar: Callable[[str, float, int], None],
) -> Callable[[int, Any], None]:
    """Return what evaluates at a step: `(step, state) → None`.

    Args:
        monitor: what measures.
        best: keeps the best parameters; `None` to keep none.
        say: takes a line for a person.
        add_scalar: takes name, value and step of a point of a curve.
    """
    told: set[str] = set()

    def tell(notes: list[str]) -> None:
        for note in notes:
            if note not in told:
                say(f"evaluation: {note}")
        told.update(notes)

    tell(monitor.notes)
    if best is not None and (kept := best.describe()):
        metric = monitor.run.evaluation.keep_best
        say(
            f"evaluation: {best.path} holds the best {metric} so far, {kept[f'best_{metric}']:.4g} "
            f"of step {kept['best_step']}"
        )

    def evaluate(step: int, state: Any) -> None:
        trees = {"params": state.params} if state.ema is None else {"ema": state.ema}
        figures, notes = monitor.measure(*trees.values())
        tell(notes)
        values = "  ".join(f"evaluation/{name} {value:.4g}" for name, value in figures.items())
        say(f"step {step}/{monitor.run.training.num_steps}  {values}")
        for name, value in figures.items():
            add_scalar(f"evaluation/{name}", value, step)
        if best is not None and best.offer(step, figures, trees):
            metric = monitor.run.evaluation.keep_best
            say(f"step {step}: best {metric} so far, {figures[metric]:.4g}, kept in {best.path}")

    return evaluate
