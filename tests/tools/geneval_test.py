"""GenEval's folders and results: as its own program reads and writes them."""

import json
import re
import statistics

import numpy as np
import pytest
import tiny
from PIL import Image

from tools import geneval

# As in the official evaluation_metadata.jsonl, one of each tag.
RECORDS = [
    {
        "tag": "single_object",
        "include": [{"class": "bench", "count": 1}],
        "prompt": "a photo of a bench",
    },
    {
        "tag": "two_object",
        "include": [{"class": "bench", "count": 1}, {"class": "sports ball", "count": 1}],
        "prompt": "a photo of a bench and a sports ball",
    },
    {
        "tag": "counting",
        "include": [{"class": "clock", "count": 2}],
        "exclude": [{"class": "clock", "count": 3}],
        "prompt": "a photo of two clocks",
    },
    {
        "tag": "colors",
        "include": [{"class": "fire hydrant", "count": 1, "color": "blue"}],
        "prompt": "a photo of a blue fire hydrant",
    },
    {
        "tag": "position",
        "include": [
            {"class": "teddy bear", "count": 1},
            {"class": "dog", "count": 1, "position": ["right of", 0]},
        ],
        "prompt": "a photo of a dog right of a teddy bear",
    },
    {
        "tag": "color_attr",
        "include": [
            {"class": "wine glass", "count": 1, "color": "purple"},
            {"class": "apple", "count": 1, "color": "black"},
        ],
        "prompt": "a photo of a purple wine glass and a black apple",
    },
]
SETTINGS = {"model": "tiny", "seed": 0, "size": [8, 6]}


def make(first, prompts):
    """Images that tell their number and prompt."""
    images = np.zeros((len(prompts), 8, 6, 3), np.uint8)
    for offset, prompt in enumerate(prompts):
        images[offset] = (first + offset, len(prompt), 7)
    return images


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def metadata(tmp_path):
    return write_lines(tmp_path / "evaluation_metadata.jsonl", RECORDS)


def contents(out):
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name != "LOCK"
    }


def write(metadata, out, make=make, **changes):
    options = {"samples": 3, "batch_size": 4, "settings": SETTINGS} | changes
    return geneval.write_images(metadata, out, make, **options)


def test_the_folder_is_as_the_official_program_reads_it(metadata, tmp_path):
    out = tmp_path / "images"
    assert write(metadata, out) == 18
    folders = sorted(path.name for path in out.iterdir() if path.is_dir())
    assert folders == [f"{index:05}" for index in range(6)]
    for index, name in enumerate(folders):
        with open(out / name / "metadata.jsonl") as file:
            assert json.load(file) == RECORDS[index]
        images = sorted((out / name / "samples").iterdir())
        assert [image.name for image in images] == ["0000.png", "0001.png", "0002.png"]
        for sample, image in enumerate(images):
            pixels = np.asarray(Image.open(image))
            assert pixels.shape == (8, 6, 3)
            assert tuple(pixels[0, 0]) == (3 * index + sample, len(RECORDS[index]["prompt"]), 7)


def test_a_stopped_job_goes_on_and_ends_the_same(metadata, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    write(metadata, whole)
    asked = []

    def stop(first, prompts):
        asked.append(first)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return make(first, prompts)

    with pytest.raises(KeyboardInterrupt):
        write(metadata, parts, stop)
    (parts / "00000" / "samples" / "0001.png").unlink()
    seen = []

    def note(first, prompts):
        seen.extend(range(first, first + len(prompts)))
        return make(first, prompts)

    assert write(metadata, parts, note, batch_size=5) == 11
    assert seen == [1, *range(8, 18)]
    assert contents(parts) == contents(whole)
    assert write(metadata, parts) == 0


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"samples": 4}, "samples was 3, is 4"),
        ({"settings": SETTINGS | {"seed": 1}}, "seed was 0, is 1"),
        ({"settings": {"model": "tiny"}}, r"seed was 0, is None; size was \[8, 6\]"),
        ({"samples": 0}, "samples = 0"),
        ({"batch_size": 0}, "batch_size = 0"),
    ],
)
def test_other_settings_are_refused(metadata, tmp_path, changes, match):
    out = tmp_path / "images"
    write(metadata, out)
    before = contents(out)
    with pytest.raises(ValueError, match=match):
        write(metadata, out, **changes)
    assert contents(out) == before


def test_other_prompts_and_folders_are_refused(metadata, tmp_path):
    out = tmp_path / "images"
    write(metadata, out)
    write_lines(metadata, RECORDS[:5])
    with pytest.raises(ValueError, match="metadata_sha256 was"):
        write(metadata, out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match=r"thesis.txt and no settings.json"):
        write(metadata, tmp_path / "mine")
    with pytest.raises(ValueError, match=r"made uint8 \[3, 8, 6, 3\] for 4 prompts"):
        write(metadata, tmp_path / "few", lambda first, prompts: make(first, prompts)[1:])


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "is empty"),
        ("{}\n", "line 1: tag None"),
        ('{"tag": "colour", "prompt": "x"}', "tag 'colour'.*single_object"),
        ('{"tag": "colors", "prompt": " "}', "prompt ' '"),
        ('{"tag": "colors"', "line 1"),
        ("[1]", "line 1: expected a JSON object"),
    ],
)
def test_broken_prompts_are_refused(tmp_path, text, match):
    path = tmp_path / "broken.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=match):
        geneval.read_prompts(path)
    with pytest.raises(ValueError, match=match):
        write(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def make_results(samples=2, seed=0):
    """Lines as evaluate_images.py writes them, of as many prompts as the official ones."""
    rng = np.random.default_rng(seed)
    lines, index = [], 0
    for tag, (_, count) in geneval.TAGS.items():
        for _ in range(count):
            for sample in range(samples):
                lines.append(
                    {
                        "filename": f"images/{index:05}/samples/{sample:04}.png",
                        "tag": tag,
                        "prompt": f"prompt {index}",
                        "correct": bool(rng.random() < 0.4),
                        "reason": "",
                        "metadata": json.dumps({"tag": tag, "prompt": f"prompt {index}"}),
                        "details": "{}",
                    }
                )
            index += 1
    rng.shuffle(lines)  # os.listdir has no order
    return lines


def test_scores_are_the_means_of_the_tags(tmp_path):
    lines = make_results()
    scores = geneval.read_results(write_lines(tmp_path / "results.jsonl", lines))
    assert (scores.images, scores.prompts) == (1106, 553)
    by_tag = {
        tag: statistics.mean(line["correct"] for line in lines if line["tag"] == tag)
        for tag in geneval.TAGS
    }
    assert scores.shares == pytest.approx(by_tag)
    assert scores.overall == pytest.approx(statistics.mean(by_tag.values()))
    # Not the mean of the images: tags are of different sizes.
    assert scores.overall != pytest.approx(statistics.mean(x["correct"] for x in lines), abs=1e-6)


def test_the_command_prints_the_row_and_writes_json(tmp_path, capsys):
    lines = make_results()
    for line in lines:
        line["correct"] = line["tag"] in ("single_object", "colors", "position")
    results = write_lines(tmp_path / "results.jsonl", lines)
    out = tmp_path / "scores.json"
    command = ["table", f"--results={results}", "--name=ours", f"--json={out}"]
    assert geneval.main(command) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].startswith("| model | overall ↑ | single obj. | two obj. | counting | colors |")
    assert table[2] == "| ours | 0.50 | 1.00 | 0.00 | 0.00 | 1.00 | 1.00 | 0.00 |"
    assert json.loads(out.read_text()) == {
        "name": "ours",
        "images": 1106,
        "prompts": 553,
        "overall": 0.5,
        "single_object": 1.0,
        "two_object": 0.0,
        "counting": 0.0,
        "colors": 1.0,
        "position": 1.0,
        "color_attr": 0.0,
    }


def test_other_prompts_are_held_against_their_metadata(metadata, tmp_path, capsys):
    lines = [
        {"filename": f"{index:05}/samples/0000.png", "tag": record["tag"], "correct": True}
        for index, record in enumerate(RECORDS)
    ]
    results = write_lines(tmp_path / "results.jsonl", lines)
    assert geneval.main(["table", f"--results={results}"]) == 1
    assert "1 of single_object instead of 80" in capsys.readouterr().err
    command = ["table", f"--results={results}", f"--metadata={metadata}"]
    assert geneval.main(command) == 0
    assert "| model | 1.00 | 1.00 |" in capsys.readouterr().out
    lines[0]["tag"], lines[1]["tag"] = lines[1]["tag"], lines[0]["tag"]
    write_lines(results, lines)
    assert geneval.main(command) == 1
    assert "prompt 0 is of two_object; the metadata has single_object" in capsys.readouterr().err


def without(lines, condition):
    return [line for line in lines if not condition(line)]


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda lines: [], "is empty"),
        (lambda lines: [*lines, lines[5]], r"line 1107: .* is there already, at .*line 6"),
        (
            lambda lines: without(lines, lambda line: line["tag"] == "position"),
            "no images of position",
        ),
        (
            lambda lines: without(lines, lambda line: "/00003/" in line["filename"]),
            "79 of single_object instead of 80",
        ),
        (lambda lines: without(lines, lambda line: line == lines[0]), "1 prompts have fewer"),
        (lambda lines: [lines[0] | {"tag": "colour"}, *lines[1:]], "line 1: tag 'colour'"),
        (lambda lines: [lines[0] | {"correct": "yes"}, *lines[1:]], "correct is 'yes'"),
        (lambda lines: [lines[0] | {"filename": "a.png"}, *lines[1:]], "filename 'a.png'"),
        (lambda lines: [{"tag": "colors", "correct": True}, *lines[1:]], "filename None"),
    ],
)
def test_broken_results_are_refused(tmp_path, spoil, match):
    path = write_lines(tmp_path / "results.jsonl", spoil(make_results()))
    with pytest.raises(ValueError, match=match):
        geneval.read_results(path)


def test_a_missing_file_is_one_line_of_error(tmp_path, capsys):
    assert geneval.main(["table", f"--results={tmp_path / 'none.jsonl'}"]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_a_model_fills_the_folders(tmp_path, monkeypatch, capsys):
    generator = tiny.make_generator(tiny.make_tokenizer_dir(tmp_path / "vq"), "maskgil-text")
    model, tokenizer = generator.model, generator.tokenizer
    monkeypatch.setattr("maskgil_jax.loading.load_model", lambda path: model)
    monkeypatch.setattr("maskgil_jax.loading.open_tokenizer", lambda *args: tokenizer)
    metadata = tmp_path / "evaluation_metadata.jsonl"
    metadata.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    arguments = ["generate", "--workdir=run", f"--metadata={metadata}", f"--out={tmp_path / 'out'}"]
    arguments += ["--samples=2", "--size=16x24", "--num_steps=2", "--batch_size=4"]
    assert geneval.main(arguments) == 0
    assert f"{2 * len(RECORDS)} images made" in capsys.readouterr().out
    with Image.open(tmp_path / "out/00001/samples/0001.png") as image:
        assert image.size == (24, 16)
        expected = generator(
            prompts=[RECORDS[1]["prompt"]], first_index=3, size=(16, 24), num_steps=2
        )
        np.testing.assert_allclose(np.asarray(image, int), expected[0], atol=1, rtol=0)
    assert geneval.main([*arguments, "--guidance_scale=9"]) == 1
    assert "is of other settings: sampler was" in capsys.readouterr().err
    assert geneval.main([*arguments, "--size=20x20"]) == 1
    assert "size 20x20" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "prompt", "match"),
    [
        (["--seed=-1"], "a dog", "seed -1 is out of range"),
        (["--num_steps=99"], "a dog", "num_steps 99 is out of range"),
        ([], "x" * 10_000, "prompt 1 .* of 10,000 characters is longer than the 64 bytes"),
    ],
)
def test_nothing_is_begun_that_cannot_be_finished(
    tmp_path, monkeypatch, capsys, changes, prompt, match
):
    generator = tiny.make_generator(tiny.make_tokenizer_dir(tmp_path / "vq"), "maskgil-text")
    model, tokenizer = generator.model, generator.tokenizer
    monkeypatch.setattr("maskgil_jax.loading.load_model", lambda path: model)
    monkeypatch.setattr("maskgil_jax.loading.open_tokenizer", lambda *args: tokenizer)
    metadata = tmp_path / "evaluation_metadata.jsonl"
    records = [RECORDS[0], RECORDS[1] | {"prompt": prompt}]
    metadata.write_text("".join(json.dumps(record) + "\n" for record in records))
    arguments = ["generate", "--workdir=run", f"--metadata={metadata}", f"--out={tmp_path / 'out'}"]
    assert geneval.main([*arguments, *changes]) == 1
    assert re.search(match, capsys.readouterr().err)
    # A folder of these settings would refuse the mended ones.
    assert not (tmp_path / "out").exists()


def test_lines_end_where_jsonl_says(tmp_path):
    file = tmp_path / "evaluation_metadata.jsonl"
    record = RECORDS[0] | {"prompt": "a dog\u2028and a cat"}
    file.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [prompt.prompt for prompt in geneval.read_prompts(file)] == [record["prompt"]]
    file.write_bytes(b'{"tag": "colors"}\n{"prompt": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=r"line 1: tag 'colors'"):
        geneval.read_prompts(file)
    file.write_bytes(json.dumps(record).encode() + b'\n{"prompt": "caf\xe9"}\n')
    with pytest.raises(ValueError, match="line 2: .*can't decode byte 0xe9"):
        geneval.read_prompts(file)
