"""Captions to features: text encoders, pretrained and frozen."""
