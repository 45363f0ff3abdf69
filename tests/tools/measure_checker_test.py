import json

import jaxtyping
import numpy as np
import pytest

from maskgil_jax.data.canvas_captions import KINDS, heldout_prompts
from maskgil_jax.data.canvases import SIZES
from tools import measure_checker


@pytest.fixture(autouse=True)
def _few_canvases(monkeypatch):
    monkeypatch.setattr("maskgil_jax.report.READER_CANVASES", 250)


def test_canvases_show_what_is_expected_and_no_more():
    for kind in KINDS:
        for index, (_, expectation) in enumerate(heldout_prompts(kind, 9)):
            image, scene = measure_checker.draw_expected(expectation, (0,), index)
            assert image.shape == (*SIZES[index % len(SIZES)], 3)
            assert len(scene.objects) == sum(group.number for group in expectation.groups)
            assert measure_checker.judge_scene(scene, expectation)


def test_prompts_of_others_are_mostly_not_shown():
    (_, first), (_, second) = heldout_prompts("attribute_binding", 2)
    assert first.groups != second.groups
    scene = measure_checker.draw_expected(first, (0,), 0)[1]
    assert not measure_checker.judge_scene(scene, second)


def test_real_canvases_are_passed_and_others_failed(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["measure_checker", "--per_kind=7", "--explain"])
    measure_checker.main()
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert set(result) == {"per_kind", "originals"}
    assert list(result["originals"]) == list(KINDS)
    for shares in result["originals"].values():
        assert set(shares) == {"right", "wrong", "read"}
        assert shares["wrong"] == 1
    rights = [shares["right"] for shares in result["originals"].values()]
    assert np.mean(rights) > 0.85
    # Every picture that was failed is explained.
    assert len(err.splitlines()) == round(sum(7 * (1 - right) for right in rights))


def test_too_few_canvases_are_refused(monkeypatch):
    monkeypatch.setattr("sys.argv", ["measure_checker", "--per_kind=1"])
    with pytest.raises(SystemExit, match="per_kind = 1"):
        measure_checker.main()


class Copier:
    """A tokenizer that loses nothing."""

    def encode(self, images, *, batch_size):
        return images

    def decode(self, tokens, *, batch_size):
        return tokens


def test_rebuilt_images_come_back_in_their_order(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    prompts = heldout_prompts("two_objects", 17)
    canvases = [measure_checker.draw_expected(e, (0,), i) for i, (_, e) in enumerate(prompts)]
    rebuilt = measure_checker.rebuild_canvases(canvases, Copier())
    for image, (original, _) in zip(rebuilt, canvases, strict=True):
        np.testing.assert_array_equal(image, original)
