"""The import is quick and silent, and `python -m boft_ops` describes the installation."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).resolve().parents[2]

IMPORT = """
import sys, time, warnings
import torch
warnings.simplefilter("error")
before = set(sys.modules)
start = time.process_time()  # CPU time, because the machine may be busy
import boft_ops
seconds = time.process_time() - start
new = {name.partition(".")[0] for name in set(sys.modules) - before}
heavy = {"triton", "safetensors", "peft", "transformers", "numpy", "ninja", "pybind11"} & new
compilers = ("torch._dynamo", "torch._inductor")
heavy |= {name for name in set(sys.modules) - before if name.startswith(compilers)}
assert not heavy, heavy
assert not torch.cuda.is_initialized()
with open("seconds", "w") as file:
    file.write(str(seconds))
"""


def test_import_is_quick_silent_and_light(run, installed, tmp_path):
    seconds = []
    for _ in range(3):
        done = run("-c", IMPORT, path=[installed], cwd=tmp_path)
        assert done.stdout == ""
        assert done.stderr == ""
        seconds.append(float((tmp_path / "seconds").read_text()))
    assert median(seconds) < 0.1, seconds


PHANTOM = """
import sys, importlib.machinery
class WithoutTriton:
    # Answers as the path finder would if the compiler were not installed.
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "triton":
            others = [p for p in sys.path if "site-packages" not in p]
            return importlib.machinery.PathFinder.find_spec(name, others)
sys.meta_path.insert(0, WithoutTriton)
import torch
from torch.utils import _triton
"""


@pytest.mark.exhaustive
def test_the_folder_triton_is_not_taken_for_the_compiler(run, new_tree):
    tree = new_tree()
    (tree / "triton" / "marker_of_this_tree.py").touch()
    # First show the hazard itself, so that this test fails once it no longer exists.
    phantom = "import triton; assert triton.__file__ is None; assert _triton.has_triton_package()"
    run("-c", PHANTOM + phantom, cwd=tree)
    done = run("-c", PHANTOM + HIDDEN, cwd=tree)
    assert done.stdout.splitlines() == ["hidden", "compiled"]


HIDDEN = """
_triton.has_triton_package()
import boft_ops
import boft_ops.triton_kernels.marker_of_this_tree
try:
    import triton
except ImportError:
    print("hidden")
assert not _triton.has_triton_package()
f = torch.compile(lambda q: boft_ops.cayley(q).sum(), backend="eager", fullgraph=True)
f(torch.randn(2, 6))
print("compiled")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_the_real_triton_wins_in_the_root(run):
    done = run("-c", "import triton; print(triton.__file__)", cwd=ROOT)
    assert Path(done.stdout.strip()).parent != ROOT / "triton"


def test_no_package_is_called_triton():
    assert not (ROOT / "triton" / "__init__.py").exists()


def test_info(run, installed):
    done = run("-m", "boft_ops", path=[installed], BOFT_OPS_BACKEND="reference")
    head, _, table = done.stdout.partition("\n\n")
    lines = dict(line.strip().partition(" ")[::2] for line in head.splitlines()[1:])
    facts = {key: value.strip() for key, value in lines.items()}
    assert head.splitlines()[0] == "boft_ops 0.1.0"
    assert facts["location"] == str(installed / "boft_ops")
    assert facts["operators"] == "torch.ops.boft_ops"
    assert facts["native"].startswith("loaded (")
    assert facts["library"].endswith("libboft_native.so")
    assert "BOFT_OPS_BACKEND=reference" in facts["settings"]
    assert set(facts) >= {"python", "torch", "triton"}
    rows = [line.split()[:3] for line in table.splitlines()[1:]]
    assert ["cayley", "cpu"] in [row[:2] for row in rows]
    assert {row[1] for row in rows} == {"cpu", "cuda"}
    assert {row[2] for row in rows} <= {"reference", "cpu", "cuda", "triton"}
    assert done.stderr == ""


def test_imports_inside_the_package_are_relative():
    """With absolute imports, a vendored copy would use the modules of an installed package."""
    for file in sorted((ROOT / "boft_ops").rglob("*.py")) + sorted((ROOT / "triton").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                modules = [node.module] if node.level == 0 else []
                # Kernels import only from their own folder; no other import leaves the package.
                depth = len(file.relative_to(ROOT).parts) - 1
                limit = 1 if file.is_relative_to(ROOT / "triton") else depth
                assert node.level <= limit, f"{file}:{node.lineno}"
            for module in modules:
                assert module.partition(".")[0] != "boft_ops", f"{file}:{node.lineno}"


def test_the_repository_names_no_folder_of_a_machine():
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    folder = re.compile(rb"(?<![\w./<-])/(?:home|root|Users|work|mnt|opt|tmp)/\w[^\s`'\"]*")
    mentions = []
    for name in filter(None, listing.stdout.split("\0")):
        file = ROOT / name
        if file.is_file() and file.suffix not in (".png", ".svg"):
            mentions += [f"{name}: {hit.decode()}" for hit in folder.findall(file.read_bytes())]
    assert mentions == []
