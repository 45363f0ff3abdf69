"""Decoding loops over a function from tokens to logits."""
