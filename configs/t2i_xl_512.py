"""MaskGIL-XL from captions at 512×512 and its 49 buckets: the second of two stages.

It begins with the parameters of the first; that the grid is finer changes the rotary table alone.

Paper row: Table 4 (GenEval 0.49 overall), section 4.4.
Hardware: not tried; 32 TPU v4 or 8 H100 are what its size asks for.
Expected metric: not measured.
Command: python -m maskgil_jax.train --config configs/t2i_xl_512.py --workdir runs/t2i_xl_512
    --config.init_from=runs/t2i_xl_256 and the paths of the first stage
"""

from configs import t2i_xl_256


def get_config(preset: str = "recommended"):
    """Return the configuration."""
    config = t2i_xl_256.get_config(preset)

    config.model.grid_size = (32, 32)
    config.model.remat = "full"
    config.data.image_size = (512, 512)
    config.init_from = "runs/t2i_xl_256"
    config.training.num_steps = 200_000
    config.optimizer.learning_rate = 5e-5

    config.sampler.num_steps = 24
    return config
