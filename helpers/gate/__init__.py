"""Entropy-gated generation."""
