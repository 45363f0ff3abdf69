import json

import jaxtyping
import numpy as np
import pytest
import tiny_text
import tokenizers

from maskgil_jax.text.prompts import check_texts
from maskgil_jax.text.tokenization import PromptTokenizer


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tiny_text.make_tokenizer_file(tmp_path_factory.mktemp("t") / "tokenizer.json")


def load(file, **options):
    return PromptTokenizer.from_file(
        file, **{"max_length": 30, "vocab_size": 128, "pad_id": 0, "bos_id": 2} | options
    )


def test_prompts_begin_with_bos_and_are_padded_on_the_right(file):
    prompts = ["a red seven left of a green bicycle", "", "a dog"]
    found = load(file)(prompts)
    assert (found.ids.dtype, found.lengths.dtype) == (np.int32, np.int32)
    assert (found.ids.shape, found.lengths.shape) == ((3, 30), (3,))
    library = tokenizers.Tokenizer.from_file(str(file))
    library.no_truncation()
    library.no_padding()
    for row, length, _, prompt in zip(*found, prompts, strict=True):
        assert row[:length].tolist() == [2, *library.encode(prompt).ids]
        assert not row[length:].any()
        assert library.decode(row[1:length].tolist()) == prompt
    assert found.lengths[1] == 1
    alone = load(file)(prompts[2:])
    np.testing.assert_array_equal(alone.ids[0], found.ids[2])


def test_what_is_cut_is_told(file):
    long = "a red seven left of a green bicycle above two yellow apples"
    tokenizer = load(file, max_length=5)
    found = tokenizer([long, "a", long])
    assert found.cut.tolist() == [True, False, True]
    assert found.lengths.tolist() == [5, 2, 5]
    whole = load(file, max_length=60)([long])
    np.testing.assert_array_equal(found.ids[0], whole.ids[0, :5])
    exact = load(file, max_length=int(whole.lengths[0]))([long])
    assert not exact.cut[0]
    assert exact.lengths[0] == whole.lengths[0]


def test_an_end_survives_the_cut(tmp_path):
    file = tiny_text.make_tokenizer_file(tmp_path / "tokenizer.json", end=True)
    tokenizer = load(file, max_length=4, bos_id=None)
    found = tokenizer(["a red seven left of a green bicycle", "a"])
    assert found.cut.tolist() == [True, False]
    assert found.ids[0, -1] == 1
    assert found.ids[1, found.lengths[1] - 1] == 1
    with pytest.raises(ValueError, match="max_length 1 leaves no room .* give at least 2"):
        load(file, max_length=1, bos_id=None)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("a dog", "'a dog' is a single text; give a list of them"),
        ([], "no prompts"),
        (["a", 3], "prompt 1 is a int, 3"),
        (["a", None], "prompt 1 is a NoneType"),
        (["a", b"dog"], "prompt 1 is a bytes"),
        (["caf\udce9"], "prompt 0 .* has half a surrogate pair at character 3"),
    ],
)
def test_what_is_no_prompt_is_refused(prompts, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        check_texts(prompts)


def test_files_that_do_not_belong_are_refused(file, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone.json is missing; copy tokenizer.json"):
        load(tmp_path / "gone.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad.json is no tokenizer of Hugging Face"):
        load(tmp_path / "bad.json")
    count = len(json.loads(file.read_text())["model"]["vocab"])
    load(file, vocab_size=count)
    with pytest.raises(ValueError, match=f"ids up to {count - 1}, but the model knows {count - 1}"):
        load(file, vocab_size=count - 1)
    with pytest.raises(ValueError, match="has no token 127, which the model expects"):
        load(file, bos_id=127)
