"""Merging adapters as rotations: the means, what they keep, and what does not fit."""

import copy
import math

import pytest
import torch
from torch import nn

from boft_ops import (
    BOFTLinear,
    OFTLinear,
    adapt,
    cayley,
    load_adapter,
    merge,
    merge_adapters,
    save_adapter,
)
from boft_ops.nn.adapter_format import Adapter
from boft_ops.ops.cayley import unpack
from boft_ops.ops.geodesic import geodesic, inverse_cayley, karcher_mean


def pretrained():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 16)).double()


def tuned(seed, std=0.3, targets=("0", "2"), **options):
    model = adapt(pretrained(), list(targets), **{"block_size": 8, "n_factors": 2, **options})
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("skew"):
            nn.init.normal_(parameter, std=std)
        if name.endswith("scale_offset"):
            nn.init.uniform_(parameter, -0.5, 1)
    return model.eval()


def dense(skew):
    """R of one factor as a dense matrix, from Q by torch's own solver."""
    q = unpack(skew[0].double())
    eye = torch.eye(q.shape[-1], dtype=q.dtype)
    return torch.block_diag(*torch.linalg.solve(eye - q, eye + q, left=False))


@pytest.mark.parametrize("weights", [None, (1, 3, 2)])
def test_orthomerge(weights):
    """The formula of arXiv 2602.05943 on dense matrices, with one factor, in float64."""
    models = [tuned(seed, n_factors=1, scale=False, targets=["0"]) for seed in (1, 2, 3)]
    merged = load_adapter(pretrained(), merge_adapters(models, weights))
    shares = torch.tensor(weights or (1, 1, 1)).double()
    shares /= shares.sum()
    qs = [torch.block_diag(*unpack(model[0].skew[0])).detach() for model in models]
    total = sum(share * q for share, q in zip(shares, qs))
    lengths = sum(share * torch.linalg.matrix_norm(q) for share, q in zip(shares, qs))
    q = lengths / torch.linalg.matrix_norm(total) * total
    eye = torch.eye(32, dtype=torch.float64)
    expected = torch.linalg.solve(eye - q, eye + q, left=False)
    torch.testing.assert_close(merged[0].rotation(), expected, atol=1e-13, rtol=0)
    assert not torch.allclose(expected, dense(models[0][0].skew), atol=0.1)


@pytest.mark.parametrize("how", ["orthomerge", "karcher"])
@pytest.mark.parametrize("options", [{}, {"n_factors": 1}, {"side": "out"}, {"kaleidoscope": 1}])
def test_the_spectrum_is_kept(how, options):
    """Averaged weights lose up to half of a singular value here; rotations lose no digit."""
    models = [tuned(seed, std=0.15, scale=False, **options) for seed in (1, 2)]
    before = pretrained()
    after = load_adapter(pretrained(), merge_adapters(models, how=how))
    weights = [merge(copy.deepcopy(model)) for model in models]
    for i in (0, 2):
        expected = torch.linalg.svdvals(before[i].weight)
        found = torch.linalg.svdvals(after[i].merged_weight())
        torch.testing.assert_close(found, expected, atol=1e-13, rtol=1e-12)
        averaged = torch.linalg.svdvals((weights[0][i].weight + weights[1][i].weight) / 2)
        assert (averaged - expected).abs().max() > 0.05 * expected[0]


@pytest.mark.parametrize("n_factors", [1, 2])
def test_the_karcher_mean_with_the_identity_is_the_geodesic(n_factors):
    """Adapters of strength t, therefore, scales included."""
    model = tuned(1, n_factors=n_factors)
    nothing = adapt(pretrained(), ["0", "2"], block_size=8, n_factors=n_factors)
    merged = merge_adapters([model, nothing], [0.3, 0.7], how="karcher")
    for i in (0, 2):
        torch.testing.assert_close(merged.tensors[f"{i}.skew"], geodesic(model[i].skew, 0.3).data)
        scale = 1 + merged.tensors[f"{i}.scale_offset"]
        torch.testing.assert_close(scale, model[i].scale.detach() ** 0.3)


def test_the_karcher_mean():
    """No step leads away from it, and turning all rotations turns it."""
    torch.manual_seed(0)
    skews = 0.15 * torch.randn(3, 2, 4, 28, dtype=torch.float64)
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    mean = cayley(karcher_mean(skews, weights))

    def log(r):
        values, vectors = torch.linalg.eigh(1j * unpack(inverse_cayley(r)))
        return (vectors * (2 * torch.atan(values))[..., None, :] @ vectors.mH).imag

    rest = sum(w * log(mean.mT @ cayley(skew)) for w, skew in zip(weights, skews))
    assert rest.abs().max() < 1e-12
    turn = cayley(torch.randn(2, 4, 28, dtype=torch.float64))
    turned = karcher_mean(inverse_cayley(turn @ cayley(skews)), weights)
    torch.testing.assert_close(cayley(turned), turn @ mean, atol=1e-10, rtol=0)


def test_rotations_without_a_mean():
    far = [tuned(1, std=0), tuned(2, std=0)]
    for model, turn in zip(far, (1, -1)):
        model[2].skew.data[0, 0, 0] = turn
    with pytest.raises(ValueError, match="2: expected rotations with a mean, got some that differ"):
        merge_adapters(far, how="karcher")
    half = torch.tensor([[[[1.0]]], [[[-1.0]]]], dtype=torch.float64)  # quarter turns, opposite
    with pytest.raises(ValueError, match="some that differ by angles near pi"):
        karcher_mean(half, torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize("how", ["orthomerge", "karcher"])
def test_one_adapter_and_copies_stay_as_they_are(how):
    model = tuned(1)
    for adapters in ([model], [model, model]):
        merged = merge_adapters(adapters, how=how)
        for i in (0, 2):
            torch.testing.assert_close(merged.tensors[f"{i}.skew"], model[i].skew.data)
            offset = merged.tensors[f"{i}.scale_offset"]
            torch.testing.assert_close(offset, model[i].scale_offset.data)


def test_opposite_adapters_cancel():
    model, opposite = tuned(1, std=0.1), tuned(1, std=0.1)
    opposite[0].skew.data.neg_()
    for how in ("orthomerge", "karcher"):
        skew = merge_adapters([model, opposite], how=how).tensors["0.skew"]
        assert skew.isfinite().all()
        assert skew.abs().max() < 1e-10
    assert merge_adapters([model, opposite]).tensors["2.skew"].abs().max() > 0.05


def test_files_models_and_layers_that_are_missing(tmp_path):
    one, two = tuned(1), tuned(2, targets=["2"], scale=False)
    one[2].scale_offset.data.fill_(3)
    save_adapter(one, tmp_path / "one.safetensors")
    merged = merge_adapters([tmp_path / "one.safetensors", two], [1, 1])
    assert isinstance(merged, Adapter)
    # a layer that is missing counts as the identity, a missing scale as ones
    torch.testing.assert_close(merged.tensors["0.skew"], 0.5 * one[0].skew.data)
    scale = 1 + merged.tensors["0.scale_offset"]
    torch.testing.assert_close(scale, one[0].scale.detach().sqrt())
    torch.testing.assert_close(merged.tensors["2.scale_offset"], torch.ones(16).double())
    assert merged.bases == {"0": ["Linear", 32], "2": ("Linear", 16)}
    merged.save(tmp_path / "merged.safetensors")
    x = torch.randn(4, 32, dtype=torch.float64)
    from_file = load_adapter(pretrained(), tmp_path / "merged.safetensors")
    assert torch.equal(from_file(x), load_adapter(pretrained(), merged)(x))
    again = merge_adapters([merged, tmp_path / "merged.safetensors"])
    torch.testing.assert_close(again.tensors, merged.tensors)


def test_dtypes_and_the_root():
    """Files hold float32, a layer that is adapted itself has no name, and means need no model."""
    layers = [OFTLinear(9, 4, block_size=3) for _ in range(2)]
    for layer in layers:
        nn.init.normal_(layer.skew)
    merged = merge_adapters(layers)
    assert merged.tensors["skew"].dtype == merged.tensors["scale_offset"].dtype == torch.float32
    load_adapter(layers[0], merged)
    assert torch.equal(layers[0].skew, merged.tensors["skew"])


def test_heads_and_statistics_are_averaged():
    models = []
    for seed in (1, 2):
        base = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 2))
        model = adapt(base, ["0"], modules_to_save=["1", "2"] if seed == 1 else ["1"])
        model[1].num_batches_tracked.fill_(seed)
        nn.init.constant_(model[1].weight, seed)
        models.append(model)
    tensors = merge_adapters(models, [1, 3]).tensors
    assert torch.equal(tensors["1.weight"], torch.full((16,), 1.75))
    assert tensors["1.num_batches_tracked"] == 2  # 1.75, rounded
    assert tensors["1.num_batches_tracked"].dtype == torch.int64
    assert torch.equal(tensors["2.weight"], models[0][2].weight)  # the one that has a head


def broken(**options):
    return tuned(2, **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: merge_adapters([]), ValueError, "adapters: expected at least one, got none"),
        (lambda m: merge_adapters(m), TypeError, "adapters: expected several, got one"),
        (lambda m: merge_adapters([1]), TypeError, "adapters: expected files, adapted models or"),
        (lambda m: merge_adapters(["no"]), FileNotFoundError, "path: expected a file, got 'no'"),
        (lambda m: merge_adapters([m], how="mean"), ValueError, "how: expected one of"),
        (lambda m: merge_adapters([m], [1, 2]), ValueError, "weights: expected 1, one for each"),
        (lambda m: merge_adapters([m, m], [1, -1]), ValueError, "weights: expected a non-negative"),
        (lambda m: merge_adapters([m], [math.nan]), ValueError, "weights: expected a non-negative"),
        (lambda m: merge_adapters([m], ["1"]), TypeError, "weights: expected a non-negative"),
        (lambda m: merge_adapters([m], [0]), ValueError, "weights: expected a positive sum"),
        (
            lambda m: merge_adapters([m, broken(block_size=4)]),
            ValueError,
            "0: block_size: expected one value for all adapters, got 8 and 4",
        ),
        (
            lambda m: merge_adapters([m, BOFTLinear(32, 16)], how="karcher").save("/"),
            ValueError,
            "a device, a FIFO or a folder|expected",
        ),
        (
            lambda m: merge_adapters([broken(method="neumann5")], how="karcher"),
            ValueError,
            "0: method: expected 'exact', whose blocks are rotations, got 'neumann5'",
        ),
    ],
)
def test_what_does_not_fit(call, error, message):
    with pytest.raises(error, match=message):
        call(tuned(1))


def test_a_scale_that_has_no_logarithm():
    model = tuned(1)
    model[2].scale_offset.data[3] = -2
    with pytest.raises(ValueError, match="2: scale: expected positive numbers, which have"):
        merge_adapters([model])
