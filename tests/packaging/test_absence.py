"""A copy without the native library says so once, at the first call that would have used it."""

import shutil

import pytest

USE = """
import sys, warnings
import torch
warnings.simplefilter("error")
import {name} as copy
import {name}._runtime.native as native
state = native.status
use = copy.cayley
{prepare}
said = []
for _ in range(3):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert use(torch.zeros(2, 3)).equal(torch.eye(3).expand(2, 3, 3)), use
    said += [w for w in caught if issubclass(w.category, RuntimeWarning)]
print(len(said), state)
print(*[w.message for w in said])
"""
COMPILED = 'use = torch.compile(copy.cayley, backend="eager", fullgraph=True)'
FORCED = """
from {name}._runtime import backend
context = backend.force("reference")
context.__enter__()
"""


def messages(run, path, name="boft_ops", prepare="", **env):
    """The number of warnings, the status after the import, and the warnings."""
    code = USE.format(name=name, prepare=prepare.format(name=name))
    done = run("-c", code, path=[path], **env)
    first, text = done.stdout.splitlines()
    number, _, state = first.partition(" ")
    return int(number), state, text


@pytest.fixture(scope="module")
def failed(run, new_tree, unpack, tmp_path_factory):
    """A folder of installed packages with one whose build had no compiler."""
    out = tmp_path_factory.mktemp("pure")
    return unpack(run.build("wheel", new_tree(), out, CXX="no-such-c++"))


@pytest.mark.parametrize("prepare", ["", COMPILED], ids=["eager", "compiled"])
def test_a_failed_build(run, failed, needs_compiler, prepare):
    number, state, text = messages(run, failed, prepare=prepare)
    assert number == 1
    assert state.startswith("absent: no C++ compiler: CXX=no-such-c++ not found")
    assert text == (
        "boft_ops: operators run as plain PyTorch on this CPU, without their C++ kernels: the "
        f"native library is {state}"
    )


@pytest.mark.parametrize(
    ("prepare", "env"),
    [
        ("", {"BOFT_OPS_SKIP_EXT": "1"}),
        ("", {"BOFT_OPS_BACKEND": "reference"}),
        (FORCED, {}),
        ('use = lambda q: copy.cayley(q, method="neumann5")', {}),  # has no kernel anywhere
    ],
    ids=["skip", "backend", "forced", "no kernel"],
)
def test_what_was_chosen_or_changes_nothing_is_not_told(run, failed, needs_compiler, prepare, env):
    assert messages(run, failed, prepare=prepare, **env)[0] == 0


def test_a_pure_install_that_was_asked_for(run, new_tree, unpack, tmp_path):
    site = unpack(run.build("wheel", new_tree(), tmp_path, BOFT_OPS_SKIP_EXT="1"))
    assert messages(run, site)[:2] == (
        0,
        "absent: BOFT_OPS_SKIP_EXT=1; `python -m boft_ops build` compiles it",
    )


def test_a_plain_copy_without_sources(run, new_tree, tmp_path):
    shutil.copytree(new_tree() / "boft_ops", tmp_path / "site" / "kernels")
    number, state, text = messages(run, tmp_path / "site", "kernels")
    assert (number, state) == (1, "absent: this copy has no C++ sources")
    assert text.startswith("kernels: operators run as plain PyTorch on this CPU")


def test_a_library_that_is_refused_is_told_at_import_alone(run, failed, tmp_path):
    shutil.copytree(failed / "boft_ops", tmp_path / "boft_ops")
    (tmp_path / "boft_ops" / "libboft_native.so").write_bytes(b"not a library")
    code = USE.format(name="boft_ops", prepare="").replace('("error")', '("ignore")')
    done = run("-c", code, path=[tmp_path])
    assert done.stdout.startswith("0 stale: ")
