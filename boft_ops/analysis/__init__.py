"""What the paper's figures and claims rest on, as functions."""
