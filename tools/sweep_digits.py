"""Measure a digits run at many sampler settings and print a Markdown table.

    python tools/sweep_digits.py --workdir runs/digits \
        --guidance 1,1.5,2 --gumbel 0,4.5,12 --steps 1,4,8,16

Every row is `--num_samples` images with the run's other sampler settings, measured as the run's
last line is. RESULTS.md quotes its output.
"""

import argparse
import itertools
import sys

import jax
import numpy as np

from maskgil_jax import generator, loading
from maskgil_jax.build import models as build
from maskgil_jax.data.digits import digits_arrays
from maskgil_jax.evals.digits import digits_report

COLUMNS = ("agreement", "precision", "recall", "novelty")


def sweep(arguments: argparse.Namespace) -> None:
    """Print the table, a row as soon as it is measured."""
    model = loading.load_model(arguments.workdir)
    tokenizer = loading.load_tokenizer(model.run.tokenizer.path)
    # Sampled at once, on one device or many alike.
    params = jax.device_put(model.params)
    train, heldout = digits_arrays("train"), digits_arrays("test")
    labels = np.arange(arguments.num_samples) % model.config.num_classes
    print(f"| steps | guidance | Gumbel | temperature | {' | '.join(COLUMNS)} |")
    print("|" + "---|" * (4 + len(COLUMNS)), flush=True)
    settings = itertools.product(
        arguments.steps, arguments.guidance, arguments.gumbel, arguments.temperature
    )
    for steps, guidance, gumbel, temperature in settings:
        sampler = build.sampler_config(
            model.run,
            num_steps=steps,
            guidance_scale=guidance,
            gumbel_temperature=gumbel,
            temperature=temperature,
            guidance_schedule=arguments.guidance_schedule,
            schedule=arguments.schedule,
            schedule_form=arguments.schedule_form,
        )
        tokens = generator.generate_tokens(
            model.config, params, labels, sampler, seed=arguments.seed, batch_size=250
        )
        images = generator.decode_images(tokenizer, tokens, batch_size=250)
        report = digits_report(images, labels, train=train, heldout=heldout)
        cells = [f"{report[name]:.3f}" for name in COLUMNS]
        print(f"| {steps} | {guidance:g} | {gumbel:g} | {temperature:g} | {' | '.join(cells)} |",
              flush=True)  # fmt: skip


def numbers(kind):
    """Return a parser of comma-separated numbers."""
    return lambda text: [kind(part) for part in text.split(",")]


def main() -> None:
    """Parse the command line and sweep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True, help="directory of a digits run")
    parser.add_argument("--steps", type=numbers(int), default=[8])
    parser.add_argument("--guidance", type=numbers(float), default=[1.0])
    parser.add_argument("--gumbel", type=numbers(float), default=[4.5])
    parser.add_argument("--temperature", type=numbers(float), default=[1.0])
    parser.add_argument("--guidance_schedule", default=None)
    parser.add_argument("--schedule", default=None)
    parser.add_argument("--schedule_form", default=None)
    parser.add_argument("--num_samples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    try:
        sweep(parser.parse_args())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
