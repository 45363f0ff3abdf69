"""Evaluation while a model trains: figures, the best parameters, kills, and what is refused."""

import dataclasses
import re
import types

import numpy as np
import pytest
import tiny
from fake_evaluation import FakeNet, make_pixels
from train_test import final_state

import maskgil_jax
from maskgil_jax import checkpoints, evaluate, monitor
from maskgil_jax.evals import metrics_from_features
from maskgil_jax.evals.frechet import Statistics
from maskgil_jax.evaluation.protocols import find_protocol
from maskgil_jax.train import train
from maskgil_jax.training import loop

SHAPE = (16, 16, 3)
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny.make_tokenizer_dir(tmp_path_factory.mktemp("tokenizer") / "vq")


def digits_config(tokenizer):
    """Evaluate after 3, 6 and 8 updates; checkpoints are of 4 and 8."""
    config = tiny.get_config()
    config.model.update(grid_size=(8, 8), num_classes=10)
    config.tokenizer.path = str(tokenizer)
    config.data.update(name="digits", image_size=(32, 32), flip=False)
    config.training.num_steps = 8
    config.logging.every = 1
    config.evaluation.update(
        every_steps=3, protocol="digits", num_images=20, batch_size=8, keep_best="fid"
    )
    config.evaluation.metrics = ("fid", "svm")
    return config


def curves(output):
    """Figures of every step, as they were printed, the last time if more than once."""
    found = re.findall(r"step (\d+)/\d+  evaluation/(fid .*)", output)
    return {int(step): values for step, values in found}


def read_best(path):
    store = checkpoints.Checkpoints(path / "best", read_only=True)
    assert len(store.steps()) == 1
    return store.read_record(store.latest_step())


@pytest.fixture(scope="module")
def _runs():
    return {}


@pytest.fixture
def finished(tokenizer, tmp_path_factory, _runs, quick_compilation):
    """A run that nothing disturbed, made once: its directory, its report, and what it printed."""
    if not _runs:
        path, lines = tmp_path_factory.mktemp("finished") / "run", []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("maskgil_jax.train.say", lines.append)
            report = train(digits_config(tokenizer), path)
        _runs["finished"] = (path, report, "\n".join(lines))
    return _runs["finished"]


def test_figures_are_told_and_drawn_and_the_best_is_kept(finished):
    path, report, output = finished
    assert curves(output).keys() == {3, 6, 8}
    record = read_best(path)
    values = {step: float(line.split()[1]) for step, line in curves(output).items()}
    assert record["step"] == min(values, key=values.get) == report["best_step"]
    assert record["figures"]["fid"] == pytest.approx(min(values.values()), rel=1e-3)
    assert report["best_fid"] == round(record["figures"]["fid"], 4)
    assert {"agreement", "pixel_recall"} <= set(record["figures"])
    assert "evaluation: num_images is 20, not the 2000 of protocol digits" in output
    written = b"".join(file.read_bytes() for file in (path / "tensorboard").iterdir())
    assert written.count(b"evaluation/fid") == written.count(b"evaluation/agreement") == 3


def test_the_best_is_loaded_and_measures_the_same_as_evaluate(finished, tmp_path):
    record = read_best(finished[0])
    report = evaluate.evaluate(
        tmp_path / "x.json",
        workdir=str(finished[0] / "best"),
        protocol="digits",
        metrics=["fid", "svm"],
        num_images=20,
        batch_size=8,
    )
    assert report["figures"] == record["figures"]
    model = maskgil_jax.load_model(finished[0] / "best")
    state = final_state(finished[0], 8)
    same = np.array_equal(model.params["head"]["kernel"], state["['ema']['head']['kernel']"])
    assert same == (record["step"] == 8)


def test_training_is_the_same_without(finished, tokenizer, tmp_path, monkeypatch):
    config = digits_config(tokenizer)
    config.evaluation.every_steps = 0
    monkeypatch.setattr(monitor, "open_net", None)  # what is off must not get there
    report = train(config, tmp_path / "run")
    assert "best_step" not in report
    assert not (tmp_path / "run" / "best").exists()
    expected, actual = final_state(tmp_path / "run", 8), final_state(finished[0], 8)
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=name)


class KilledError(Exception):
    pass


def kill(*_):
    raise KilledError


def test_a_killed_run_ends_with_the_same_best(finished, tokenizer, tmp_path, monkeypatch):
    told = loop.format_progress
    with monkeypatch.context() as patch:
        patch.setattr(loop, "format_progress", lambda s, *a: kill() if s == 7 else told(s, *a))
        with pytest.raises(KilledError):
            train(digits_config(tokenizer), tmp_path / "run")
    assert (tmp_path / "run/best").is_dir()
    lines = []
    monkeypatch.setattr("maskgil_jax.train.say", lines.append)
    report = train(digits_config(tokenizer), tmp_path / "run")
    assert report == finished[1] | {"seconds": report["seconds"]}
    output = "\n".join(lines)
    assert "resumed from step 4" in output
    assert curves(output) == {step: curves(finished[2])[step] for step in (6, 8)}
    assert output.count("best holds the best fid so far") == 1
    assert "holds the best" not in finished[2]
    assert read_best(tmp_path / "run") == read_best(finished[0])
    expected, actual = (
        maskgil_jax.load_model(path / "best").params for path in (finished[0], tmp_path / "run")
    )
    np.testing.assert_array_equal(expected["head"]["kernel"], actual["head"]["kernel"])


def offer(best, values):
    trees = {"params": {"x": np.arange(4.0)}}
    return [best.offer(step, {"fid": value}, trees) for step, value in values.items()]


@pytest.fixture
def watch(tokenizer):
    config = digits_config(tokenizer)
    vq = maskgil_jax.load_tokenizer(tokenizer)
    return monitor.open_monitor(config, maskgil_jax.sharding.make_mesh({"data": -1}), vq)


def test_an_earlier_step_may_turn_out_better_and_nan_never_is(watch, tmp_path):
    best = monitor.BestCheckpoint(tmp_path, watch)
    assert offer(best, {2: np.nan, 4: 3.0, 6: 3.0, 8: 2.0}) == [False, True, False, True]
    assert offer(best, {6: 1.5, 8: 1.7}) == [True, False]
    best.close()
    again = monitor.BestCheckpoint(tmp_path, watch)
    assert again.describe() == {"best_step": 6, "best_fid": 1.5}
    lines = []
    monitor.make_hook(watch, again, lines.append, lambda name, value, step: None)
    assert lines[-1] == f"evaluation: {tmp_path / 'best'} holds the best fid so far, 1.5 of step 6"
    assert offer(again, {6: 1.4, 9: 1.6}) == [False, False]
    again.close()
    assert read_best(tmp_path)["figures"] == {"fid": 1.5}


@pytest.mark.parametrize(("method", "kept"), [("_write_manifests", 4), ("drop", 6)])
def test_a_kill_while_the_best_is_written_leaves_one(watch, tmp_path, monkeypatch, method, kept):
    best = monitor.BestCheckpoint(tmp_path, watch)
    offer(best, {4: 3.0})
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.Checkpoints, method, kill)
        # Orbax writes in a thread, and hands on what was raised there.
        with pytest.raises((KilledError, RuntimeError)):
            offer(monitor.BestCheckpoint(tmp_path, watch), {6: 2.0})
    store = checkpoints.Checkpoints(tmp_path / "best", read_only=True)
    assert store.read_record(store.latest_step())["step"] == kept
    again = monitor.BestCheckpoint(tmp_path, watch)
    assert offer(again, {6: 2.0, 8: 1.0}) == [kept == 4, True]
    again.close()
    assert read_best(tmp_path)["step"] == 8


def test_a_kill_between_an_earlier_best_and_a_later_one_leaves_the_better(
    watch, tmp_path, monkeypatch
):
    """A run that goes on from before its best meets steps that it has not measured yet."""
    offer(monitor.BestCheckpoint(tmp_path, watch), {4: 3.0})
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.Checkpoints, "drop", kill)
        with pytest.raises(KilledError):
            offer(monitor.BestCheckpoint(tmp_path, watch), {2: 2.0})
    again = monitor.BestCheckpoint(tmp_path, watch)
    assert again.describe() == {"best_step": 2, "best_fid": 2.0}
    assert read_best(tmp_path)["step"] == 2
    assert offer(again, {2: 2.0, 4: 3.0, 6: 2.5}) == [False, False, False]
    again.close()
    assert read_best(tmp_path)["figures"] == {"fid": 2.0}


def test_a_best_of_other_figures_is_not_compared(watch, tmp_path):
    best = monitor.BestCheckpoint(tmp_path, watch)
    offer(best, {4: 3.0})
    best.close()
    watch.run.sampler.num_steps = 3
    watch.run.evaluation.keep_best = "agreement"
    watch.run.evaluation.batch_size = 4
    half = dataclasses.replace(watch.tokenizer.config, dtype="bfloat16")
    vq = dataclasses.replace(watch.tokenizer, config=half)
    watch = dataclasses.replace(watch, tokenizer=vq)
    with pytest.raises(ValueError, match="chosen by other figures") as caught:
        monitor.BestCheckpoint(tmp_path, watch)
    assert "keep_best: 'fid' → 'agreement'" in str(caught.value)
    assert "sampler.num_steps: 2 → 3" in str(caught.value)
    assert "batch_size: 8 → 4" in str(caught.value)
    assert "tokenizer_dtype: 'float32' → 'bfloat16'" in str(caught.value)
    assert read_best(tmp_path)["step"] == 4


def test_a_batch_larger_than_all_samples_changes_no_figure(watch, tmp_path):
    watch.run.evaluation.batch_size = 100
    best = monitor.BestCheckpoint(tmp_path, watch)
    offer(best, {4: 3.0})
    best.close()
    watch.run.evaluation.batch_size = 20
    monitor.BestCheckpoint(tmp_path, watch).close()


def test_a_damaged_best_is_set_aside(watch, tmp_path):
    best = monitor.BestCheckpoint(tmp_path, watch)
    offer(best, {4: 3.0})
    best.close()
    victim = tmp_path / "best/checkpoints/4/record/metadata"
    victim.write_text(victim.read_text().replace("3.0", "0.1"))
    again = monitor.BestCheckpoint(tmp_path, watch)
    assert again.describe() == {}
    assert offer(again, {6: 5.0}) == [True]
    again.close()


def test_inception_protocols_compare_with_a_file(tokenizer, tmp_path, monkeypatch):
    """Of the parameters, where no average is kept."""
    config = tiny.get_config()
    config.tokenizer.path = str(tokenizer)
    np.savez(tmp_path / "real.npz", make_pixels(12, shape=SHAPE))
    (tmp_path / "inception").mkdir()
    config.evaluation.update(
        every_steps=5,
        protocol="val",
        num_images=10,
        reference=str(tmp_path / "real.npz"),
        inception=str(tmp_path / "inception"),
        keep_best="precision",
    )
    config.evaluation.metrics = ("fid", "sfid", "precision", "recall")
    monkeypatch.setattr(monitor, "open_net", lambda family, weights: FakeNet())
    generator, lines, points = tiny.make_generator(tokenizer, devices=4), [], []
    watch = monitor.open_monitor(config, generator.mesh, generator.tokenizer)
    best = monitor.BestCheckpoint(tmp_path, watch)
    evaluate_at = monitor.make_hook(watch, best, lines.append, lambda *point: points.append(point))
    evaluate_at(5, types.SimpleNamespace(params=generator.model.params, ema=None))
    best.close()
    figures = read_best(tmp_path)["figures"]
    assert figures.keys() == {"fid", "sfid", "precision", "recall"}
    assert points == [(f"evaluation/{name}", value, 5) for name, value in figures.items()]
    assert any("taken to be that of protocol val" in line for line in lines)
    images = generator(np.arange(10) % 2, seed=0)
    pool = [FakeNet().extract(x, ("pool",))["pool"] for x in (images, make_pixels(12, shape=SHAPE))]
    expected = metrics_from_features(*pool, metrics=["fid", "precision", "recall"])
    assert {name: figures[name] for name in expected} == expected
    assert (tmp_path / "best/checkpoints/5/params").is_dir()


def test_no_more_of_the_reference_is_held_than_metrics_need(watch):
    whole = watch.net.extract(watch.reference.images.read(0, 297), ("pool",))["pool"]
    reference, features = watch._compared
    assert features == {}
    np.testing.assert_array_equal(reference.statistics.mean, Statistics.of_features(whole).mean)
    protocol = dataclasses.replace(watch.protocol, metrics=("fid", "recall"))
    reference, features = dataclasses.replace(watch, protocol=protocol)._compared
    assert reference.statistics is None
    np.testing.assert_allclose(features["pool"], whole, rtol=1e-5, atol=1e-5)


BAD_VALUES = {
    "every_steps": (-1, r"evaluation.every_steps -1 must be at least 0"),
    "batch_size": (0, r"evaluation.batch_size 0 must be at least 1"),
    "protocol": ("digit", r"config.evaluation: protocol 'digit'.*Did you mean 'digits'"),
    "metrics": (("fdi",), r"metric 'fdi' is unknown.*Did you mean 'fid'"),
    "num_images": (25, r"num_images 25 is no multiple of the model's 10 classes; give 20"),
    "keep_best": ("novelty", r"keep_best 'novelty' is unknown; allowed: fid, agreement"),
    "reference": ("x.npz", r"reference x.npz: protocol digits needs none"),
    "inception": ("x.pth", r"inception x.pth: protocol digits needs none"),
}


@pytest.mark.parametrize("field", BAD_VALUES)
def test_bad_values_are_named_before_anything_is_written(tokenizer, tmp_path, field):
    value, message = BAD_VALUES[field]
    config = digits_config(tokenizer)
    config.evaluation[field] = value
    with pytest.raises(ValueError, match=message):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_best_by_a_figure_that_is_not_measured_names_the_metric_to_add():
    for metrics, best, missing in ((("svm",), "is", "is"), (("fid",), "agreement", "svm")):
        protocol = find_protocol("digits", metrics=metrics)
        message = f"keep_best '{best}' is not measured; add '{missing}' to config.evaluation.met"
        with pytest.raises(ValueError, match=message):
            monitor._check_best(best, protocol)
    with pytest.raises(ValueError, match="keep_best 'sfid' is unknown; allowed: fid"):
        monitor._check_best("sfid", find_protocol("digits", metrics=("fid",)))


def test_what_a_protocol_lacks_is_named(tokenizer, tmp_path):
    config = digits_config(tokenizer)
    config.evaluation.metrics = ("kid",)
    with pytest.raises(ValueError, match="num_images 20 is too few: kid needs at least 250"):
        train(config, tmp_path / "run")
    config.evaluation.update(protocol="adm", keep_best="")
    config.evaluation.metrics = ("fid",)
    with pytest.raises(ValueError, match="protocol adm needs reference"):
        train(config, tmp_path / "run")
    config.evaluation.reference = str(tmp_path / "no.npz")
    with pytest.raises(FileNotFoundError, match=r"reference .*no\.npz does not exist"):
        train(config, tmp_path / "run")
    np.savez(tmp_path / "real.npz", make_pixels(12))
    config.evaluation.reference = str(tmp_path / "real.npz")
    with pytest.raises(ValueError, match="protocol adm needs inception"):
        train(config, tmp_path / "run")
    config.evaluation.inception = str(tmp_path / "no.pth")
    with pytest.raises(FileNotFoundError, match=r"inception .*no\.pth does not exist"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_other_runs_are_refused(tokenizer, tmp_path, monkeypatch):
    config = digits_config(tokenizer)
    config.data.name, config.data.path = "folder", str(tiny.make_image_folder(tmp_path / "i"))
    config.model.num_classes = 2
    with pytest.raises(ValueError, match="protocol 'digits' needs data.name 'digits'"):
        train(config, tmp_path / "run")
    config = digits_config(tokenizer)
    config.kind = "tokenizer"
    with pytest.raises(ValueError, match="every_steps is for kind 'maskgil'"):
        train(config, tmp_path / "run")
    vq = maskgil_jax.load_tokenizer(tokenizer)
    mesh = maskgil_jax.sharding.make_mesh({"data": -1})
    config = digits_config(tokenizer)
    config.model.update(family="maskgil-text", num_classes=1000)
    with pytest.raises(ValueError, match="config.evaluation: .* conditioned on captions"):
        monitor.open_monitor(config, mesh, vq)
    monkeypatch.setattr("jax.process_count", lambda: 2)
    with pytest.raises(ValueError, match="needs a single process, and this run has 2"):
        monitor.open_monitor(digits_config(tokenizer), mesh, vq)
