"""Figures, tables, notebooks."""
