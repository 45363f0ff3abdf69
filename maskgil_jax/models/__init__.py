"""Token models: one transformer and what is built around it."""
