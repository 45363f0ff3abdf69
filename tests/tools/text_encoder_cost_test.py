import json
import pathlib

import tiny_text

from tools import text_encoder_cost

ROOT = pathlib.Path(__file__).parents[2]


def test_the_documentation_holds_what_the_tool_says(capsys):
    assert text_encoder_cost.main([]) == 0
    said = capsys.readouterr().out.strip()
    assert "google/gemma-2b" in said
    assert said in (ROOT / "docs/text.md").read_text()


def test_a_directory_gives_its_sizes(tmp_path, capsys):
    config = tiny_text.gemma_config(2)
    (tmp_path / "config.json").write_text(json.dumps(config.to_hugging_face()))
    options = ["--model", str(tmp_path), "--tokens", "9", "--hidden_layer", "1"]
    assert text_encoder_cost.main(options) == 0
    theirs = capsys.readouterr().out
    header = {"family": "gemma", "config": config.to_dict()}
    (tmp_path / "config.json").write_text(json.dumps(header))
    assert text_encoder_cost.main(options) == 0
    assert capsys.readouterr().out == theirs
    for changed in (["--tokens", "0"], ["--tokens", "65"], ["--model", str(tmp_path / "gone")]):
        assert text_encoder_cost.main([*options, *changed]) == 1
        assert "error: " in capsys.readouterr().err
