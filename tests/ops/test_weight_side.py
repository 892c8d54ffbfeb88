"""The weight rotated in the place of x: when that is chosen, and that it is the same layer."""

import pytest
import reference
import torch
import torch.nn.functional as F
from linear_operands import D_IN, D_OUT, N, call, operands

from boft_ops import boft_linear, butterfly_groups, butterfly_matmul, cayley
from boft_ops._runtime import tuned, tuned_file
from boft_ops._runtime.tuned import pinned
from boft_ops.ops import rotate as rotate_module
from boft_ops.ops.linear import rotated_linear
from boft_ops.ops.planner import layer_plan, plan_choice, plan_for, rotates_weight
from boft_ops.ops.rotation import DenseRotation
from boft_ops.ops.stages import plan
from boft_ops.tune import __main__ as command
from boft_ops.tune import explain

CPU = torch.device("cpu")
WEIGHT, INPUT = plan_choice(1, True), plan_choice(1, False)


@pytest.fixture
def weight_side():
    with pinned(plan=WEIGHT):
        yield


@pytest.fixture
def rotated(monkeypatch):
    """Rows of what ``rotate`` was called with."""
    found, right = [], rotate_module.rotate_rows

    def spy(x, *args):
        found.append(len(x))
        return right(x, *args)

    monkeypatch.setattr(rotate_module, "rotate_rows", spy)
    return found


def row(weight_side, rows=64, outputs=16, stages=1, features=32):
    return {
        **{"op": "plan", "dtype": "float64", "structure": {"n_factors": 2, "block_size": 4}},
        **{"sizes": {"rows": rows, "features": features, "outputs": outputs}, "backend": ""},
        "config": {"stages": stages, "weight_side": weight_side},
    }


def keep(*rows):
    tuned_file.update(tuned_file.file_of(CPU), CPU, rows, tuned.check_row)
    tuned.forget()


# --- The same layer -------------------------------------------------------------------------------


@pytest.mark.parametrize("without", [(), ("scale",), ("bias",), ("scale", "bias")])
@pytest.mark.parametrize("m", [1, 2, 3])
def test_forward_and_every_gradient(backend, weight_side, rotated, m, without):
    tensors = {k: v for k, v in operands(m=m).items() if k not in without}
    leaves = [v.requires_grad_() for k, v in tensors.items() if k != "weight"]
    y = call(boft_linear, tensors)
    expected = call(reference.linear, tensors)
    torch.testing.assert_close(y, expected)
    upstream = torch.randn_like(y)
    got = torch.autograd.grad(y, leaves, upstream)
    torch.testing.assert_close(got, torch.autograd.grad(expected, leaves, upstream))
    assert rotated == [D_OUT, D_OUT]  # W, forward and again in backward: never the N rows of x


@pytest.mark.parametrize("trained", ["all", "x", "skew", "scale", "bias"])
def test_gradcheck(weight_side, trained):
    tensors = operands()
    for name, tensor in tensors.items():
        tensor.requires_grad_(name != "weight" and trained in ("all", name))
    arguments = tuple(tensors.values())
    assert torch.autograd.gradcheck(boft_linear, arguments, fast_mode=True)
    assert torch.autograd.gradgradcheck(boft_linear, arguments, fast_mode=True)


def steps(tensors, choice, upstream=None, **options):
    """Output and gradients on a side, for the gradient of the output or for its sum of squares."""
    leaves = {k: v.clone().requires_grad_(k != "weight") for k, v in tensors.items()}
    with pinned(plan=choice):
        torch.manual_seed(3)  # the generator of the mask
        y = call(boft_linear, leaves, **options)
        wanted = [v for v in leaves.values() if v.requires_grad]
        upstream = 2 * y.detach() if upstream is None else upstream.to(y.dtype)
        return [y.detach(), *torch.autograd.grad(y, wanted, upstream)]


@pytest.mark.parametrize("leading", [(), (0,), (3, 5)])
@pytest.mark.parametrize("dropout", [None, (0.7, 0.5)])
def test_both_sides_agree(dropout, leading):
    tensors = operands(m=3) | {"x": torch.randn(*leading, D_IN, dtype=torch.float64)}
    one, other, again = (steps(tensors, c, dropout=dropout) for c in (INPUT, WEIGHT, WEIGHT))
    torch.testing.assert_close(one, other)
    assert all(map(torch.equal, other, again))


def test_a_given_rotation(weight_side, rotated):
    tensors = operands()
    tensors["skew"].requires_grad_()
    grads = []
    for given in (None, butterfly_groups([tensors["skew"]])[0]):
        y = call(boft_linear, tensors, rotation=given)
        grads.append(torch.autograd.grad(y.square().sum(), tensors["skew"])[0])
    assert rotated == [D_OUT] * 4
    torch.testing.assert_close(*grads)


def test_what_is_not_orthogonal_stays_on_the_input_side(weight_side, rotated):
    call(boft_linear, operands(), method="neumann5")
    assert rotated == [N]
    x, weight, skew = (operands(m=1)[name] for name in ("x", "weight", "skew"))
    blocks = cayley(skew[0], method="neumann5")
    rotated_linear(x, weight, DenseRotation(blocks, orthogonal=False))
    assert rotated == [N, N]


@pytest.mark.parametrize("stages", [2, 3])
def test_several_stages(backend, rotated, stages):
    tensors = operands(m=3)
    one = steps(tensors, plan_choice(stages, False))
    rotated.clear()
    torch.testing.assert_close(steps(tensors, plan_choice(stages, True)), one)
    # the weight in forward and backward; x on its way to all stages but the first for its gradient
    assert rotated == [D_OUT] * 2 * stages + [N] * (stages - 1)


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_of_the_gradients_are_those_of_the_input_side(stages, dtype):
    """At most twice, against float64."""
    tensors = operands(m=3, dtype=dtype, std=0.1) | {"x": torch.randn(500, D_IN).to(dtype)}
    tensors["skew"] = tensors["skew"].float()
    # A gradient that depends on y would show how the roundings of y add up in the sum of a column.
    upstream = torch.randn(500, D_OUT).to(dtype)
    exact = steps({k: v.double() for k, v in tensors.items()}, INPUT, upstream)

    def errors(choice):
        pairs = zip(steps(tensors, choice, upstream), exact, strict=True)
        return [(got.double() - want).norm() / want.norm() for got, want in pairs]

    ours, theirs = errors(plan_choice(stages, True)), errors(plan_choice(stages, False))
    for one, other in zip(ours, theirs, strict=True):
        assert one <= 2 * other + 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_identity_bit_for_bit(weight_side, dtype):
    tensors = operands(dtype=dtype, std=0.0)
    tensors["scale"] = torch.ones(D_OUT, dtype=dtype)
    for without in ((), ("scale",), ("bias",), ("scale", "bias")):
        some = {k: v for k, v in tensors.items() if k not in without}
        expected = F.linear(some["x"], some["weight"], some.get("bias"))
        assert torch.equal(call(boft_linear, some), expected)
    tensors["skew"].requires_grad_()
    got = torch.autograd.grad(call(boft_linear, tensors).sum(), tensors["skew"])
    with pinned(plan=INPUT):
        want = torch.autograd.grad(call(boft_linear, tensors).sum(), tensors["skew"])
    assert (got[0] - want[0]).norm() <= 4 * torch.finfo(dtype).eps * want[0].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_that_of_a_merged_weight(weight_side, dtype):
    """At most twice what rounding diag(s) W R^T to the weight's dtype costs."""
    tensors = operands(dtype=dtype) | {"x": torch.randn(500, D_IN).to(dtype)}
    tensors["skew"] = tensors["skew"].float()
    wide = {k: v.double() for k, v in tensors.items()}
    exact = call(reference.linear, wide)
    weight = reference.merged_weight(wide["weight"], reference.cayley(wide["skew"])).to(dtype)
    merged = F.linear(tensors["x"], weight) * tensors["scale"] + tensors["bias"]
    y = call(boft_linear, tensors)
    assert y.dtype == dtype
    assert (y.double() - exact).norm() <= 2 * (merged.double() - exact).norm()


def test_autocast(weight_side):
    tensors = operands(dtype=torch.float32)
    tensors["skew"].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = call(boft_linear, tensors)
        (got,) = torch.autograd.grad(y.float().sum(), tensors["skew"])
    assert y.dtype == torch.bfloat16
    (want,) = torch.autograd.grad(call(boft_linear, tensors).sum(), tensors["skew"])
    assert (got - want).norm() / want.norm() < 2e-2
    y = call(boft_linear, tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # in backward alone
        (got,) = torch.autograd.grad(y.sum(), tensors["skew"])
    torch.testing.assert_close(got, want)


def test_the_rotated_weight_is_not_saved(weight_side):
    tensors = operands(dtype=torch.float32)
    tensors |= {"weight": torch.randn(4000, D_IN), "scale": None, "bias": None}
    tensors["skew"].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call(boft_linear, tensors)
    assert [len(t) for t in saved if t.shape[-1] == D_IN and len(t) > N] == [4000]
    assert any(
        t is tensors["weight"] or t.data_ptr() == tensors["weight"].data_ptr() for t in saved
    )


# --- The choice -----------------------------------------------------------------------------------


def test_the_side_is_looked_up_by_rows(tuned_cache, rotated):
    keep(row(0, rows=16), row(1, rows=1024))
    for rows, first in ((16, 16), (100, 100), (300, D_OUT), (2000, D_OUT), (1 << 16, 1 << 16)):
        rotated.clear()
        x = torch.randn(rows, D_IN, dtype=torch.float64)
        call(boft_linear, operands() | {"x": x})
        call(boft_linear, operands() | {"x": x.reshape(-1, 4, D_IN)})
        assert rotated == [first, first]


def test_a_measurement_of_the_weight_side_says_nothing_of_other_calls(tuned_cache):
    """Calls without a weight, and graphs for any number of rows, ignore even the stages."""
    x = torch.randn(64, D_IN, dtype=torch.float64)
    keep(row(1))
    default = plan(2, 4)
    assert layer_plan(x, 2, 4, D_OUT) == (plan(2, 4, n_stages=1), True)
    assert layer_plan(x, 2, 4, None) == (default, False)
    assert plan_for(x, 2, 4) == default
    keep(row(0, stages=2))
    assert layer_plan(x, 2, 4, D_OUT) == (plan(2, 4, n_stages=2), False)
    assert plan_for(x, 2, 4) == plan(2, 4, n_stages=2)
    butterfly_matmul(x, cayley(operands()["skew"]))


def test_compiled_graphs_have_the_input_side(tuned_cache, rotated):
    keep(row(1))
    in_graph = []

    def backend(graph, _):
        nodes = [node for node in graph.graph.nodes if str(node.target).endswith("rotate.default")]
        in_graph.extend(len(node.args[0].meta["example_value"]) for node in nodes)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(boft_linear, fullgraph=True, backend=backend)
    tensors = operands() | {"x": torch.randn(64, D_IN, dtype=torch.float64)}
    torch.testing.assert_close(call(compiled, tensors), call(reference.linear, tensors))
    assert in_graph == [64]
    call(boft_linear, tensors)
    assert rotated[-1] == D_OUT  # eager, where the rows are known


@pytest.mark.parametrize(
    ("m", "b", "rows", "device", "weight_side"),
    [
        (1, 128, 8 * D_OUT, "cpu", True),
        (1, 128, 8 * D_OUT - 1, "cpu", False),  # too little to gain
        (2, 8, 1 << 20, "cpu", False),  # the fused product rotates it for nothing
        (10, 8, 1 << 20, "cpu", False),  # several stages
        (1, 128, 1 << 20, "cuda", False),  # not measured
    ],
)
def test_default(m, b, rows, device, weight_side):
    assert rotates_weight(plan(m, b, device), device, rows, D_OUT) == weight_side


def test_the_default_is_applied(rotated):
    x, skew = torch.randn(40, 128), 0.01 * torch.randn(1, 1, 128 * 127 // 2)
    for n, rows in ((5, 5), (6, 40)):
        weight = torch.randn(n, 128)
        y = boft_linear(x, weight, skew)
        assert rotated[-1] == rows
        with pinned(plan=INPUT):
            torch.testing.assert_close(y, boft_linear(x, weight, skew), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weight_side", [0, 1])
def test_explain_marks_what_was_measured(tuned_cache, capsys, weight_side):
    def marked():
        explain.show(64, 32, 16, 2, 4, torch.float64, CPU)
        lines = capsys.readouterr().out.splitlines()[2:]
        sides = [line.split()[2 + int(line.split()[0]) - 1] for line in lines]
        assert sides == ["in", "in", "weight", "weight"]
        return [
            line.partition(f" {side} ")[2].split()[2:]
            for line, side in zip(lines, sides, strict=True)
        ]

    assert marked() == [["default,", "chosen"], [], [], []]
    keep(row(weight_side, stages=2))
    expected = [["default"], [], [], []]
    expected[3 if weight_side else 1] = ["measured", "best,", "chosen"]
    assert marked() == expected


def test_the_command_tries_both_sides(tuned_cache, tmp_path, monkeypatch):
    tried = []
    right = command.tune

    def tune(problem, *rest):
        tried.append([dict(choice.config) for choice in (problem.default, *problem.others)])
        return right(problem, *rest)

    monkeypatch.setattr(command, "tune", tune)
    out = tmp_path / "out.json"
    assert (
        command.main(["--shapes=64x48x600", "--butterfly=2x4", f"--out={out}", "--ops=plan"]) == 0
    )
    every = [{"stages": count, "weight_side": side} for count in (1, 2) for side in (0, 1)]
    assert tried[0] == every
    (kept,) = tuned_file.read(out, CPU, tuned.check_row)
    assert kept["structure"] == {"n_factors": 2, "block_size": 4}
    assert kept["failed"] == []
    assert kept["sizes"] == {"rows": 600, "features": 64, "outputs": 48}
