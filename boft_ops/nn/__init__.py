"""Modules and whole models: layers, adapters, merging, adapter files."""
