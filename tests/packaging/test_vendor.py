"""Copies of the package under other names, beside an installed package, in one process."""

import shutil

import pytest


@pytest.fixture(scope="module")
def copies(run, installed, tmp_path_factory):
    """Make two copies: mytrainer.third_party.boft_ops with `vendor`, other.kernels with cp -r."""
    folder = tmp_path_factory.mktemp("copies")
    dest = folder / "mytrainer" / "third_party" / "boft_ops"
    done = run("-m", "boft_ops", "vendor", dest, "--with-native", path=[installed])
    assert done.stdout.splitlines() == [f"copied to {dest}"]
    shutil.copytree(installed / "boft_ops", folder / "other" / "kernels")
    return folder


def test_vendored_tree_is_complete(copies, installed):
    built = ("__pycache__", "*.pyc")
    vendored = copies / "mytrainer" / "third_party" / "boft_ops"

    def files(folder):
        ignored = shutil.ignore_patterns(*built)
        kept = [f for f in folder.rglob("*") if not ignored(str(f.parent), [f.name])]
        return {f.relative_to(folder).as_posix() for f in kept if f.is_file()}

    assert files(vendored) == files(installed / "boft_ops")
    assert (vendored / "LICENSE").is_file()


@pytest.mark.exhaustive
def test_without_native_it_is_built_on_demand(run, new_tree, tmp_path, needs_compiler):
    done = run("-m", "boft_ops", "vendor", tmp_path / "a" / "boft", path=[new_tree()])
    assert "build` compiles its native library" in done.stdout
    assert not list(tmp_path.rglob("*.so"))
    env = {"BOFT_OPS_CACHE": str(tmp_path / "cache"), "path": [tmp_path]}
    code = "import a.boft.__main__ as m; m.main([]); print('***'); m.main(['build']); m.main([])"
    before, _, after = run("-c", code, **env).stdout.partition("***")
    assert "torch.ops.a__boft\n" in before
    assert "absent: vendored without the native library; `python -m a.boft build`" in before
    assert f"built {tmp_path / 'cache'}" in after
    assert "loaded (" in after
    assert "cayley" in after


THREE = """
import importlib, sys
import torch
names = ["boft_ops", "mytrainer.third_party.boft_ops", "other.kernels"]
copies = [importlib.import_module(name) for name in names]
natives = [importlib.import_module(f"{name}._runtime.native") for name in names]
spaces = [importlib.import_module(f"{name}._runtime.namespace").NS for name in names]
assert spaces == ["boft_ops", "mytrainer__third_party__boft_ops", "other__kernels"], spaces
assert len({n.library for n in natives}) == 3, [n.status for n in natives]
assert len({n.kernels("cpu") for n in natives}) == 1
for name, copy in zip(names, copies):
    assert copy.cayley.__module__ == f"{name}.ops.cayley"
"""

ONE_GRAPH = """
def chain(use, skew):
    return use[0].cayley(skew) @ use[1].cayley(2 * skew) @ use[2].cayley(-3 * skew)

skew = torch.randn(3, 6, requires_grad=True)
expected = chain([copies[0]] * 3, skew)
(slope,) = torch.autograd.grad(expected.square().sum() + expected[0, 0, 1], skew)
R = expected.detach()
torch.testing.assert_close(R @ R.mT, torch.eye(4).expand(3, 4, 4))

from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
graphs = []
def keep(graph, inputs):
    graphs.append(graph.code)
    return make_boxed_func(graph.forward)

backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
compiled = torch.compile(chain, backend=backend, fullgraph=True)
actual = compiled(copies, skew)
torch.testing.assert_close(actual, expected)
(got,) = torch.autograd.grad(actual.square().sum() + actual[0, 0, 1], skew)
torch.testing.assert_close(got, slope, rtol=1e-4, atol=1e-5)
for space in spaces:
    assert f"torch.ops.{space}." in graphs[0], graphs[0]
"""

AGAIN = """
before = natives[0].library
for name in [m for m in sys.modules if m == "boft_ops" or m.startswith("boft_ops.")]:
    del sys.modules[name]
import boft_ops
from boft_ops._runtime import native
assert boft_ops is not copies[0] and native.library == before, native.status
skew = torch.randn(2, 3)
torch.testing.assert_close(boft_ops.cayley(skew), copies[1].cayley(skew))
"""


@pytest.mark.slow
def test_three_copies_in_one_process_and_one_graph(run, installed, copies):
    done = run("-c", THREE + ONE_GRAPH, path=[installed, copies])
    assert "Warning" not in done.stderr


def test_a_second_import_uses_the_registered_operators(run, installed, copies):
    done = run("-c", THREE + AGAIN, path=[installed, copies])
    assert done.stderr == ""


def test_force_replaces_an_earlier_copy_only(run, installed, tmp_path):
    code = """
import sys
from pathlib import Path
from boft_ops.__main__ import main
dest, precious = Path("boft"), Path("thesis")
assert main(["vendor", "boft"]) == 0
Path(dest, "mine.py").touch()
assert main(["vendor", "boft"]) == 1
assert Path(dest, "mine.py").exists()
assert main(["vendor", "boft", "--force"]) == 0
assert not Path(dest, "mine.py").exists()
precious.mkdir()
Path(precious, "chapter.txt").touch()
assert main(["vendor", "thesis", "--force"]) == 1
assert Path(precious, "chapter.txt").exists()
"""
    done = run("-c", code, path=[installed], cwd=tmp_path)
    first, second = done.stderr.splitlines()
    assert f"error: DEST: {tmp_path / 'boft'} is not empty (--force" in first
    assert "thesis is not an earlier copy of this package" in second
    assert {p.name for p in tmp_path.iterdir()} == {"boft", "thesis"}


def test_bad_destinations(run, installed, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    cases = {
        installed / "boft_ops" / "inner": "expected a folder outside the package",
        installed / "boft_ops": "expected a folder outside the package",
        installed.parent: "expected a path that ends in a module name",
        tmp_path / "my-copy": "expected a path that ends in a module name",
        tmp_path / "class": "expected a path that ends in a module name",
        tmp_path / "file": "is a file or a link",
        tmp_path / "link": "is a file or a link",
    }
    code = "import sys; from boft_ops.__main__ import main\n"
    code += "codes = [main(['vendor', d, '--force']) for d in sys.argv[1:]]\n"
    code += "assert codes == [1] * len(codes), codes"
    code += "\nmain(['instal'])"
    done = run("-c", code, *cases, path=[installed], fails=True)
    *lines, usage, wrong_command = done.stderr.splitlines()
    assert usage.startswith("usage: python -m boft_ops ")
    assert "error: argument COMMAND: invalid choice: 'instal'" in wrong_command
    for line, message in zip(lines, cases.values(), strict=True):
        assert line.startswith("python -m boft_ops vendor: error: DEST: ")
        assert message in line
