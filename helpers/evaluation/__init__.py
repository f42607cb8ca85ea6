"""Measuring methods."""
