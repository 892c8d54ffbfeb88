"""What a factorised orthogonal matrix can do, on paper and by numbers (arXiv 2311.06243).

Nothing of it is needed for training. ``python -m boft_ops.analysis d b m`` describes BOFT(m, b).
"""
