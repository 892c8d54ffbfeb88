"""Sections of gpu_decide.py: each measures one kind of figure and writes a line for each."""
