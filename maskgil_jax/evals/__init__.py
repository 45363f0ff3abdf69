"""Evals room: arrays in, numbers out. Knows no generator and no dataset.

- `metrics`: FID and its relatives of features, by name; `metrics_from_features` is public here.
- `frechet`: statistics of features, gathered, merged and kept in files, and their distance.
- `scores`: inception score and kernel inception distance.
- `manifold`: precision, recall, density and coverage, and nearest-neighbour distances.
- `features`: what all of these expect of features.
- `digits`: how good samples of handwritten digits are.
- `digit_net`: a small net that reads digits, whose features stand for Inception's on them.
- `canvases`: whether digits of rebuilt canvases are readable and keep their colours.
- `inception`: the net of FID, sFID and the inception score.
- `extractor`: its features of many images, batch by batch on all devices.
- `images`: PSNR and SSIM of reconstructions.
- `clip_score`: how well pictures match captions, or others, by CLIP; has its own extra, `clip`.
- `textures`: fine texture of images against that of real ones.
"""

from maskgil_jax.evals.metrics import metrics_from_features

__all__ = ["metrics_from_features"]
