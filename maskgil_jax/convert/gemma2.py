"""Gemma 2; what it shares with the first generation, and how they differ, is in `gemma.py`."""

from maskgil_jax.convert.gemma import FAMILY_2

FAMILY = FAMILY_2
