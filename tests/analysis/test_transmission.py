"""Factorizations as graphs: edges, non-zeros, dimensions, the command line."""

import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from itertools import permutations

import pytest
import reference
import torch

from boft_ops import cayley
from boft_ops.analysis import graph
from boft_ops.analysis.__main__ import main
from boft_ops.analysis.manifold import components, random_member, usable
from boft_ops.analysis.transmission import (
    analyze,
    butterfly_pattern,
    edges_pattern,
    kaleidoscope_pattern,
    product,
    shuffle_pattern,
)


def swaps(d, pairs):
    """Make a pattern whose factor i swaps the features of pair i."""
    return edges_pattern(
        d, [(i, *e) for i, (j, k) in enumerate(pairs, 1) for e in ((j, k), (k, j))]
    )


def test_the_papers_counts_for_four_features():
    """Section 3: 12 edges for one dense matrix, 10 in Figure 2, 8 for the butterfly."""
    figure_2 = swaps(4, [(1, 2), (3, 4), (2, 4), (1, 4), (2, 3)])
    assert not product(figure_2[:4])[2, 0]  # node 1 does not reach node 3 yet
    for pattern, free in (
        (torch.ones(1, 4, 4, dtype=torch.bool), 12),
        (figure_2, 10),
        (butterfly_pattern(4, 2, 2), 8),
    ):
        result = analyze(pattern)
        assert (result.free_edges, result.dense) == (free, True)


def test_a_zero_may_imply_another():
    """The paper's 2 x 2 example: a zero at (1, 1) implies one at (2, 2)."""
    result = analyze(torch.tensor([[[0, 1], [1, 1]]]).bool())
    assert (result.forbidden, result.edges, result.free_edges, result.dimension) == (1, 2, 0, 0)


@pytest.mark.parametrize(("d", "b", "m"), [(12, 3, 1), (16, 4, 3), (24, 4, 2), (32, 2, 5)])
def test_butterfly_pattern_is_that_of_the_matrices(d, b, m):
    blocks = cayley(torch.randn(m, d // b, b * (b - 1) // 2, dtype=torch.float64))
    pattern = butterfly_pattern(d, b, m)
    for i in range(m):
        assert torch.equal(pattern[i], reference.factor(blocks, i) != 0)
    assert torch.equal(product(pattern), reference.rotation(blocks).abs() > 1e-12)


@pytest.mark.parametrize(
    ("d", "b", "m"),
    [(8, 2, 3), (16, 4, 3), (16, 8, 2), (32, 8, 3), (24, 4, 2), (36, 6, 2), (9, 3, 1)],
)
def test_dimension_of_butterflies(d, b, m):
    """The first factor contributes d(b-1)/2 and each further factor d b/4.

    A rotation within a chunk can be moved from a factor to the next, so it counts only once.
    """
    result = analyze(butterfly_pattern(d, b, m))
    assert result.parameters == m * d * (b - 1) // 2
    assert result.dimension == d * (b - 1) // 2 + (m - 1) * d * b // 4
    assert result.nonzeros == d * b * 2 ** (m - 1)


def test_dimension_is_the_rank_of_the_jacobian_of_the_parameters():
    """The rank is computed by autograd through dense matrices, independently of the module."""
    d, b, m = 16, 4, 3
    skew = torch.randn(m, d // b, b * (b - 1) // 2, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(
        lambda q: reference.rotation(torch.stack([reference.cayley(p) for p in q])), skew
    )
    rank = torch.linalg.matrix_rank(jacobian.reshape(d * d, -1), rtol=1e-9)
    assert int(rank) == analyze(butterfly_pattern(d, b, m)).dimension < skew.numel()


def test_shuffles_waste_nothing_and_are_dense_sooner():
    butterfly, shuffled = (make(64, 8, 2) for make in (butterfly_pattern, shuffle_pattern))
    assert analyze(shuffled).dimension == analyze(shuffled).parameters == 448
    assert analyze(butterfly).dimension == 352
    assert analyze(shuffled).dense
    assert not analyze(butterfly).dense


def test_three_levels_of_a_kaleidoscope_have_the_dimension_of_all_rotations():
    dimensions = [analyze(kaleidoscope_pattern(16, 2, 4, levels)).dimension for levels in (1, 2, 3)]
    assert dimensions == [56, 104, 120]


@pytest.mark.parametrize(
    ("rows", "dimension"),
    [
        (["1100", "1110", "1111", "1111"], 3),  # Hessenberg: three plane rotations
        (["11000", "01100", "00110", "00011", "10001"], 0),  # no two rows can be orthogonal
        (["0100", "0010", "0001", "1000"], 0),  # a permutation
        (["1111", "1111", "1111", "1111"], 6),
    ],
)
def test_dimension_of_factors_without_block_structure(rows, dimension):
    pattern = torch.tensor([[[c == "1" for c in row] for row in rows]]).transpose(1, 2)
    member = random_member(usable(pattern[0], 1), torch.Generator().manual_seed(0))
    eye = torch.eye(len(rows), dtype=torch.float64)
    torch.testing.assert_close(member.matrix.mT @ member.matrix, eye)
    assert (member.matrix[~pattern[0]] == 0).all()
    assert analyze(pattern).dimension == dimension


@pytest.mark.parametrize("seed", range(30))
def test_usable_entries_are_those_in_a_permutation(seed):
    generator = torch.Generator().manual_seed(seed)
    factor = torch.rand(5, 5, generator=generator) < 0.45
    expected = torch.zeros(5, 5, dtype=torch.bool)
    for columns in permutations(range(5)):
        if factor[range(5), columns].all():
            expected[range(5), columns] = True
    if expected.any():
        assert torch.equal(usable(factor, 1), expected)
    else:
        with pytest.raises(ValueError, match="no B_1 of it is"):
            usable(factor, 1)


def test_components_follow_permutations_from_level_to_level():
    pattern = torch.eye(6, dtype=torch.bool).roll(1, 0)[None]
    pattern = torch.cat([pattern, butterfly_pattern(6, 2, 1)])
    parts = sorted(tuple(nodes.tolist() for nodes in part) for part in components(pattern))
    assert parts[0] == ([0, 5], [0, 1], [0, 1])
    assert len(parts) == 3


def test_bad_patterns():
    with pytest.raises(TypeError, match="expected a boolean tensor"):
        analyze(torch.ones(1, 2, 2))
    with pytest.raises(ValueError, match="expected shape"):
        analyze(torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"within 1\.\.4, got \(1, 0, 2\)"):
        edges_pattern(4, [(1, 0, 2)])
    with pytest.raises(ValueError, match="expected at least one"):
        edges_pattern(4, [])


def test_imports_stay_minimal():
    """The package does not import its analysis, and the analysis does not import matplotlib."""
    code = (
        "import sys, boft_ops; assert 'boft_ops.analysis' not in sys.modules;"
        "import boft_ops.analysis.graph, boft_ops.analysis.representation;"
        "assert not {'matplotlib', 'scipy', 'transformers', 'peft'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- Command line and graph -----------------------------------------------------------------------


def test_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["8", "2", "3"]) == 0
    assert re.search(r"^free edges +24 ", capsys.readouterr().out, re.MULTILINE)
    root = ElementTree.parse(tmp_path / "boft_d8_b2_m3.svg").getroot()
    tags = [element.tag.rpartition("}")[2] for element in root.iter()]
    assert tags.count("line") == 48
    assert tags.count("circle") == 4 * 8


def test_command_line_with_a_list_of_edges(tmp_path, capsys):
    (tmp_path / "chain.txt").write_text("# two exchanges\n1 1 2\n1 2 1\n\n2 2 3\n2 3 2\n")
    svg = tmp_path / "chain.svg"
    assert main(["3", "--edges", str(tmp_path / "chain.txt"), "--svg", str(svg)]) == 0
    out = capsys.readouterr().out
    assert "8 of 9" in out  # node 3 does not reach node 1
    assert svg.exists()


def test_command_line_errors(tmp_path, capsys):
    for arguments, message in (
        (["8", "3", "2"], "block_size: expected a divisor"),
        (["8"], "b: expected a block_size, or --edges"),
        (["8", "2", "--edges", "x"], "expected no b"),
        (["8", "--edges", str(tmp_path / "none")], "No such file"),
        (["128", "2", "2", "--svg", str(tmp_path / "a.svg")], "expected at most 64 features"),
    ):
        assert main(arguments) == 1
        assert message in capsys.readouterr().err
    (tmp_path / "bad").write_text("1 2\n")
    assert main(["8", "--edges", str(tmp_path / "bad")]) == 1
    assert "line 1: expected LEVEL SOURCE TARGET" in capsys.readouterr().err


def test_large_structures_are_counted_without_dimensions(capsys):
    assert main(["512", "16", "6"]) == 0
    assert "not computed" in capsys.readouterr().out


def test_titles_are_escaped():
    ElementTree.fromstring(graph.draw(butterfly_pattern(4, 2, 2), "a < b & c"))
