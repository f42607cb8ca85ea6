"""Models and texts: presets, loading, corpora, shapes."""
