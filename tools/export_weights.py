"""Copy the weights of a training run into a model directory.

    python tools/export_weights.py --workdir runs/tokenizer --dst DIR

A model directory is one JSON file and one safetensors file: what the package ships, and what
`tools/convert_checkpoint.py export` turns into PyTorch names. Of a run that averages its
parameters, the average is taken.
"""

import argparse
import sys
from typing import Any

from maskgil_jax import checkpoints, loading, workdir


def export_weights(run_dir: str, dst: str) -> None:
    """Write the newest verified weights of a run to a new model directory.

    Raises:
        FileNotFoundError: if `run_dir` is no run directory or holds no checkpoint.
        FileExistsError: if `dst` holds something.
    """
    run = workdir.read_run_config(run_dir)
    source: dict[str, Any] = {
        "kind": run.kind,
        "seed": run.seed,
        "num_steps": run.training.num_steps,
    }
    if run.kind == "tokenizer":
        tokenizer = loading.load_tokenizer(run_dir)
        family, params = tokenizer.spec.family, tokenizer.params
        config = tokenizer.config.to_dict()
        kind = "tokenizer"
    else:
        model = loading.load_model(run_dir)
        family, config, params = model.config.family, model.config.to_dict(), model.params
        kind = "model"
        if getattr(model.config, "text", None) == "features":
            # Where it lies is of no use elsewhere; which of its features are read, is.
            source["text"] = {name: run.text[name] for name in loading.TEXT_SETTINGS}
    checkpoints.write_model_dir(
        dst, kind=kind, family=family, config=config, params=params, source=source
    )


def main() -> None:
    """Parse the command line and export."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True, help="directory of the run")
    parser.add_argument("--dst", required=True, help="model directory to create")
    arguments = parser.parse_args()
    try:
        export_weights(arguments.workdir, arguments.dst)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {arguments.dst}")


if __name__ == "__main__":
    main()
