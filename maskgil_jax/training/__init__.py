"""Losses, optimiser, update steps and the loop that runs them."""
