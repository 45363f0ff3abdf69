"""Evals room: arrays in, numbers out. Knows no model, no dataset and no file.

- `manifold`: k-nearest-neighbour precision and recall, and nearest-neighbour distances.
- `digits`: how good samples of handwritten digits are.
- `canvases`: whether digits of rebuilt canvases are readable and keep their colours.
- `images`: PSNR and SSIM of reconstructions.
"""
