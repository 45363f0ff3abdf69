"""Write image folders as GenEval reads them, and read its results into a row of a table.

    python tools/geneval.py generate --workdir RUN --metadata evaluation_metadata.jsonl --out IMAGES
    python evaluation/evaluate_images.py IMAGES --outfile results.jsonl --model-path MODELS
    python tools/geneval.py table --results results.jsonl --name MaskGIL [--json scores.json]

The second command is the official program, of github.com/djghosh13/geneval (it needs an NVIDIA GPU
and mmdetection), as is `prompts/evaluation_metadata.jsonl`, whose 553 prompts the images are of.
The figures are those of its `evaluation/summary_scores.py`: of each tag the share of correct
images, and overall the mean of the six tags. That one averages whatever is in the file; here images
that are missing, or there twice, are an error. `--metadata FILE` is for other prompts.
"""

import argparse
import collections
import dataclasses
import functools
import hashlib
import json
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from maskgil_jax import cli, loading, pictures
from maskgil_jax.build.sizes import check_size
from maskgil_jax.checkpoints import write_text_atomically
from maskgil_jax.decoding import masked
from maskgil_jax.generator import ImageGenerator
from maskgil_jax.workdir import LOCK, lock

# Tag of GenEval, heading in the paper's Table 4, prompts in the official file.
TAGS = {
    "single_object": ("single obj.", 80),
    "two_object": ("two obj.", 99),
    "counting": ("counting", 80),
    "colors": ("colors", 94),
    "position": ("position", 100),
    "color_attr": ("color attri.", 100),
}
SETTINGS = "settings.json"
_IMAGE = re.compile(r"(?:^|/)(\d+)/samples/(\d+)\.png$")

# (number of the first image, prompts of it and the next ones) → as many images, uint8 [b H W 3].
# Images are numbered through all prompts and their samples; an image depends on its number and its
# prompt, so that neither batches nor a resumption change it.
Make = Callable[[int, Sequence[str]], np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """A line of `evaluation_metadata.jsonl`.

    Attributes:
      tag: one of `TAGS`.
      prompt: what to draw.
      record: the whole line, which the official program wants beside the images.
    """

    tag: str
    prompt: str
    record: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """What the official program found.

    Attributes:
      images, prompts: how many were judged.
      shares: of each tag, the share of correct images.
    """

    images: int
    prompts: int
    shares: Mapping[str, float]

    @property
    def overall(self) -> float:
        """Mean of the six tags, whatever their numbers of prompts."""
        return float(np.mean(list(self.shares.values())))

    def to_dict(self) -> dict[str, Any]:
        """Return what goes into the JSON."""
        return {
            "images": self.images,
            "prompts": self.prompts,
            "overall": self.overall,
            **self.shares,
        }

    def to_markdown(self, name: str) -> str:
        """Return a table of one row, in the shape of Table 4."""
        headings = ["model", "overall ↑", *(heading for heading, _ in TAGS.values())]
        values = [self.overall, *(self.shares[tag] for tag in TAGS)]
        cells = [name.replace("|", r"\|"), *(f"{value:.2f}" for value in values)]
        lines = [headings, ["---"] * len(headings), cells]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def read_prompts(path: pathlib.Path) -> list[Prompt]:
    """Read `evaluation_metadata.jsonl`.

    Raises:
      ValueError: the file is empty, or a line is no JSON object with a known tag and a prompt.
    """
    prompts = []
    for where, record in _read_lines(path):
        tag, prompt = record.get("tag"), record.get("prompt")
        if tag not in TAGS or not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(
                f"{where}: tag {tag!r} and prompt {prompt!r}; expected a text, and a tag of "
                f"{', '.join(TAGS)}"
            )
        prompts.append(Prompt(tag=tag, prompt=prompt, record=record))
    return prompts


def write_images(
    metadata: pathlib.Path,
    out: pathlib.Path,
    make: Make,
    *,
    samples: int = 4,
    batch_size: int = 16,
    settings: Mapping[str, Any],
) -> int:
    """Write `<prompt:05>/samples/<sample:04>.png` and `metadata.jsonl` for every prompt.

    Stopped and called again, it makes what is missing.

    Args:
      metadata: the prompts, `evaluation_metadata.jsonl`.
      out: folder, new or of the same job.
      make: makes images of prompts.
      samples: images of each prompt; officially 4.
      batch_size: images at a time, at most; of no influence on them.
      settings: what else the images depend on, as JSON: model, seed, size, guidance.

    Returns:
      How many images were made; the others were there.

    Raises:
      ValueError: wrong prompts, samples or batch size; the folder holds something else, or images
        of other settings; or `make` returns something else than images for its prompts.
    """
    if samples < 1 or batch_size < 1:
        raise ValueError(f"samples = {samples}, batch_size = {batch_size}; give at least 1 of each")
    prompts = read_prompts(metadata)
    job = {
        "metadata_sha256": hashlib.sha256(metadata.read_bytes()).hexdigest(),
        "samples": samples,
        **settings,
    }
    out.mkdir(parents=True, exist_ok=True)
    with lock(out, "--out"):
        _claim(out, json.loads(json.dumps(job)))
        for index, prompt in enumerate(prompts):
            file = out / f"{index:05}" / "metadata.jsonl"
            if not file.exists():
                write_text_atomically(file, json.dumps(prompt.record) + "\n")
        made = 0
        files = [
            out / f"{index:05}" / "samples" / f"{sample:04}.png"
            for index in range(len(prompts))
            for sample in range(samples)
        ]
        missing = [number for number, file in enumerate(files) if not file.exists()]
        for first, count in _runs(missing, batch_size):
            numbers = range(first, first + count)
            texts = [prompts[number // samples].prompt for number in numbers]
            images = np.asarray(make(first, texts))
            if len(images) != count or images.dtype != np.uint8 or images.ndim != 4:
                raise ValueError(
                    f"made {images.dtype} {list(images.shape)} for {count} prompts; expected "
                    f"uint8 [{count} H W 3]"
                )
            for number, image in zip(numbers, images, strict=True):
                pictures.save_png(files[number], image)
            made += count
    return made


def _claim(out: pathlib.Path, job: Mapping[str, Any]) -> None:
    """Make the folder this job's, or see that it is."""
    file = out / SETTINGS
    if not file.exists():
        others = [path.name for path in out.iterdir() if path.name != LOCK]
        if others:
            raise ValueError(
                f"{out} holds {sorted(others)[0]} and no {SETTINGS}: it is not a folder of this "
                "tool; choose another --out"
            )
        write_text_atomically(file, json.dumps(job, indent=2) + "\n")
        return
    try:
        old = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: {error}; choose another --out") from None
    differ = [
        f"{name} was {old.get(name)!r}, is {job.get(name)!r}"
        for name in sorted(old.keys() | job.keys())
        if old.get(name) != job.get(name)
    ]
    if differ:
        raise ValueError(f"{out} is of other settings: {'; '.join(differ)}; choose another --out")


def _runs(numbers: Iterable[int], size: int) -> Iterator[tuple[int, int]]:
    """Put numbers that follow each other together, at most `size`: (first, count)."""
    first, count = 0, 0
    for number in numbers:
        if count and (number != first + count or count == size):
            yield first, count
            count = 0
        first = first if count else number
        count += 1
    if count:
        yield first, count


def read_results(path: pathlib.Path, prompts: Sequence[Prompt] | None = None) -> Scores:
    """Read `results.jsonl` of the official program.

    Args:
      path: the file, one JSON object per image.
      prompts: those that were judged; by default as many of each tag as the official file has.

    Raises:
      ValueError: a line is not as the program writes it, an image is there twice, a tag is missing
        or unknown, or there are not as many images of every prompt, for every prompt.
    """
    correct: dict[str, list[bool]] = {tag: [] for tag in TAGS}
    seen: dict[str, str] = {}
    samples: collections.Counter[tuple[str, int]] = collections.Counter()
    for where, record in _read_lines(path):
        name, tag, value = record.get("filename"), record.get("tag"), record.get("correct")
        if tag not in TAGS:
            raise ValueError(f"{where}: tag {tag!r}; allowed: {', '.join(TAGS)}")
        if not isinstance(value, bool):
            raise ValueError(f"{where}: correct is {value!r}; expected true or false")
        match = _IMAGE.search(name.replace("\\", "/")) if isinstance(name, str) else None
        if match is None:
            raise ValueError(f"{where}: filename {name!r}; expected <prompt>/samples/<sample>.png")
        image = f"{int(match[1]):05}/{int(match[2]):04}"
        if image in seen:
            raise ValueError(f"{where}: {name} is there already, at {seen[image]}")
        seen[image] = where
        if prompts is not None:
            index = int(match[1])
            if index >= len(prompts) or prompts[index].tag != tag:
                wanted = prompts[index].tag if index < len(prompts) else f"only {len(prompts)}"
                raise ValueError(f"{where}: prompt {index} is of {tag}; the metadata has {wanted}")
        correct[tag].append(value)
        samples[tag, int(match[1])] += 1
    _check_counts(path, samples, prompts)
    return Scores(
        images=len(seen),
        prompts=len(samples),
        shares={tag: float(np.mean(values)) for tag, values in correct.items()},
    )


def _check_counts(
    path: pathlib.Path,
    samples: Mapping[tuple[str, int], int],
    prompts: Sequence[Prompt] | None,
) -> None:
    """Refuse results in which prompts are missing or have fewer images than others."""
    found = collections.Counter(tag for tag, _ in samples)
    if missing := [tag for tag in TAGS if not found[tag]]:
        raise ValueError(f"{path}: no images of {', '.join(missing)}; the score is a mean of all")
    expected = {tag: count for tag, (_, count) in TAGS.items()}
    if prompts is not None:
        expected = collections.Counter(prompt.tag for prompt in prompts)
    wrong = [
        f"{found[tag]} of {tag} instead of {expected[tag]}"
        for tag in TAGS
        if found[tag] != expected[tag]
    ]
    if wrong:
        raise ValueError(
            f"{path}: prompts are {'; '.join(wrong)}. Judge all of them, or give the --metadata "
            "that they are of"
        )
    most = max(samples.values())
    few = [(tag, index) for (tag, index), count in samples.items() if count != most]
    if few:
        tag, index = few[0]
        raise ValueError(
            f"{path}: {len(few)} prompts have fewer images than the {most} of others, such as "
            f"prompt {index} ({tag}) with {samples[few[0]]}"
        )


def _read_lines(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give where each line is, and its JSON object; at least one."""
    empty = True
    # Not by `splitlines` of a text: what JSON writes as it is may be a line break to that.
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        empty = False
        try:
            record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        if not isinstance(record, dict):
            shown = line.decode()[:40]
            raise ValueError(f"{path}, line {number}: expected a JSON object, not {shown!r}")
        yield f"{path}, line {number}", record
    if empty:
        raise ValueError(f"{path} is empty")


def generate(arguments: argparse.Namespace) -> None:
    """Write the images of a trained model."""
    run = pathlib.Path(arguments.workdir)
    model = loading.load_model(run)
    generator = ImageGenerator(
        model,
        loading.open_tokenizer(model, run, arguments.tokenizer),
        text_encoder=loading.open_text_encoder(model, run, arguments.text_encoder),
        batch_size=arguments.batch_size,
    )
    # All that may be wrong, before there is a folder of these settings.
    masked.check_seed(arguments.seed)
    generator.check_prompts([prompt.prompt for prompt in read_prompts(arguments.metadata)])
    size = None if arguments.size is None else cli.parse_size(arguments.size)
    grid_size = None
    if size is not None:
        check_size(model.run, size)
        grid_size = generator.tokenizer.spec.grid_size(*size)
    changes = {
        name: getattr(arguments, name)
        for name in ("num_steps", "guidance_scale")
        if getattr(arguments, name) is not None
    }
    make = functools.partial(generator, seed=arguments.seed, size=size, **changes)
    encoder = generator.text_encoder
    settings = {
        "model": model.fingerprint,
        "tokenizer": generator.tokenizer.fingerprint,
        "text_encoder": None if encoder is None else encoder.fingerprint,
        "seed": arguments.seed,
        "size": size,
        "sampler": dataclasses.asdict(generator.sampler(grid_size, **changes)),
    }
    made = write_images(
        arguments.metadata,
        arguments.out,
        lambda first, prompts: make(prompts=prompts, first_index=first),
        samples=arguments.samples,
        batch_size=arguments.batch_size,
        settings=settings,
    )
    print(f"{arguments.out}: {made} images made")


def make_table(arguments: argparse.Namespace) -> None:
    """Print the row; write the JSON if asked."""
    prompts = None if arguments.metadata is None else read_prompts(arguments.metadata)
    scores = read_results(arguments.results, prompts)
    if arguments.json is not None:
        named = {"name": arguments.name, **scores.to_dict()}
        write_text_atomically(arguments.json, json.dumps(named) + "\n")
    print(scores.to_markdown(arguments.name))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    images = commands.add_parser("generate", help="a trained model's images -> GenEval's folders")
    add = images.add_argument
    add("--workdir", required=True, help="run or model directory of a text-conditional model")
    add("--metadata", type=pathlib.Path, required=True, help="evaluation_metadata.jsonl")
    add("--out", type=pathlib.Path, required=True, help="folder to write, or to go on with")
    add("--samples", type=int, default=4, help="images of each prompt; officially 4")
    add("--seed", type=int, default=0, help="of all images")
    add("--size", help="HxW in pixels; default: as trained")
    add("--num_steps", type=int, help="default: the run's")
    add("--guidance_scale", type=float, help="default: the run's")
    add("--batch_size", type=int, default=16, help="images at a time")
    add("--tokenizer", help="instead of the run's")
    add("--text_encoder", help="instead of the run's")
    images.set_defaults(run=generate)
    table = commands.add_parser("table", help="results of the official program -> Table 4's row")
    add = table.add_argument
    add("--results", type=pathlib.Path, required=True, help="results.jsonl of evaluate_images.py")
    add("--metadata", type=pathlib.Path, help="the prompts, if they are not the official ones")
    add("--name", default="model", help="what the row is called")
    add("--json", type=pathlib.Path, help="file for the figures in full")
    table.set_defaults(run=make_table)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status."""
    arguments = build_parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
