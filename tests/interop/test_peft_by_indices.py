"""accelerate, restore and patched over the PEFT that is coming: activation-side BOFT, no extension.

PEFT is a stand-in of the interface (``tests/helpers/peft_by_indices.py``). The other tests of this
folder run on the installed PEFT.
"""

import copy
import warnings

import peft
import peft_by_indices
import pytest
import torch
from peft.tuners.boft import layer as peft_boft
from peft_models import assert_same, boft, mlp, net, oft, step, tuned
from torch.testing import assert_close

from boft_ops.interop.peft import accelerate, patched, restore
from boft_ops.interop.peft.boft import BoftLinear

CONVOLUTIONS = ("conv", "point", "hidden", "out")
CASES = {
    "one factor": (mlp, boft()),
    "three factors": (mlp, boft(b=2, m=3)),
    "dropout": (mlp, boft(m=2, p=0.5)),
    "convolutions": (net, boft(CONVOLUTIONS, b=2, m=2)),
}


@pytest.fixture(autouse=True)
def _coming(monkeypatch):
    """The stand-in, and warnings as errors: PEFT has nothing to say about extensions."""
    peft_by_indices.install(monkeypatch)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(extension|lowered|n_factors).*")
        yield
    assert not any(hasattr(peft_boft, name) for name in peft_by_indices.GONE)


def made(case):
    make, config = CASES[case]
    base, x = make()
    return base, config, x


@pytest.mark.parametrize("case", CASES)
def test_accelerated_as_peft_and_back(case):
    base, config, x = made(case)
    theirs = tuned(base, config)
    buffers = {name: buffer.clone() for name, buffer in theirs.named_buffers()}
    ours = accelerate(copy.deepcopy(theirs))
    want = step(theirs, x)
    assert_same(step(ours, x), want)
    restore(ours)
    assert {name for name, _ in ours.named_buffers()} == buffers.keys()
    assert all(torch.equal(b, buffers[name]) for name, b in ours.named_buffers())
    assert_same(step(ours, x), want, rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_made_under_patched(case):
    base, config, x = made(case)
    before = vars(peft.tuners.boft.model)["Linear"]
    with patched():
        ours = tuned(base, config)
    assert vars(peft.tuners.boft.model)["Linear"] is before
    got = step(ours, x)
    assert_same(step(restore(ours), x), got)  # PEFT's code over the same parameters


@pytest.mark.parametrize("case", CASES)
def test_merged_and_unmerged(case):
    base, config, x = made(case)
    model = tuned(base, config).eval()
    want = model(x)
    accelerate(model).merge_adapter(safe_merge=True)
    assert_close(model(x), want, rtol=1e-4, atol=2e-5)
    model.unmerge_adapter()
    assert_close(model(x), want, rtol=1e-4, atol=2e-5)
    assert_close(model.merge_and_unload()(x), want, rtol=1e-4, atol=2e-5)


def test_adapters_added_loaded_and_deleted(tmp_path):
    base, x = mlp()
    stored = tuned(base, boft(m=2)).eval()
    stored.save_pretrained(tmp_path)
    model = accelerate(tuned(base, boft(b=2, m=3))).eval()
    model.add_adapter("added", boft(m=2))
    model.load_adapter(tmp_path, "loaded")
    model.set_adapter("loaded")
    assert type(model.base_model.model[0]) is BoftLinear
    assert_close(model(x), stored(x), rtol=1e-4, atol=2e-5)
    model.set_adapter("added")
    added = model(x)
    assert (added - stored(x)).abs().max() > 1e-3
    model.delete_adapter("default")
    model.delete_adapter("loaded")
    assert_close(restore(model)(x), added, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_from_pretrained_under_patched(tmp_path, low_cpu_mem_usage):
    base, x = mlp()
    stored = tuned(base, boft(m=2)).eval()
    stored.save_pretrained(tmp_path)
    with patched():
        loaded = peft.PeftModel.from_pretrained(
            copy.deepcopy(base), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
        )
    assert_close(loaded.eval()(x), stored(x), rtol=1e-4, atol=2e-5)


def test_a_file_of_an_older_peft_that_lowered_m(tmp_path):
    """Two factors in its config, one in its tensors: this PEFT refuses it, accelerated it loads."""
    base, x = mlp()
    stored = tuned(base, boft(m=1)).eval()
    stored.peft_config["default"].boft_n_butterfly_factor = 2
    stored.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    with patched(), pytest.warns(UserWarning, match="n_factors is 1, as in the tensors loaded"):
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert_close(loaded(x), stored(x), rtol=1e-4, atol=2e-5)
    assert_close(restore(loaded)(x), stored(x), rtol=1e-4, atol=2e-5)


def test_what_is_no_butterfly_is_refused():
    base, _ = mlp()
    with patched(), pytest.raises(ValueError, match="Invalid combination"):
        tuned(base, boft(b=8, m=3))


def test_oft_beside_it():
    base, x = mlp()
    theirs = tuned(base, oft())
    assert_same(step(accelerate(copy.deepcopy(theirs)), x), step(theirs, x))
