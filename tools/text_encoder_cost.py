"""Say what a text encoder costs in memory and time, from its sizes; nothing is measured or loaded.

    python tools/text_encoder_cost.py
    python tools/text_encoder_cost.py --model DIR --tokens 77 --batch_size 16 --hidden_layer -2

Writes Markdown tables. The times are the least that a device's peak rates allow.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from maskgil_jax.text.costs import estimate_cost
from maskgil_jax.text.gemma import DTYPES, PUBLISHED, GemmaConfig

# Dense matrix products in bfloat16 (operations per second) and memory (bytes per second), as the
# makers publish them.
DEVICES = {
    "NVIDIA H100 SXM": (989e12, 3.35e12),
    "NVIDIA A100 80GB SXM": (312e12, 2.04e12),
    "TPU v4": (275e12, 1.2e12),
    "TPU v5e": (197e12, 0.82e12),
}
GIB = 1 << 30


def read_config(path: Path) -> GemmaConfig:
    """Read the sizes from the `config.json` of a model directory or of Hugging Face.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is of another model.
    """
    file = path / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; give a directory of a Gemma")
    settings = json.loads(file.read_text())
    if settings.get("family") == GemmaConfig.family:
        return GemmaConfig.from_dict(settings["config"])
    return GemmaConfig.from_hugging_face(settings)


def make_tables(
    configs: dict[str, GemmaConfig], *, tokens: int, batch_size: int, hidden_layer: int
) -> str:
    """Return two Markdown tables: memory and operations, and the least times."""
    sizes: dict[str, Any] = dict(tokens=tokens, hidden_layer=hidden_layer)
    lines = [
        f"| model | parameters | in float32 | in bfloat16 | beside, for {batch_size} captions "
        f"(bfloat16) | operations per caption of {tokens} tokens |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, config in configs.items():
        one = {dtype: estimate_cost(config, dtype=dtype, **sizes) for dtype in DTYPES}
        many = estimate_cost(config, batch_size=batch_size, **sizes)
        memory = [f"{one[dtype].parameter_bytes / GIB:.2f} GiB" for dtype in DTYPES]
        lines.append(
            f"| {name} | {one['bfloat16'].parameters:,} | {memory[0]} | {memory[1]} | "
            f"{many.working_bytes / GIB:.2f} GiB | {one['bfloat16'].flops / 1e9:,.0f} GFLOP |"
        )
    lines += ["", f"| at best, in bfloat16 | {' | '.join(DEVICES)} |"]
    lines += ["|---" + "|---:" * len(DEVICES) + "|"]
    for name, config in configs.items():
        for count in (1, batch_size):
            cost = estimate_cost(config, batch_size=count, **sizes)
            times = [
                f"{1e3 * cost.least_seconds(flops_per_second=f, bytes_per_second=b):.1f} ms"
                for f, b in DEVICES.values()
            ]
            captions = "1 caption" if count == 1 else f"{count} captions"
            lines.append(f"| {name}, {captions} | {' | '.join(times)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Print the tables; return the exit status, 1 after a refusal with its reason on stderr."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="directory of a Gemma (default: those of 2B)")
    parser.add_argument("--tokens", type=int, default=120, help="tokens of a caption")
    parser.add_argument("--batch_size", type=int, default=64, help="captions at once")
    parser.add_argument("--hidden_layer", type=int, default=-1, help="layer that features are")
    args = parser.parse_args(arguments)
    try:
        configs = PUBLISHED if args.model is None else {args.model.name: read_config(args.model)}
        print(
            make_tables(
                configs,
                tokens=args.tokens,
                batch_size=args.batch_size,
                hidden_layer=args.hidden_layer,
            )
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
