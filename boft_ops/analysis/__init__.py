"""The calculations behind the paper's figures and claims (arXiv 2311.06243), as functions."""
