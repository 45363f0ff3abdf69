"""An evaluation from images to its report, continued after a kill.

Beside the report FILE.json lies a working folder, `.FILE.json.work`, with the settings, the shards
of features, and the figures of finished points of a sweep. The report appears whole when all is
measured, and the working folder goes. The report holds no times, so that in one environment it is
the same to the last byte however often the evaluation was started. One process at a time works on
it.
"""

import contextlib
import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from maskgil_jax import __version__, bulk, workdir
from maskgil_jax.checkpoints import write_text_atomically
from maskgil_jax.data.errors import ImageReadError
from maskgil_jax.evaluation.extraction import extract
from maskgil_jax.evaluation.image_sets import GeneratedImages, ImageSet, describe_labels
from maskgil_jax.evaluation.measure import check_labels, check_measurable, measure
from maskgil_jax.evaluation.nets import FeatureNet, describe_net
from maskgil_jax.evaluation.protocols import Protocol, describe_changes
from maskgil_jax.evaluation.references import Reference

_SETTINGS, _POINTS, _SAMPLES, _REFERENCE = "settings.json", "points", "samples", "reference"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is to be measured, opened and checked.

    Attributes:
        protocol: how.
        net: what features are compared of.
        reference: what samples are compared with.
        samples: sets of samples, one for each point of the sweep; one if nothing varies.
        points: the settings that vary, for each of them; empty where nothing does.
        sweep: values of each setting that varies.
        out: the report, FILE.json.
        batch_size: images at a time.
        command: what was typed, for the report.

    Raises:
        ValueError: if the report is no .json, the number of samples is not the protocol's, the net
            does not take them, the protocol has not their classes, or they or the reference do not
            suffice for a metric.
    """

    protocol: Protocol
    net: FeatureNet
    reference: Reference
    samples: Sequence[ImageSet]
    points: Sequence[Mapping[str, Any]] = ({},)
    sweep: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    out: pathlib.Path
    batch_size: int = 64
    command: str = ""

    def __post_init__(self) -> None:
        check_out(self.out)
        assert len(self.samples) == len(self.points)
        for images in self.samples:
            check_count(len(images), self.protocol)
            self.net.check_shape("samples", images.image_shape)
            check_labels(images.labels, self.protocol)
            check_measurable(
                self.protocol, self.net, self.reference, labelled=images.labels is not None
            )

    @property
    def work(self) -> pathlib.Path:
        """The working folder."""
        return self.out.with_name(f".{self.out.name}.work")

    @property
    def work_settings(self) -> dict[str, Any]:
        """All that the shards of features depend on, as JSON has it.

        Not which metrics are made of them, so that others can be asked for on the way.
        """
        settings = self.settings
        settings["protocol"] = {k: v for k, v in settings["protocol"].items() if k != "metrics"}
        return settings | {"features": list(self.features)}

    @property
    def features(self) -> tuple[str, ...]:
        """What the net is asked for of samples."""
        return tuple(dict.fromkeys(("pool", *self.protocol.features)))

    @property
    def settings(self) -> dict[str, Any]:
        """All that the figures depend on, as JSON has it."""
        swept: dict[str, Any] = {}
        if self.sweep:
            # Points go by their number, hence by the order of what varies.
            swept = {"sweep": dict(self.sweep), "sweep_order": list(self.sweep)}
        protocol = self.protocol.to_dict()
        if not isinstance(self.samples[0], GeneratedImages):
            protocol["labels"] = describe_labels(self.samples[0].labels)
        settings: dict[str, Any] = {
            "protocol": protocol,
            "net": describe_net(self.net),
            "reference": dict(self.reference.settings),
            **swept,
            "samples": dict(self.samples[0].settings),
            "batch_size": self.batch_size,
            "versions": {
                "maskgil_jax": __version__,
                "jax": jax.__version__,
                "numpy": np.__version__,
                "platform": jax.default_backend(),
                "devices": jax.device_count(),
            },
        }
        if swept:
            # What varies is in the points.
            settings["samples"]["sampler"] = {
                name: value
                for name, value in settings["samples"]["sampler"].items()
                if name not in self.sweep
            }
        return json.loads(json.dumps(settings))


def check_out(out: pathlib.Path) -> None:
    """Raise a `ValueError` unless `out` names a JSON file."""
    if out.suffix.lower() != ".json" or out.is_dir():
        raise ValueError(f"--out {out} is no FILE.json")


def check_count(count: int, protocol: Protocol) -> None:
    """Refuse another number of samples than asked for.

    Raises:
        ValueError: and says how to measure as many.
    """
    if count < 2:
        raise ValueError(f"{count} image: a distribution needs at least 2")
    if count != protocol.num_images:
        raise ValueError(
            f"there are {count} samples, but {protocol.num_images} are asked for (by protocol "
            f"{protocol.name} or --num_images); give as many, or say --num_images {count}: the "
            "report then notes it, and figures are comparable only with others of that count"
        )


def run(
    evaluation: Evaluation, say: Callable[[Mapping[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Measure what is not measured yet, write the report, and return it.

    If a report of the same settings is there already, nothing is computed; one of others is never
    replaced.

    Args:
        evaluation: what to measure.
        say: called with the report of each point as soon as it is there.

    Raises:
        ValueError: if the report or the working folder is of other settings (each is named), the
            folder is in use, or an image or a feature is refused.
        OSError: if the disk has too little space.
    """
    settings = evaluation.settings
    with _hold(evaluation):
        report = _read_finished(evaluation.out, settings)
        if report is None:
            report = _measure_all(evaluation, settings, say)
            text = json.dumps(report, indent=1, ensure_ascii=False)
            write_text_atomically(evaluation.out, text + "\n")
        else:
            bulk.say(f"{evaluation.out} is finished already; nothing is measured again")
            if say is not None:
                for point in report.get("points", [report]):
                    say(point)
        _remove(evaluation.work)
    return report


def _measure_all(
    evaluation: Evaluation,
    settings: Mapping[str, Any],
    say: Callable[[Mapping[str, Any]], None] | None,
) -> dict[str, Any]:
    points = []
    for number in range(len(evaluation.points)):
        file = evaluation.work / _POINTS / f"{number:04}.json"
        metrics, point = list(evaluation.protocol.metrics), None
        stored = _read_json(file)
        # One of other metrics is measured anew.
        if stored is not None and stored.get("metrics") == metrics:
            point = stored["point"]
        if point is None:
            point = _measure_point(evaluation, number)
            write_text_atomically(file, json.dumps({"metrics": metrics, "point": point}))
        shutil.rmtree(_samples_folder(evaluation, number), ignore_errors=True)
        points.append(point)
        if say is not None:
            say(point)
    common = {
        "counts": {
            "samples": evaluation.protocol.num_images,
            "reference": evaluation.reference.settings["count"],
        },
    }
    if evaluation.sweep:
        result = {"points": points}
    else:
        result = {"figures": points[0]["figures"], "notes": points[0]["notes"]}
    return {**result, **common, **settings, "command": evaluation.command}


def _measure_point(evaluation: Evaluation, number: int) -> dict[str, Any]:
    protocol, images, net = evaluation.protocol, evaluation.samples[number], evaluation.net
    swept = dict(evaluation.points[number])
    label = "".join(f" {name}={value}" for name, value in swept.items())
    real = _extract_reference(evaluation)
    chunk_size = images.chunk_size if isinstance(images, GeneratedImages) else evaluation.batch_size
    samples = extract(
        images,
        net,
        evaluation.features,
        _samples_folder(evaluation, number),
        chunk_size=chunk_size,
        label=f"samples{label}: ",
    )
    bulk.say(f"samples{label}: measuring {', '.join(protocol.metrics)}")
    figures, notes = measure(
        protocol, samples, images.labels, images.image_shape, evaluation.reference, real
    )
    known = [*describe_changes(protocol), *net.notes, *evaluation.reference.notes]
    known += [*_note_sizes(evaluation), *_note_labels(evaluation)]
    return {**({"swept": swept} if swept else {}), "figures": figures, "notes": known + notes}


def _extract_reference(evaluation: Evaluation) -> Mapping[str, np.ndarray]:
    reference = evaluation.reference
    names = reference.wanted_features(evaluation.protocol.metrics)
    if reference.images is None or not names:
        return {}
    return extract(
        reference.images,
        evaluation.net,
        names,
        # A net that is asked for more may sum in another order: no folder has shards of both.
        evaluation.work / _REFERENCE / "-".join(names),
        chunk_size=evaluation.batch_size,
        label="reference: ",
    )


def _note_sizes(evaluation: Evaluation) -> list[str]:
    ours, theirs = evaluation.samples[0].image_shape, evaluation.reference.image_shape
    if theirs is None or tuple(theirs) == ours:
        return []
    return [
        f"samples have {ours[0]}×{ours[1]} pixels, the reference {theirs[0]}×{theirs[1]}; the net "
        f"sees both resized ({evaluation.net.resize}), which figures depend on"
    ]


def _note_labels(evaluation: Evaluation) -> list[str]:
    protocol, found = evaluation.protocol, evaluation.settings["protocol"]["labels"]
    if found.startswith(protocol.labels):
        return []
    return [
        f"the classes of the samples are {found}, but protocol {protocol.name} takes them "
        f"{protocol.labels}"
    ]


def _samples_folder(evaluation: Evaluation, number: int) -> pathlib.Path:
    return evaluation.work / _SAMPLES / f"{number:04}"


@contextlib.contextmanager
def _hold(evaluation: Evaluation) -> Iterator[None]:
    """Make or reopen the working folder.

    If nothing was stored there, or files to measure turn out damaged in the first start, it goes
    again.
    """
    work, settings = evaluation.work, evaluation.work_settings
    new_parents = [parent for parent in work.parents if not parent.exists()]
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"--out {evaluation.out} cannot be written: {error}") from error
    with workdir.lock(work, "--out"):
        for leftover in work.glob(f".{_SETTINGS}.*"):
            leftover.unlink()
        file, is_first = work / _SETTINGS, True
        if file.exists():
            bulk.check_same(work, bulk.read_settings(file), settings, "a part of an evaluation")
            is_first = False
        elif any(path.name != workdir.LOCK for path in work.iterdir()):
            raise ValueError(
                f"{work} holds files but no {_SETTINGS}; remove it or choose another --out"
            )
        else:
            write_text_atomically(file, json.dumps(settings, indent=1) + "\n")
        try:
            yield
        except ImageReadError as error:
            # The files have to change, and then the shards of those before fit nothing.
            if is_first and not _is_passing(error):
                _remove(work)
            raise
        finally:
            if work.exists() and not any(work.rglob("0*.npz")) and not any(work.glob("*/*.json")):
                _remove(work)
            if not evaluation.out.exists() and not work.exists():
                for parent in new_parents:
                    with contextlib.suppress(OSError):  # somebody has put something there
                        parent.rmdir()


def _is_passing(error: BaseException | None) -> bool:
    """Return whether an error is of the disk or network, and the file may be read another time."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return True
        error = error.__cause__
    return False


def _remove(work: pathlib.Path) -> None:
    """Remove a working folder: settings after what they describe, last the lock that guards all."""
    for name in (_SAMPLES, _REFERENCE, _POINTS):
        shutil.rmtree(work / name, ignore_errors=True)
    for name in (_SETTINGS, workdir.LOCK):
        (work / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # a network file system keeps a file that is open
        work.rmdir()


def _read_finished(out: pathlib.Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the report that is there; refuse one of other settings, and what is no report."""
    if not out.exists():
        return None
    remedy = "Choose another --out, or move that file away to measure anew."
    report = _read_json(out)
    if report is None or not isinstance(report.get("protocol"), dict):
        raise ValueError(f"--out {out} is there and no report of an evaluation. {remedy}")
    names = {*settings, "sweep", "sweep_order"}
    there = {name: value for name, value in report.items() if name in names}
    if differing := bulk.describe_differences(there, settings):
        if changed := bulk.describe_changed_files(there, settings):
            remedy = f"{changed} {remedy}"
        raise ValueError(
            f"--out {out} is a finished report with other settings:\n"
            + "\n".join(differing)
            + f"\n{remedy}"
        )
    return report


def _read_json(file: pathlib.Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text())
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return found if isinstance(found, dict) else None
