"""Finds, builds and chooses kernels; knows no operator by name."""
