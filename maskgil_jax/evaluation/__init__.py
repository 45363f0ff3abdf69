"""Evaluation: which images, which net and which reference make a metric comparable.

The path of `python -m maskgil_jax.evaluate` and `tools/make_fid_stats.py`, in order:

- `protocols`: what is fixed for a name, so that figures under it can be compared.
- `image_sets`: images by number, generated or read, all of one size.
- `nets`: from images to features.
- `extraction`: a set's features, in shards on disk that survive a kill.
- `references`: what samples are compared with, checked against the protocol.
- `measure`: figures and notes of one set of samples.
- `sweeps`: settings to vary, tables and plots.
- `job`: all of these together, continued after a kill.
"""
