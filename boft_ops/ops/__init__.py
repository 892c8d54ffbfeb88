"""Operators: tensors in, tensors out, one file for each operator."""
