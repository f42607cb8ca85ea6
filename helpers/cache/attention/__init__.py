"""Attention that reads the packed cache."""
