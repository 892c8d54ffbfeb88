"""A rotated layer as its launches one after the other, and torch's products between them."""

from ..rotate_linear import composed
from .rotate import rotate, rotate_backward
from .scale import scale, scale_backward

rotate_linear, rotate_linear_backward = composed(rotate, rotate_backward, scale, scale_backward)
