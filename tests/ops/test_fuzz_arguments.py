"""Arguments drawn at random: a finite result, or an error that names an argument."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import boft_ops

FUZZ = settings(max_examples=100, deadline=None)
dtypes = st.sampled_from([torch.float32] * 4 + [torch.float64, torch.bfloat16, torch.int64])
devices = st.sampled_from(["cpu"] * 9 + ["meta"])
sizes = st.sampled_from([0, 1, 2, 3, 4, 6, 8, 12, 16])
NAMED = re.compile(
    r"(x|weight|skew|scale|bias|blocks|block_size|n_factors|dropout|p_component|p_block|side|method"
    r"|index): "
)


@st.composite
def tensors(draw, *shape):
    """A tensor that as a rule has this shape, is of float32, dense and on the CPU."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.sampled_from([None, 1.0, "x", [1.0], torch.zeros(2, 2).to_sparse()]))
    shape = list(shape)
    if shape and draw(st.integers(0, 9)) == 0:
        shape[draw(st.integers(0, len(shape) - 1))] = draw(sizes)
    if draw(st.integers(0, 19)) == 0:
        shape = draw(st.lists(sizes, max_size=4))
    tensor = torch.full(shape, 0.1, dtype=torch.float32).to(draw(dtypes)).to(draw(devices))
    strided = tensor.dim() > 1 and draw(st.booleans())
    return tensor.mT.contiguous().mT if strided else tensor


@st.composite
def butterflies(draw):
    """(m, K, b) of a butterfly, as a rule of a valid one."""
    m, b = draw(st.sampled_from([(1, 1), (1, 3), (1, 4), (2, 2), (2, 4), (3, 2), (2, 3)]))
    return m, draw(st.sampled_from([1, 2, 4, 8])), b


def check(call, features):
    """Raise unless ``call`` returns finite numbers, ``features()`` in a row, or names an argument.

    The arguments that were drawn say how many: those of another shape may fit each other, too.
    """
    try:
        y = call()
    except (TypeError, ValueError) as error:
        message = str(error)
    else:
        assert y.shape[-1] == features()
        assert y.is_meta or y.isfinite().all()
        return
    assert NAMED.match(message), message


@FUZZ
@given(data=st.data())
def test_boft_linear(data):
    (m, k, b), n = data.draw(butterflies()), data.draw(sizes)
    d = k * b
    side = data.draw(st.sampled_from(["in", "in", "in", "out", "sideways", None]))
    arguments = {
        "x": data.draw(tensors(2, n if side == "out" else d)),
        "weight": data.draw(tensors(d, n) if side == "out" else tensors(n, d)),
        "skew": data.draw(tensors(m, k, b * (b - 1) // 2)),
        "scale": data.draw(st.none() | tensors(d if side == "out" else n)),
        "bias": data.draw(st.none() | tensors(d if side == "out" else n)),
        "side": side,
        "method": data.draw(st.sampled_from(["exact", "exact", "neumann5", "cayley", 3])),
        "dropout": data.draw(st.none() | st.sampled_from([(1.0, 0.5), (2.0, 0.5), 0.1, (1, "x")])),
    }
    check(lambda: boft_ops.boft_linear(**arguments), lambda: len(arguments["weight"]))


@FUZZ
@given(data=st.data())
@pytest.mark.parametrize("name", ["butterfly_matmul", "butterfly_matmul_indexed"])
def test_products(name, data):
    m, k, b = data.draw(butterflies())
    indexed = name == "butterfly_matmul_indexed"
    x = data.draw(tensors(3, k * b))
    blocks = data.draw(tensors(*([2] if indexed else []), m, k, b, b))
    more = [data.draw(st.sampled_from([torch.tensor([0, 1, -1]), torch.tensor([0.5]), 0, None]))]
    check(lambda: getattr(boft_ops, name)(x, blocks, *more[: int(indexed)]), lambda: x.shape[-1])


@FUZZ
@given(data=st.data())
def test_layers(data):
    d, n = (data.draw(st.sampled_from([4, 6, 16])) for _ in range(2))
    options = {
        "block_size": data.draw(st.sampled_from([-1, 0, 1, 2, 3, 4, 8, 2.0, "4", None, True])),
        "n_factors": data.draw(st.sampled_from([1, 2, 3, 0, 1.0, None])),
        "side": data.draw(st.sampled_from(["in", "out", "up"])),
    }
    check(lambda: boft_ops.BOFTLinear(d, n, **options)(torch.zeros(2, d)), lambda: n)
