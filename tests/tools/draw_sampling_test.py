"""The page on sampling: its pictures are those that the tool draws, and no setting is missing."""

import dataclasses
import re

import numpy as np
import pytest
import tiny

from maskgil_jax import SamplerConfig
from tools import draw_sampling

PAGE = tiny.ROOT / "docs" / "sampling.md"
PICTURES = tiny.ROOT / "docs" / "sampling"


def test_the_page_shows_what_the_tool_draws_and_all_of_it():
    drawn = {f"{name}.png" for name in draw_sampling.DRAWINGS} | {"steps.gif"}
    shown = re.findall(r"!\[[^]]+\]\(sampling/([^)]+)\)", PAGE.read_text())
    assert sorted(shown) == sorted(drawn)
    assert {path.name for path in PICTURES.iterdir()} == drawn
    assert sum(path.stat().st_size for path in PICTURES.iterdir()) < 400_000


def test_the_page_names_every_setting():
    page = PAGE.read_text()
    missing = [f.name for f in dataclasses.fields(SamplerConfig) if f"`{f.name}`" not in page]
    assert not missing


def test_faint_colours_become_grey_and_strong_ones_stay():
    faint = np.array([[[10, 12, 14], [0, 0, 0]]], np.uint8)
    assert draw_sampling.plain(faint).tolist() == [[[12], [0]]]
    both = np.concatenate([faint, [[[130, 40, 129], [200, 200, 202]]]]).astype(np.uint8)
    assert draw_sampling.plain(both).tolist() == [
        [[12, 12, 12], [0, 0, 0]],
        [[130, 40, 129], [201, 201, 201]],
    ]


def test_a_model_of_something_else_is_refused(tmp_path):
    other = tiny.make_generator(tiny.make_tokenizer_dir(tmp_path / "vq"))
    with pytest.raises(ValueError, match="2 classes; give a run of digits"):
        draw_sampling.Studio(other)
