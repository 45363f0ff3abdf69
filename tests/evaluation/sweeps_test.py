"""Sweeps are read with the sampler's types; tables and plots show what a report holds."""

import pytest
from PIL import Image

from maskgil_jax.evaluation import sweeps


def make_report(sweep):
    points = [
        {
            "swept": swept,
            "figures": {"fid": 10.0 + number, "is": 5.0, "is_std": 0.25, "novelty": 1.5},
            "notes": [],
        }
        for number, swept in enumerate(sweeps.grid(sweep))
    ]
    return {"protocol": {"name": "val", "num_images": 1000}, "sweep": sweep, "points": points}


def test_a_sweep_is_all_combinations():
    varied = sweeps.parse_sweeps(["guidance_scale=1,1.5", "schedule=root,arccos"], {"top_k": 3})
    assert varied == {"guidance_scale": [1.0, 1.5], "schedule": ["root", "arccos"]}
    assert sweeps.grid(varied)[:2] == [
        {"guidance_scale": 1.0, "schedule": "root"},
        {"guidance_scale": 1.0, "schedule": "arccos"},
    ]
    assert sweeps.grid({}) == [{}]
    assert sweeps.parse_sweeps(["halton_roll=true,false"], {}) == {"halton_roll": [True, False]}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["num_steps"], "write field=value,value, such as num_steps=4,8"),
        (["steps=4"], "sampler setting 'steps' is unknown; .* 'num_steps'"),
        (["num_steps=4,"], "num_steps=: '' is no int"),
        (["num_steps=4,4"], "gives a value twice"),
        (["num_steps=4", "num_steps=8"], "two --sweep vary num_steps; give all its values in one"),
        (["guidance_scale=nan"], "guidance_scale=nan: give a finite number"),
        (["top_k=1,2"], "--top_k is given and --sweep 'top_k=1,2' varies it; give one of them"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(texts, message):
    with pytest.raises(ValueError, match=message):
        sweeps.parse_sweeps(texts, {"top_k": 5})


def test_a_table_has_a_row_for_each_point():
    table = sweeps.make_table(make_report({"num_steps": [4, 8]}))
    assert table.splitlines() == [
        "| protocol | num_steps | images | fid ↓ | is ↑ | novelty |",
        "|---|---|---|---|---|---|",
        "| val | 4 | 1,000 | 10.00 | 5.000 ± 0.250 | 1.500 |",
        "| val | 8 | 1,000 | 11.00 | 5.000 ± 0.250 | 1.500 |",
    ]
    single = {"protocol": {"name": "adm", "num_images": 50_000}, "figures": {"fid": 3.7116}}
    assert sweeps.make_table(single).splitlines()[2] == "| adm | 50,000 | 3.712 |"


def test_a_plot_has_a_row_for_each_number_that_varies(tmp_path):
    pytest.importorskip("matplotlib")
    one = make_report({"num_steps": [8, 4], "schedule": ["root", "arccos"]})
    two = make_report({"guidance_scale": [1.0, 2.0], "num_steps": [4, 8]})
    sizes = []
    for name, report in (("one", one), ("two", two)):
        sweeps.check_plot(tmp_path / f"{name}.png", report["sweep"])
        sweeps.draw(report, tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as image:
            sizes.append(image.size)
    assert sizes[1] == (sizes[0][0], 2 * sizes[0][1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.png", "two.png"]


def test_a_plot_that_cannot_be_is_refused_at_once(monkeypatch):
    with pytest.raises(ValueError, match="needs a --sweep over a number"):
        sweeps.check_plot("x.png", {"schedule": ["root"]})
    with pytest.raises(ValueError, match=r"allowed are FILE.png, FILE.svg and FILE.pdf"):
        sweeps.check_plot("x.gif", {"num_steps": [4]})
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ValueError, match="of the extra plots"):
        sweeps.check_plot("x.png", {"num_steps": [4]})
    sweeps.check_plot(None, {})
