"""From a validated configuration to objects: the only place that knows names."""
