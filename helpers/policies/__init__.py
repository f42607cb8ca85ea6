"""Policies and what runs a model under one."""
