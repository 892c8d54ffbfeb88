"""The structure of the sources: rooms, the direction of imports, and where facts are stated."""

import ast
import re
import statistics
import tokenize
from pathlib import Path

import pytest

import boft_ops
from boft_ops._runtime import backend, limits
from boft_ops.nn.base import BOFTLayer

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "boft_ops"
ROOMS = {  # room -> the rooms that it may import
    "_runtime": {"_runtime"},
    "ops": {"_runtime", "ops"},
    "nn": {"_runtime", "ops", "nn"},
    "interop": {"_runtime", "ops", "nn", "interop"},
    "tune": {"_runtime", "ops", "tune"},
    "analysis": {"_runtime", "ops", "analysis"},
}
ENTRIES = {"__init__", "__main__", "_version", "convert", "distributed"}  # files at the top

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="not a checkout")


def modules(folder=PACKAGE):
    return {path: ast.parse(path.read_text()) for path in sorted(folder.rglob("*.py"))}


def imported(path, tree):
    """The modules of the package that a file imports, at any depth, as tuples of names."""
    here = path.relative_to(PACKAGE).with_suffix("").parts
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = here[: len(here) - node.level]
            base += tuple(node.module.split(".")) if node.module else ()
            for alias in node.names:
                yield (*base, alias.name)
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
        assert not any(name.split(".")[0] == "boft_ops" for name in names), (path, names)


def test_arrows_point_down():
    """At any depth, late and TYPE_CHECKING imports too; only the command line imports all rooms."""
    for path, tree in modules().items():
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for target in imported(path, tree):
            if target[0] in ENTRIES | {"__version__"}:
                continue
            top = ROOMS.keys() if room == "__main__" else ROOMS.keys() - {"tune", "analysis"}
            allowed = ROOMS.get(room, top)
            assert target[0] in allowed, f"{path.relative_to(ROOT)} imports {'.'.join(target)}"


def test_every_file_lies_in_a_room():
    assert {p.stem for p in PACKAGE.glob("*.py")} == ENTRIES
    folders = {p.name for p in PACKAGE.iterdir() if p.is_dir() and any(p.glob("*.py"))}
    assert folders == ROOMS.keys()
    rooms = {p.name for p in (ROOT / "tests").iterdir() if p.is_dir() and any(p.glob("test_*.py"))}
    assert {"ops", "nn", "interop", "tune", "analysis"} <= rooms


def test_kernels_import_nothing_of_the_package():
    for path, tree in modules(ROOT / "triton").items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1, path
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [a.name for a in node.names]
                names = [node.module] if isinstance(node, ast.ImportFrom) else names
                assert not any(name.startswith("boft_ops") for name in names), path
    for path in (ROOT / "csrc" / "cpu", ROOT / "csrc" / "cuda"):
        for source in path.iterdir():
            assert "torch/" not in source.read_text(), f"{source}: kernels are free of torch"


NAMEDTUPLE = {"_replace", "_asdict", "_fields", "_make"}


def private(name):
    return name.startswith("_") and not name.endswith("__") and name not in {"_"} | NAMEDTUPLE


def test_no_private_name_crosses_a_file():
    trees = {}
    for folder in ("boft_ops", "triton", "bench", "docs"):
        trees |= modules(ROOT / folder)
    defined = {}  # private name -> files that define it
    for path, tree in trees.items():
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names = [node.name]
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names = [node.id]
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names = [node.attr]
            for name in filter(private, names):
                defined.setdefault(name, set()).add(path)
    crossing = set()
    for path, tree in trees.items():
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.ImportFrom):
                if node.level or (node.module or "").startswith("boft_ops"):
                    names = [a.name for a in node.names if a.name not in ("_runtime", "_version")]
            elif isinstance(node, ast.Attribute):
                owners = defined.get(node.attr, set())
                names = [node.attr] if owners and path not in owners else []
            crossing |= {
                f"{path.relative_to(ROOT)}: {name}"
                for name in filter(private, names)
                if not inherited(name)
            }
    assert crossing == set()


def inherited(name):
    """True for a private name that torch or a subclass hook of ours shares within one hierarchy."""
    return hasattr(boft_ops.BOFTLinear, name) and hasattr(BOFTLayer, name)


# Option names of layers that are operators' names too: only operators are meant elsewhere.
WORDS = {"scale"}


def test_an_operators_name_is_spelled_in_its_own_files_alone():
    """Facts about an operator stand in its declaration: nothing else has to know it by name."""
    names = backend.ops().keys()
    owners = {name: Path(op.reference.__code__.co_filename) for name, op in backend.ops().items()}
    for path, tree in modules().items():
        room = path.relative_to(PACKAGE).parts[0]
        for node in ast.walk(tree):
            if not isinstance(node, ast.Constant) or node.value not in names:
                continue
            if room == "__init__.py":  # public names
                continue
            if node.value in WORDS and room != "tune":
                continue
            is_own = path == owners[node.value] or f'"{node.value}(' in path.read_text()
            assert is_own, f"{path.relative_to(ROOT)}:{node.lineno}: {node.value!r}"


def test_the_walk_through_a_new_operator_names_its_files():
    """CONTRIBUTING lists every production file that rotate_indexed touches: at most twelve."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text.partition("## A new operator")[2].partition("\n## ")[0]
    listed = set(re.findall(r"^\d+\. `([^`]+)`", section, re.MULTILINE))
    naming = set()
    for folder in ("boft_ops/_runtime", "boft_ops/ops", "csrc", "triton"):
        for path in (ROOT / folder).rglob("*"):
            is_source = path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")
            if is_source and re.search(r"\b_?rotate_indexed", path.read_text()):
                naming.add(str(path.relative_to(ROOT)))
    assert listed == naming | {"boft_ops/__init__.py"}
    assert len(listed) <= 12


def test_limits_are_those_of_the_headers():
    cuda = (ROOT / "csrc" / "boft_cuda.h").read_text()
    cpu = (ROOT / "csrc" / "boft_kernels.h").read_text()

    def constant(text, name):
        return int(re.search(rf"constexpr int64_t {name} = (\d+);", text)[1])

    assert constant(cuda, "kMaxBlock") == limits.MAX_BLOCK
    assert constant(cuda, "kMaxStage") == limits.MAX_STAGE
    assert constant(cuda, "kMaxRotation") == limits.MAX_ROTATION
    assert constant(cpu, "kLinearOutputs") == limits.FUSED_MULTIPLE
    triton = "\n".join(path.read_text() for path in (ROOT / "triton").glob("config*.py"))
    stated = {int(number) for number in re.findall(r"^MAX_\w+ = (\d+)", triton, re.MULTILINE)}
    assert stated <= {limits.MAX_BLOCK, limits.MAX_STAGE, limits.MAX_ROTATION}


def test_public_classes_say_where_they_are():
    for name in boft_ops.__all__:
        value = getattr(boft_ops, name)
        if isinstance(value, type):
            assert value.__module__ == "boft_ops", name


FRAGMENT = re.compile(r"(of|what|who|whom|whether|how|that|where|which|else)\b", re.IGNORECASE)


def test_prose_starts_with_a_verb_or_a_noun():
    """No docstring or comment is a fragment whose noun the reader has to find elsewhere."""
    fragments = []
    for folder in ("boft_ops", "triton", "bench", "docs", "tests"):
        for path, tree in modules(ROOT / folder).items():
            for node in ast.walk(tree):
                if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef):
                    text = ast.get_docstring(node) or ""
                    if FRAGMENT.match(text):
                        fragments.append(f"{path.relative_to(ROOT)}: {text.splitlines()[0]}")
            with path.open("rb") as file:
                for token in tokenize.tokenize(file.readline):
                    text = token.string.lstrip("# ")
                    if token.type == tokenize.COMMENT and FRAGMENT.match(text):
                        fragments.append(f"{path.relative_to(ROOT)}:{token.start[0]}: {text}")
    assert fragments == []


def test_files_are_short():
    """Median 150 lines, at most 400: a file is one idea."""
    for folders in (("boft_ops", "triton"), ("tests", "bench", "docs")):
        paths = [p for folder in folders for p in (ROOT / folder).rglob("*.py")]
        lengths = {p: len(p.read_text().splitlines()) for p in paths}
        longest = max(lengths, key=lengths.get)
        if folders[0] == "boft_ops":
            assert lengths[longest] <= 400, longest
            assert statistics.median(lengths.values()) <= 150
    for path in (ROOT / "csrc").rglob("*.*"):
        assert len(path.read_text().splitlines()) <= 400, path
