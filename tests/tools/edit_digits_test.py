"""Trials and boxes that cannot be are refused before a model is loaded; the picture is two rows."""

import json
import re

import numpy as np
import pytest
from PIL import Image

import maskgil_jax
from maskgil_jax import pictures
from maskgil_jax.data.digits import digits_arrays
from tools import edit_digits

HELD_OUT = 297


class Repainter:
    """Stands for a generator; the marked part becomes white, and tokens are blocks of 4 pixels."""

    def __init__(self):
        self.model = self.tokenizer = self
        self.config, self.spec = self, self
        self.num_classes, self.downsample_factor = 10, 4

    def encode(self, images):
        return images[:, ::4, ::4, 0].astype(np.int32)

    def edit(self, images, masks, labels, *, grow, seed, **settings):
        made = np.where(masks[..., None], np.uint8(255), images)
        return maskgil_jax.generator.Generation(images=made, tokens=self.encode(made), trace=None)


def load_nothing(*arguments, **options):
    raise AssertionError("loaded before the arguments were checked")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_trials=0"], "--num_trials 0 is out of range; allowed: 4 to 297, the number of"),
        (["--num_trials=3"], "--num_trials 3 is out of range; allowed: 4 to 297"),
        (["--num_trials=298"], "--num_trials 298 is out of range; allowed: 4 to 297"),
        (["--shown=0"], "--shown 0 is out of range; allowed: 1 or more"),
        (["--box=4,4,4,28"], "--box 4,4,4,28 is empty; TOP is less than BOTTOM"),
        (["--box=4,28,28,4"], "--box 4,28,28,4 is empty"),
        (["--box=4,4,33,28"], "--box 4,4,33,28 reaches outside the image; allowed: within 0,0,32"),
        (["--box=0,0,32,33"], "--box 0,0,32,33 reaches outside the image"),
        (["--box=-1,0,32,32"], "--box -1,0,32,32 reaches outside the image"),
        (["--box=0,-4,32,32"], "--box 0,-4,32,32 reaches outside the image"),
    ],
)
def test_bad_requests_are_refused_before_a_model_is_loaded(monkeypatch, arguments, message):
    monkeypatch.setattr(maskgil_jax.ImageGenerator, "from_checkpoint", load_nothing)
    with pytest.raises(SystemExit, match=rf"^error: {re.escape(message)}"):
        edit_digits.main(["--workdir=nowhere", *arguments])


@pytest.mark.parametrize("text", ["", "1,2,3", "1,2,3,4,5", "a,b,c,d", "1.5,2,3,4"])
def test_boxes_that_are_not_four_numbers_are_refused(text, capsys):
    with pytest.raises(SystemExit):
        edit_digits.main(["--workdir=nowhere", f"--box={text}"])
    assert f"{text!r} is no box; write TOP,LEFT,BOTTOM,RIGHT" in capsys.readouterr().err


@pytest.mark.parametrize("num_trials", ["4", str(HELD_OUT)])
@pytest.mark.parametrize("box", ["0,1,32,32", "31,31,32,32"])
def test_what_is_at_the_edge_is_allowed(monkeypatch, num_trials, box):
    monkeypatch.setattr(maskgil_jax.ImageGenerator, "from_checkpoint", load_nothing)
    with pytest.raises(AssertionError, match="loaded"):
        edit_digits.main(["--workdir=nowhere", f"--num_trials={num_trials}", f"--box={box}"])


@pytest.mark.parametrize(("shown", "columns"), [(16, 5), (2, 2)])
def test_originals_are_above_the_results(monkeypatch, tmp_path, capsys, shown, columns):
    monkeypatch.setattr(
        maskgil_jax.ImageGenerator, "from_checkpoint", lambda *arguments, **options: Repainter()
    )
    out = tmp_path / "edits.png"
    edit_digits.main(
        ["--workdir=x", "--num_trials=5", "--box=8,8,24,32", f"--shown={shown}", f"--out={out}"]
    )
    report = json.loads(capsys.readouterr().out)
    assert (report["trials"], report["marked_tokens"]) == (5, 4 * 6)
    assert report["changed_tokens_outside"] == report["changed_pixels_outside"] == 0
    picture = np.asarray(Image.open(out))
    originals = digits_arrays("test")[0][np.random.default_rng(0).choice(HELD_OUT, 5, False)]
    whitened = originals.copy()
    whitened[:, 8:24, 8:32] = 255
    rows = np.concatenate([originals[:columns], whitened[:columns]])
    np.testing.assert_array_equal(picture, pictures.make_grid(rows, columns=columns, scale=2))
    height, width = picture.shape[:2]
    assert width / height == pytest.approx(columns / 2, rel=0.1)
