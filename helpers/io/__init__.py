"""Files, provenance and processes: what every other package writes with. Knows nothing of models."""
