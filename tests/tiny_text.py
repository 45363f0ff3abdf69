"""Small real text encoders in the layout of Hugging Face: a trained tokenizer, random weights."""

import json
import pathlib

import numpy as np
import tiny
import tokenizers
from PIL import Image
from safetensors.numpy import save_file

from maskgil_jax.convert import export_state_dict, find_family
from maskgil_jax.models.chameleon import ChameleonConfig
from maskgil_jax.text.gemma import GemmaConfig
from maskgil_jax.text.image_protocol import END, END_TURN, NEW_LINE, START, size_name

SENTENCES = [
    f"a {colour} {digit} {place} a {other} {thing}"
    for colour, other in (("red", "green"), ("blue", "yellow"))
    for digit in ("seven", "three", "zero")
    for place in ("left of", "right of", "above", "below")
    for thing in ("photo of a dog", "bicycle", "café table", "two apples")
]
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]


def make_tokenizer_file(path: pathlib.Path, *, end: bool = False) -> pathlib.Path:
    """Train a BPE tokenizer as Gemma's; of T5's habit to end every prompt if `end`."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    library.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    library.decoder = tokenizers.decoders.Replace("▁", " ")
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=60, special_tokens=SPECIAL, show_progress=False
    )
    library.train_from_iterator(SENTENCES, trainer)
    if end:
        library.post_processor = tokenizers.processors.TemplateProcessing(
            single="$A <eos>", special_tokens=[("<eos>", 1)]
        )
    # What files of the hub may ask for, and encoders here must not take over.
    library.enable_truncation(3)
    library.enable_padding(length=50, direction="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    library.save(str(path))
    return path


def gemma_config(generation: int = 2, **fields) -> GemmaConfig:
    sizes = dict(vocab_size=128, num_layers=3, width=24, mlp_width=40, num_heads=4)
    sizes |= dict(num_kv_heads=2, head_dim=8, max_positions=64)
    if generation == 2:
        sizes |= dict(query_scalar=5, attention_softcap=20.0, sliding_window=6)
    return GemmaConfig(**{"generation": generation, **sizes, **fields})


def chameleon_config(**fields) -> ChameleonConfig:
    sizes = dict(vocab_size=90, num_layers=3, width=24, mlp_width=40, num_heads=6)
    return ChameleonConfig(**{**sizes, "num_kv_heads": 2, "max_positions": 200, **fields})


def make_params(config: GemmaConfig | ChameleonConfig) -> dict:
    """Draw parameters that bfloat16 and float32 hold alike."""
    from flax.traverse_util import unflatten_dict

    family, rng = find_family(family_of(config)), np.random.default_rng(0)
    leaves = {
        path: (rng.integers(-64, 64, leaf.shape) / 256).astype(leaf.dtype)
        for path, leaf in family.abstract_tree(config).items()
    }
    return unflatten_dict(leaves, sep="/")


def family_of(config: GemmaConfig | ChameleonConfig) -> str:
    if isinstance(config, ChameleonConfig):
        return config.family
    return "gemma" if config.generation == 1 else "gemma2"


def write_repository(folder: pathlib.Path, config: GemmaConfig, shards: int = 1) -> pathlib.Path:
    """Write what google/gemma-2b holds; return the file to import."""
    folder.mkdir(parents=True)
    state = export_state_dict(family_of(config), config, make_params(config))
    state = {f"model.{key}": value for key, value in state.items()}
    settings = config.to_hugging_face() | {"architectures": ["GemmaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(settings))
    make_tokenizer_file(folder / "tokenizer.json")
    return write_shards(folder, state, shards)


def write_shards(folder: pathlib.Path, state: dict, shards: int) -> pathlib.Path:
    """Write weights in one file, or in several with an index; return the file to import."""
    if shards == 1:
        save_file(state, folder / "model.safetensors")
        return folder / "model.safetensors"
    weight_map, names = {}, sorted(state)
    for i in range(shards):
        shard = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = names[i::shards]
        save_file({key: state[key] for key in part}, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def image_vocabulary(codes: int = 16, units: int = 3) -> dict[str, int]:
    """Names and ids of a vocabulary as Lumina-mGPT's; its codes are in no order."""
    order = np.random.default_rng(0).permutation(codes)
    letters = str.maketrans("0123456789", "ABCDEFGHIJ")
    names = ["<s>", "<pad>", "</s>", "<unk>"]
    names += [f"IMGIMG{str(code).translate(letters)}Z" for code in order]
    names += [END, START, END_TURN, NEW_LINE, *(size_name(n + 1) for n in range(units))]
    return {name: number for number, name in enumerate(names)}


def make_image_tokenizer(path: pathlib.Path, names: dict[str, int]) -> pathlib.Path:
    """Write a `tokenizer.json` with such a vocabulary, and some words behind it."""
    words = ["an", "a", "dog", "cat", "red", "image", "of", "to", "the", ":"]
    words += ["Generate", "according", "following", "prompt"]
    special = [name for name in names if name.startswith("<")]
    vocabulary = names | {word: max(names.values()) + 1 + i for i, word in enumerate(words)}
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.add_special_tokens(special)
    path.parent.mkdir(parents=True, exist_ok=True)
    library.save(str(path))
    return path


def make_lumina_dir(path: pathlib.Path, **fields) -> pathlib.Path:
    """Write a model directory of a Lumina-mGPT that draws 32 codes, with random weights."""
    import jax

    from maskgil_jax.checkpoints import write_model_dir

    config, rng = chameleon_config(**fields), np.random.default_rng(1)
    file = make_image_tokenizer(
        path.parent / f"{path.name}_names" / "tokenizer.json", image_vocabulary(32, units=32)
    )
    params = jax.tree.map(
        lambda x: x + rng.standard_normal(x.shape).astype(x.dtype), make_params(config)
    )
    write_model_dir(
        path,
        kind="language-model",
        family=config.family,
        config=config.to_dict(),
        params=params,
        files=[file],
    )
    return path


def write_chameleon(folder: pathlib.Path, config: ChameleonConfig, shards: int = 1) -> pathlib.Path:
    """Write what a repository of Lumina-mGPT holds; return the file to import."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_hugging_face()))
    make_image_tokenizer(folder / "tokenizer.json", image_vocabulary())
    return write_shards(folder, export_state_dict("chameleon", config, make_params(config)), shards)


def make_gemma_dir(path: pathlib.Path, generation: int = 2) -> pathlib.Path:
    """Write a model directory of a Gemma of width 24 that reads up to 64 tokens."""
    from maskgil_jax.checkpoints import write_model_dir

    config = gemma_config(generation)
    file = make_tokenizer_file(path.parent / f"{path.name}_words" / "tokenizer.json")
    write_model_dir(
        path,
        kind="text-encoder",
        family=config.family,
        config=config.to_dict(),
        params=make_params(config),
        files=[file],
    )
    return path


def make_featured_inputs(folder: pathlib.Path, sizes: list, texts: list) -> pathlib.Path:
    """Write `tokenizer`, `gemma1`, `gemma2`, and `pictures` of sizes (w, h) with their texts."""
    tiny.make_tokenizer_dir(folder / "tokenizer")
    for generation in (1, 2):
        make_gemma_dir(folder / f"gemma{generation}", generation)
    (folder / "pictures").mkdir()
    lines = []
    for i, (size, text) in enumerate(zip(sizes, texts, strict=True)):
        picture = Image.new("RGB", size, (20 * i, 0, 0))
        picture.save(folder / "pictures" / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "caption": text}))
    (folder / "pictures" / "metadata.jsonl").write_text("\n".join(lines))
    return folder
