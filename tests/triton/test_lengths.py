"""Launchers refuse tensors that do not fit x: a kernel would read the wrong numbers of them."""

import importlib

import pytest
import torch

from boft_ops._runtime import backend

if not backend.has_triton():
    pytest.skip("triton is not installed", allow_module_level=True)
X, SCALE, HALF = torch.ones(4, 32), torch.ones(32), torch.ones(16)
STAGE, CUT, INDEX = torch.ones(4, 8, 8), torch.ones(2, 8, 8), torch.zeros(4, dtype=torch.int32)
LAYOUT = 8, 1, False
CASES = {  # file, launcher, argument -> arguments
    ("scale", "scale", "scale"): (X, HALF, None, None),
    ("scale", "scale", "center"): (X, SCALE, HALF, SCALE),
    ("scale", "scale", "bias"): (X, SCALE, SCALE, HALF),
    ("scale", "scale_backward", "grad"): (X[:2], X, SCALE, None),
    ("scale", "scale_backward", "scale"): (X, X, HALF, None),
    ("scale", "scale_backward", "center"): (X, X, SCALE, HALF),
    ("rotate", "rotate", "stage"): (X, CUT, *LAYOUT),
    ("rotate", "rotate", "factor"): (X, STAGE, *LAYOUT, INDEX[:2].float()),
    ("rotate_indexed", "rotate_indexed", "stages"): (X, CUT[None], INDEX, *LAYOUT),
    ("rotate_indexed", "rotate_indexed", "index"): (X, STAGE[None], INDEX[:2], *LAYOUT),
    ("rotate_backward", "rotate_backward", "stage"): (X, X, CUT, *LAYOUT, 1),
    ("rotate_backward", "rotate_backward", "grad"): (X[:2], X, STAGE, *LAYOUT, 1),
    ("rotate_backward", "rotate_stage_grad", "grad"): (X, X[:2], 8, 8, 1, 1),
}


@pytest.mark.parametrize(("file", "function", "argument"), CASES)
def test_shapes_that_do_not_fit_are_refused(file, function, argument):
    launcher = getattr(importlib.import_module(f"boft_ops.triton_kernels.{file}"), function)
    with pytest.raises(ValueError, match=rf"{argument}: expected shape \(.*, got"):
        launcher(*CASES[file, function, argument])
