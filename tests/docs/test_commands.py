"""Commands, quoted errors and quoted figures of the documentation."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import boft_ops

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(
    r"(?:[A-Z_]+=\S+ )*"
    r"(?:python3?|make|pip|pytest|boft-ops|ninja|twine|git|mkdir|cp|apt-get|dnf) \S"
)

HERE = "tests/docs/test_commands.py::test_quick_commands_run"
DRY = "tests/docs/test_docs.py::test_every_make_target_that_is_named_exists"
INSTALL = "tests/packaging/test_install.py::"
# A command of the pages matches the pattern of a row as a whole. Beside it stands the test that
# runs the command, or "not run:" and the reason.
COMMANDS = [
    # a name in a sentence, without its arguments
    (r"python -m build|python -P|pip (install|wheel)|pytest bench/", "not run: only named"),
    (r"make VARIABLE=value target|BOFT_OPS_BACKEND=cuda python train.py", "not run: a form"),
    (r"make (demo|test|test-exhaustive|bench|lint|format|docs|setup|build)( [A-Z]+=.*)?", DRY),
    (r"make (paper|cuda|test-triton-3.6|distclean)", DRY),
    (r"make (gpu-decide|cuda-memcheck)", DRY),
    (r"make dist( DIST_CUDA=0)?", "tests/packaging/test_release.py::test_make_dist"),
    (r"make hub", "tests/packaging/test_hub.py::test_the_repository_is_complete"),
    (r"pip install \.", INSTALL + "test_builds_with_and_without_ninja"),
    (r"pip install --no-build-isolation \.", INSTALL + "test_builds_with_and_without_ninja"),
    (r"pip (install|wheel) --no-build-isolation (-e|--no-deps -w dist) \.",
     INSTALL + "test_editable_install_maps_the_folders"),
    (r"BOFT_OPS_(SKIP|FORCE)_EXT=1 pip install \.",
     INSTALL + "test_pure_install_records_the_reason"),
    (r"python setup.py build_ext|python -m boft_ops build",
     INSTALL + "test_uninstalled_checkout"),
    (r"pip install -e \. --config-settings editable_mode=compat", "not run: what not to do"),
    (r"pip install boft_ops", "not run: what does not work"),
    (r"pip install ('\.\[demo\]'|.*(pybind11|setuptools|minilm|--no-build-isolation).*)",
     "not run: downloads packages"),
    (r"(apt-get|dnf) install .*|git pull", "not run: changes the machine"),
    (r"twine upload dist/\*", "not run: publishes"),
    (r"python -m boft_ops", HERE),
    (r"python -m boft_ops\.(tune|convert)|python -m boft_ops (merge|vendor)|boft-ops convert",
     "tests/runtime/test_command_line.py::test_subcommands_are_the_modules"),
    (r"python -m boft_ops merge BASE OUT --adapter (FILE|IN)", HERE),
    (r"python -m boft_ops.convert IN OUT --to \S+", HERE),
    (r"python -m boft_ops vendor (DEST|src\S+ \[--with-native\] \[--force\])", HERE),
    (r"python -m mytrainer.third_party.boft_ops build",
     "tests/packaging/test_vendor.py::test_without_native_it_is_built_on_demand"),
    (r"python -m boft_ops.analysis D .*", HERE),
    (r"python -m boft_ops.tune --explain .*", HERE),
    (r"python -m boft_ops.tune --(ops|shapes) .*",
     "tests/tune/test_tune.py::test_an_interrupted_run_goes_on"),
    (r"python -m boft_ops.tune --device cuda .*", "not run: needs a GPU"),
    (r"(python -m )?pytest -m \w+ tests/.*", "not run: pytest inside of pytest"),
    (r"pytest bench/ --benchmark-only", "tests/bench/test_bench.py::test_bench_of_a_tiny_shape"),
    (r"python bench/run.py( --.*)?", "tests/bench/test_bench.py::test_bench_of_a_tiny_shape"),
    (r"python bench/host.py", "tests/bench/test_bench_host.py::test_every_row_is_timed"),
    (r"python bench/indexed.py", "not run: takes minutes"),
    (r"python bench/page.py( --check)?",
     "tests/bench/test_bench_pages.py::test_check_names_the_pages_that_differ"),
    (r"python bench/roofline.py", HERE),
    (r"python bench/peft_model.py", "tests/bench/test_bench_peft.py::test_smoke"),
    (r"python bench/gpu_decide.py .*",
     "tests/bench/test_gpu_decide.py::test_the_table_is_made_again_from_the_lines"),
    (r"python docs/examples/finetune_minilm.py",
     "tests/docs/test_demo.py::test_every_method_from_training_to_report"),
    (r"python docs/examples/merge_two_tasks.py( --seeds 5 --threads 1)?",
     "tests/docs/test_demo.py::test_merging_two_tasks"),
    (r"python docs/examples/one_rate.py( --threads 1)?", "tests/docs/test_demo.py::test_one_rate"),
    (r"python docs/examples/fetch_data.py",
     "tests/docs/test_demo.py::test_fetch_verifies_and_is_idempotent"),
    (r"python docs/examples/causal_lm.py", "tests/docs/test_recipes.py::test_causal_lm"),
    (r"python docs/examples/vision.py .*", "tests/docs/test_recipes.py::test_vision"),
    (r"python docs/examples/unet.py .*", "tests/docs/test_recipes.py::test_unet"),
    (r"python docs/paper/figure5(_speed)?.py", "tests/docs/test_paper.py::test_figure5_speed"),
    (r"python docs/paper/theorem1.py", "tests/docs/test_paper.py::test_theorem1"),
    (r"python docs/paper/transmission.py", "tests/docs/test_paper.py::test_transmission"),
    (r"python docs/choosing.py",
     "tests/docs/test_choosing.py::test_the_script_writes_the_page_as_it_is"),
    (r"python docs/paper/tables.py", "tests/docs/test_paper_trained.py::test_counts_of_the_tables"),
    (r"python docs/paper/(spectrum|interpolation|dropout|stability).py",
     "tests/docs/test_paper_trained.py::test_spectrum"),
    (r"python tests/helpers/\w+.py --write", "not run: rewrites committed tables"),
    (r"mkdir -p third_party/boft_csrc|cp -r csrc/cpu .*|ninja rotation_cuda.so",
     "tests/docs/test_cpp_extension.py::extension"),
]  # fmt: skip


def commands():
    """Yield (page, command) of fenced blocks, indented blocks and code spans."""
    for page in PAGES:
        text = re.sub(r" *\\\n *", " ", page.read_text())  # joins lines that end in a backslash
        candidates = []
        for language, body in FENCE.findall(text):
            if language in ("", "bash"):
                candidates += body.splitlines()
        rest = FENCE.sub("", text)
        candidates += [line for line in rest.splitlines() if line.startswith("    ")]
        candidates += re.findall(r"`([^`\n]+)`", rest)
        for candidate in candidates:
            command = re.split(r"\s+#", candidate)[0].strip()
            if COMMAND.match(command):
                yield page.relative_to(ROOT).as_posix(), command


def test_every_command_is_run_or_has_a_reason():
    used = set()
    for page, command in commands():
        rows = [pattern for pattern, _ in COMMANDS if re.fullmatch(pattern, command)]
        assert rows, f"{page}: {command!r} is in no row of COMMANDS"
        used.add(rows[0])
    assert [pattern for pattern, _ in COMMANDS if pattern not in used] == []


def test_the_named_tests_exist():
    for _, where in COMMANDS:
        if not where.startswith("not run: "):
            file, _, test = where.partition("::")
            assert re.search(rf"^def {test}\(", (ROOT / file).read_text(), re.M), where


@pytest.mark.exhaustive  # each starts a Python of its own
def test_quick_commands_run(tmp_path):
    """Forms like IN and OUT become files; everything runs in an empty folder."""
    from safetensors.torch import save_file

    base = torch.nn.Sequential(torch.nn.Linear(16, 16))
    save_file(base.state_dict(), tmp_path / "BASE")
    boft_ops.adapt(base, ["0"], block_size=4)
    torch.nn.init.normal_(base[0].skew, std=0.1)
    boft_ops.save_adapter(base, tmp_path / "IN")
    (tmp_path / "FILE").write_text("1 1 2\n1 2 1\n")
    results = ROOT / "bench" / "results" / "amd-epyc-zen-4" / "auto.json"
    run = [
        "-m boft_ops",
        "-m boft_ops merge BASE OUT --adapter IN",
        "-m boft_ops.convert IN PEFT --to peft",
        "-m boft_ops vendor src/mytrainer/third_party/boft_ops",
        "-m boft_ops vendor src/mytrainer/third_party/boft_ops --force",
        "-m boft_ops.analysis 8 2 3",
        "-m boft_ops.analysis 8 2 3 --shuffle",
        "-m boft_ops.analysis 4 --edges FILE",
        "-m boft_ops.tune --explain 4096 4096 2048 --butterfly 10x8",
        f"{ROOT}/bench/roofline.py --results {results} --out roofline.png",
    ]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    for command in run:
        done = subprocess.run(
            [sys.executable, *command.split()],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": paths, "BOFT_OPS_CACHE": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
    for made in ("OUT", "PEFT/adapter_config.json", "roofline.png"):
        assert (tmp_path / made).exists(), made
    assert (tmp_path / "src/mytrainer/third_party/boft_ops/__init__.py").is_file()


# --- README ---------------------------------------------------------------------------------------


def test_the_two_columns_of_the_readme_run():
    """The line of PEFT and the line with these kernels make models of equal outputs."""
    peft = pytest.importorskip("peft")
    from boft_ops.interop.peft import patched

    (row,) = re.findall(r"^\| `(model = .*)` \| `(.*)` \|$", (ROOT / "README.md").read_text(), re.M)
    outputs = []
    for code in row:
        torch.manual_seed(0)
        names = {
            "model": torch.nn.Sequential(torch.nn.Linear(16, 16)),
            "config": peft.BOFTConfig(boft_block_size=4, target_modules=["0"]),
            "get_peft_model": peft.get_peft_model,
            "patched": patched,
        }
        exec(code, names)
        outputs.append(names["model"](torch.ones(2, 16)))
        kinds = {type(module).__module__ for module in names["model"].modules()}
        assert any(kind.startswith("boft_ops") for kind in kinds) == ("patched" in code)
    torch.testing.assert_close(*outputs)


# --- Quoted errors and figures --------------------------------------------------------------------


def messages():
    """The string literals of the package; a formatted value counts as a null character."""
    texts = set()
    for file in (ROOT / "boft_ops").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.add(
                    "".join(v.value if isinstance(v, ast.Constant) else "\0" for v in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.add(node.value)
    return texts


def test_quoted_errors_are_those_of_the_code():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    quotes = re.findall(r"^### `(.*)`$", page, re.M) + re.findall(r"^- \*([^*]+)\*:", page, re.M)
    assert len(quotes) > 20
    known = messages()
    for quote in quotes:
        # "..." stands for formatted values, and for the rest of a message at its end. The name of
        # an argument at the beginning may be a formatted value, too.
        forms = [quote, re.sub(r"^\w+: ", "\0: ", quote)]
        parts = [[p.strip() for p in form.split("...") if p.strip(" :;")] for form in forms]
        patterns = [re.compile(".*".join(map(re.escape, form)), re.DOTALL) for form in parts]
        assert any(p.search(text) for text in known for p in patterns), quote
