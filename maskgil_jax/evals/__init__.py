"""Evals room: arrays in, numbers out. Knows no model and no dataset.

- `metrics`: FID and its relatives of features, by name; `metrics_from_features` is public here.
- `frechet`: statistics of features, gathered, merged and kept in files, and their distance.
- `scores`: inception score and kernel inception distance.
- `manifold`: precision, recall, density and coverage, and nearest-neighbour distances.
- `features`: what all of these expect of features.
- `digits`: how good samples of handwritten digits are.
- `canvases`: whether digits of rebuilt canvases are readable and keep their colours.
- `images`: PSNR and SSIM of reconstructions.
- `clip_score`: how well pictures match captions, or others, by CLIP; has its own extra, `clip`.
- `textures`: fine texture of images against that of real ones.
"""

from maskgil_jax.evals.metrics import metrics_from_features

__all__ = ["metrics_from_features"]
