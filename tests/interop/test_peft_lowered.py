"""Files that stock PEFT saved where it lowered m: two factors in the config, one in the tensors."""

import copy
import warnings

import peft
import pytest
from peft_models import boft, mlp, tuned
from torch.testing import assert_close

from boft_ops.interop.peft import accelerate, patched


def lowered(folder):
    """A folder of stock PEFT: two factors in its config, one in its tensors."""
    base, x = mlp()
    stock = tuned(base, boft(m=2))
    assert stock.base_model.model[0].boft_R["default"].shape[0] == 1
    stock.save_pretrained(folder)
    assert peft.PeftConfig.from_pretrained(folder).boft_n_butterfly_factor == 2
    return stock, base, x


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_lowered_file_is_loaded_under_patched(tmp_path, low_cpu_mem_usage):
    stock, base, x = lowered(tmp_path / "first")
    for folder in ("first", "second"):  # and again, when it has been saved again
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with patched():
                loaded = peft.PeftModel.from_pretrained(
                    copy.deepcopy(base), tmp_path / folder, low_cpu_mem_usage=low_cpu_mem_usage
                )
        notes = [str(w.message) for w in said if "n_factors is 1" in str(w.message)]
        assert len(notes) == 1  # for two layers
        assert "adapter 'default': n_factors is 1, as in the tensors loaded, not 2" in notes[0]
        assert_close(loaded(x), stock(x), rtol=1e-4, atol=2e-5)
        loaded.save_pretrained(tmp_path / "second")


def test_a_lowered_file_is_loaded_into_the_accelerated_model_that_wrote_it(tmp_path):
    stock, _, x = lowered(tmp_path / "stock")
    want = stock(x)
    with pytest.warns(UserWarning, match="PEFT lowered it"):
        accelerate(stock)
    stock.save_pretrained(tmp_path / "own")
    with pytest.warns(UserWarning, match="adapter 'again': n_factors is 1"):
        stock.load_adapter(tmp_path / "own", "again")
    stock.set_adapter("again")
    assert_close(stock(x), want, rtol=1e-4, atol=2e-5)


def test_other_shapes_are_still_refused(tmp_path):
    _, base, _ = lowered(tmp_path)
    with patched():
        model = tuned(base, boft(b=2, m=2))
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(accelerate(tuned(base, boft())).state_dict())
