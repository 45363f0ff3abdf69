"""The tool that measures fusion: calls of models, figures and times by share."""

import json

import pytest
import tiny

from maskgil_jax import ImageGenerator
from tools import measure_fusion

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def fused(tmp_path, monkeypatch):
    """A small pair of models in place of what is loaded, and figures that are made up."""
    directory = tiny.make_tokenizer_dir(tmp_path / "vq")
    causal = tiny.make_generator(directory, "llamagen").model
    made = tiny.make_generator(directory, ar_model=causal)
    monkeypatch.setattr(ImageGenerator, "from_checkpoint", lambda workdir, **_: made)

    def evaluate(out, *, sweep, **_):
        shares = [float(share) for share in sweep[0].removeprefix("ar_share=").split(",")]
        points = [{"figures": {"fid": 10 + share, "novelty": 1.0}} for share in shares]
        return {"points": points}

    monkeypatch.setattr(measure_fusion, "evaluate", evaluate)
    return made


def test_a_row_for_every_share(fused, tmp_path, capsys):
    measure_fusion.main(
        [
            "--workdir=w",
            "--ar_checkpoint=a",
            f"--out={tmp_path / 'x.json'}",
            f"--plot={tmp_path / 'x.png'}",
            "--shares=1,0.5,0",
            "--batch_sizes=2",
            "--repeats=1",
        ]
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| AR share | steps | fid | ms/image, batch 2 |"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    # 16 tokens, and 2 steps of the masked model.
    assert [row[:3] for row in cells] == [
        ["100%", "16", "11.000"],
        ["50%", "10", "10.500"],
        ["0%", "2", "10.000"],
    ]
    rows = json.loads((tmp_path / "x.timed.json").read_text())
    assert all(row["seconds"]["2"] > 0 for row in rows)
    assert (tmp_path / "x.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--repeats=0", "error: --repeats 0 must be at least 1"),
        ("--batch_sizes=4,0", r"error: --batch_sizes \[4, 0\] must be one or more, each at least"),
    ],
)
def test_times_that_cannot_be_taken_are_refused_at_once(tmp_path, monkeypatch, flag, message):
    def never(*_, **__):
        raise AssertionError("measured first")

    monkeypatch.setattr(measure_fusion, "evaluate", never)
    with pytest.raises(SystemExit, match=message):
        measure_fusion.main(["--workdir=w", "--ar_checkpoint=a", f"--out={tmp_path / 'x'}", flag])


def test_bad_shares_end_in_one_line(fused, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("share 2.0 of the tokens is out of range; allowed: 0 to 1")

    monkeypatch.setattr(measure_fusion, "evaluate", refuse)
    arguments = ["--workdir=w", "--ar_checkpoint=a", f"--out={tmp_path / 'x.json'}", "--shares=2"]
    with pytest.raises(SystemExit, match="error: share 2.0 of the tokens is out of range"):
        measure_fusion.main(arguments)
