"""The evaluate command: where samples come from, what it writes, what it refuses."""

import json
import os

import numpy as np
import pytest
import tiny
from fake_evaluation import FakeNet, make_pixels

from maskgil_jax import ImageGenerator, evaluate

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    return tiny.make_generator(tiny.make_tokenizer_dir(tmp_path_factory.mktemp("t") / "vq"))


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch, generator):
    """A small model in place of what is loaded, and a small net in place of Inception."""
    monkeypatch.setattr(
        ImageGenerator, "from_checkpoint", lambda workdir, batch_size, **_: generator
    )
    monkeypatch.setattr(evaluate, "open_net", lambda family, weights: FakeNet())


@pytest.fixture
def files(tmp_path):
    """A folder to work in with samples and a reference of 16×16 pixels."""
    shape = (16, 16, 3)
    np.savez(tmp_path / "real.npz", make_pixels(12, shape=shape))
    np.savez(tmp_path / "samples.npz", make_pixels(9, seed=1, shape=shape), labels=np.arange(9) % 3)
    return tmp_path


def run(files, *arguments, protocol="val", reference="real.npz", out="x.json"):
    evaluate.main(
        [
            f"--protocol={protocol}",
            *([] if reference is None else [f"--reference={files / reference}"]),
            f"--out={files / out}",
            "--compilation_cache=",
            *arguments,
        ]
    )
    return json.loads((files / out).read_text())


def refuse(files, *arguments, **options):
    with pytest.raises(SystemExit) as caught:
        run(files, *arguments, **options)
    assert not (files / "x.json").exists()
    return str(caught.value.code)


def test_samples_of_a_run_are_those_of_the_generator(files, generator, capsys):
    report = run(files, "--workdir=w", "--num_images=6", "--seed=3", "--norescale")
    labels = np.arange(6) % 2
    images = generator(labels, seed=3, rescale=False)
    np.savez(files / "same.npz", images, labels=labels)
    again = run(files, f"--samples={files / 'same.npz'}", "--num_images=6", out="y.json")
    assert report["protocol"]["labels"] == "balanced"
    assert again["protocol"]["labels"] == "balanced (3 of each of 2 classes)"
    assert again["notes"] == report["notes"]
    assert report["figures"] == again["figures"]
    assert report["samples"]["seed"] == 3
    assert report["samples"]["sampler"]["num_steps"] == 2
    assert report["samples"]["sampler"]["rescale"] is False
    assert report["samples"]["model"] == generator.model.fingerprint
    printed = capsys.readouterr()
    header, _, row = printed.out.splitlines()[:3]
    assert header == "| protocol | images | fid ↓ | sfid ↓ | is ↑ | precision ↑ | recall ↑ |"
    assert row.startswith("| val | 6 | ")
    assert "note: num_images is 6, not the 50000 of protocol val" in printed.err
    assert set(os.listdir(files)) == {"real.npz", "samples.npz", "same.npz", "x.json", "y.json"}


def test_labels_per_class_and_random_ones(files):
    run(files, "--workdir=w", "--num_per_class=3", "--metrics=fid")
    arguments = ["--workdir=w", "--num_images=7", "--labels=random", "--metrics=fid, is"]
    report = run(files, *arguments, out="y.json")
    assert report["protocol"]["labels"] == "random"
    assert set(report["figures"]) == {"fid", "is"}


def test_a_sweep_writes_table_and_plot(files, capsys):
    pytest.importorskip("matplotlib")
    arguments = ["--workdir=w", "--num_images=6", "--metrics=fid,is"]
    arguments += ["--sweep=num_steps=1,2", "--sweep=guidance_scale=1,3"]
    report = run(files, *arguments, f"--plot={files / 'x.png'}")
    assert [point["swept"] for point in report["points"]] == [
        {"num_steps": steps, "guidance_scale": scale} for steps in (1, 2) for scale in (1.0, 3.0)
    ]
    table = (files / "x.md").read_text()
    printed = capsys.readouterr()
    assert table in printed.out
    assert len(table.splitlines()) == 6
    told = printed.err.splitlines()
    assert told[0] == "protocol val: opening w"
    assert sum(line.startswith("note: num_images") for line in told) == 1
    assert sum("guidance_scale=3.0: fid" in line for line in told) == 2
    assert (files / "x.png").stat().st_size > 1000
    # A point is what is measured alone.
    alone = run(files, *arguments[:3], "--num_steps=1", "--guidance_scale=3", out="y.json")
    assert alone["figures"] == report["points"][1]["figures"]


def test_a_finished_report_of_other_settings_stays(files, capsys):
    arguments = ["--workdir=w", "--num_images=6", "--metrics=fid"]
    run(files, *arguments)
    data = (files / "x.json").read_bytes()
    assert "x.json: " in capsys.readouterr().err
    assert run(files, *arguments) == json.loads(data)
    told = capsys.readouterr().err
    assert "x.json is finished already" in told
    assert "x.json: " not in told
    with pytest.raises(SystemExit) as caught:
        run(files, *arguments, "--seed=1")
    message = str(caught.value.code)
    assert "x.json is a finished report with other settings:\n  samples.seed: 0 there" in message
    assert "Choose another --out, or move that file away" in message
    assert (files / "x.json").read_bytes() == data
    assert set(os.listdir(files)) == {"real.npz", "samples.npz", "x.json"}


def test_the_inception_score_needs_no_reference(files):
    arguments = [f"--samples={files / 'samples.npz'}", "--num_images=9"]
    alone = run(files, *arguments, "--metrics=is", protocol="adm", reference=None)
    assert alone["reference"] == {"kind": "none", "count": None}
    beside = run(files, *arguments, "--metrics=is,fid", out="y.json")
    assert alone["figures"] == {name: beside["figures"][name] for name in ("is",)}
    with pytest.raises(SystemExit, match="protocol adm needs --reference"):
        run(files, *arguments, "--metrics=is,fid", protocol="adm", reference=None, out="z.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give the samples: one of --workdir DIR and --samples"),
        (["--workdir=w", "--samples=s.npz"], "both --workdir w and --samples s.npz are given"),
        (["--samples=samples.npz", "--num_steps=4"], "--num_steps is about generating"),
        (["--samples=samples.npz", "--sweep=num_steps=4"], "--sweep is about generating"),
        (["--samples=samples.npz", "--seed=0"], "--seed is about generating"),
        (["--samples=samples.npz"], "there are 9 samples, but 50000 are asked for"),
        (["--samples=samples.npz", "--num_images=8"], "there are 9 samples, but 8 are asked for"),
        (["--workdir=w", "--num_images=7"], "7 is no multiple of the model's 2 classes"),
        (["--workdir=w", "--num_images=6", "--num_per_class=3"], "exclude each other"),
        (["--workdir=w", "--num_images=1"], "num_images 1 is too few"),
        (["--workdir=w", "--num_images=6", "--metrics=fid,foo"], "metric 'foo' is unknown"),
        (["--workdir=w", "--num_images=6", "--num_steps=99"], "num_steps"),
        (["--workdir=w", "--num_images=6", "--size=16"], "--size '16' is no size"),
        (["--workdir=w", "--num_images=6", "--batch_size=0"], "--batch_size 0 must be at least 1"),
        (["--workdir=w", "--num_images=6", "--sweep=num_steps=1,99"], "num_steps"),
        (["--workdir=w", "--num_images=6", "--plot=x.png"], "--plot needs a --sweep"),
        (["--workdir=w", "--num_images=6", "--out=x.csv"], "x.csv is no FILE.json"),
        (["--workdir=w", "--num_images=6", "--image_size=8"], "are for folders of pictures"),
        (["--samples=samples.npz", "--num_images=9", "--convert_to_rgb"], "are for folders of"),
        (
            ["--samples=samples.npz", "--num_images=9", "--metrics=kid"],
            "num_images 9 is too few: kid",
        ),
    ],
)
def test_bad_requests_are_refused(files, monkeypatch, arguments, message):
    monkeypatch.chdir(files)
    assert message in refuse(files, *arguments)


def test_an_unknown_protocol_is_answered_with_the_nearest(files):
    assert "Did you mean 'val'?" in refuse(files, "--workdir=w", protocol="vel")


def test_a_sampler_setting_is_read_with_its_type(files, capsys):
    with pytest.raises(SystemExit):
        run(files, "--workdir=w", "--num_steps=two")
    assert "num_steps=two: 'two' is no int" in capsys.readouterr().err


def test_shares_of_a_causal_model_are_swept(files, generator, monkeypatch, tmp_path_factory):
    directory = tiny.make_tokenizer_dir(tmp_path_factory.mktemp("u") / "vq")
    causal = tiny.make_generator(directory, "llamagen").model
    fused = ImageGenerator(generator.model, generator.tokenizer, ar_model=causal, batch_size=4)
    monkeypatch.setattr(ImageGenerator, "from_checkpoint", lambda workdir, **_: fused)
    arguments = ["--workdir=w", "--ar_checkpoint=a", "--num_images=6", "--metrics=fid"]
    report = run(files, *arguments, "--sweep=ar_share=1,0.5,0")
    assert [point["swept"] for point in report["points"]] == [
        {"ar_share": share} for share in (1.0, 0.5, 0.0)
    ]
    sampler = report["settings"]["samples"]["sampler"] if "settings" in report else None
    assert sampler is None or sampler["ar_model"] == causal.fingerprint
    figures = [point["figures"]["fid"] for point in report["points"]]
    assert len(set(figures)) == 3
    alone = run(files, *arguments, "--ar_share=0.5", out="y.json")
    assert alone["figures"]["fid"] == figures[1]
    monkeypatch.setattr(ImageGenerator, "from_checkpoint", lambda workdir, **_: generator)
    assert "ar_share: there is no causal model" in refuse_out(files, *arguments, "--ar_share=0.5")


def refuse_out(files, *arguments):
    with pytest.raises(SystemExit) as caught:
        run(files, *arguments, out="z.json")
    return str(caught.value.code)
