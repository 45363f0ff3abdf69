"""Train the net whose features metrics of digits are taken of; its weights ship with the package.

    python tools/train_digit_net.py --out DIR

Learns from the 1,500 training digits, shifted, turned and scaled a little, and prints how many of
the held-out ones it reads. Takes half a minute on one core. Another machine's rounding may give
other weights, and with them figures that are not comparable: the asset was made once.
"""

import argparse
import json
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from maskgil_jax.checkpoints import write_model_dir
from maskgil_jax.data.digits import digits_arrays
from maskgil_jax.data.transforms import RandomAffine
from maskgil_jax.evals.digit_net import FAMILY, Params, init_params, read_digits

SEED, BATCH_SIZE, LEARNING_RATE = 0, 50, 2e-3
AUGMENTATION = RandomAffine(max_shift_px=2.0, max_rotation_deg=10.0, scale_range=(0.9, 1.1))


def train(epochs: int) -> Params:
    """Return the parameters after some passes over the training digits."""
    images, labels = digits_arrays("train")
    steps = epochs * (len(images) // BATCH_SIZE)
    optimizer = optax.adamw(optax.cosine_decay_schedule(LEARNING_RATE, steps), weight_decay=1e-3)

    def loss_fn(params, images, labels):
        logits = read_digits(params, images)["logits"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def update(params, state, images, labels):
        gradients = jax.grad(loss_fn)(params, images, labels)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params = init_params(SEED)
    state = optimizer.init(params)
    for epoch in range(epochs):
        rng = np.random.default_rng((SEED, epoch))
        shaken = np.stack([AUGMENTATION({"image": image}, rng)["image"] for image in images])
        for rows in rng.permutation(len(images)).reshape(-1, BATCH_SIZE):
            params, state = update(params, state, shaken[rows], labels[rows])
    return jax.tree.map(np.asarray, params)


def accuracy(params: Params, split: str) -> float:
    """Return the share of a split's digits that the net reads."""
    images, labels = digits_arrays(split)
    logits = read_digits(params, jnp.asarray(images))["logits"]
    return float(np.mean(np.argmax(logits, axis=1) == labels))


def main(command: Sequence[str] | None = None) -> None:
    """Train, write a model directory, and print the accuracies as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="directory to write, new or empty")
    parser.add_argument("--epochs", type=int, default=40, help="passes over the digits")
    arguments = parser.parse_args(command)
    try:
        if arguments.epochs < 1:
            raise ValueError(f"--epochs {arguments.epochs} must be at least 1")
        params = train(arguments.epochs)
        measured = {split: round(accuracy(params, split), 4) for split in ("train", "test")}
        write_model_dir(
            arguments.out,
            kind="evaluator",
            family=FAMILY,
            config={},
            params=params,
            source={"command": "tools/train_digit_net.py", "accuracy": measured},
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(json.dumps({"accuracy": measured, "out": arguments.out}))


if __name__ == "__main__":
    main()
