"""The repository of `make hub`: `kernels` loads it, beside another version of itself."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# The layer of a model that knows nothing of boft_ops, with the names that the kernel's layer reads.
USE = """
import sys
from pathlib import Path
import kernels
import torch
from torch import nn

first, second = (Path(path) for path in sys.argv[1:])
one, two = kernels.get_local_kernel(first), kernels.get_local_kernel(second)
assert one.__name__ != two.__name__ and kernels.get_local_kernel(first) is one
natives = [sys.modules[f"{copy.__name__}._runtime.native"] for copy in (one, two)]
assert all(native.library.parent.parent.parent in (first, second) for native in natives)
spaces = {sys.modules[f"{copy.__name__}._runtime.namespace"].NS for copy in (one, two)}
assert spaces == {one.__name__, two.__name__}

skew = 0.3 * torch.randn(2, 4, 28)
x = torch.randn(7, 32)
outputs = [copy.butterfly_matmul(x, copy.cayley(skew)) for copy in (one, two)]
assert torch.equal(*outputs) and not torch.equal(outputs[0], x)

@kernels.use_kernel_forward_from_hub("RotatedLinear")
class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(24, 32), requires_grad=False)
        self.skew = nn.Parameter(skew.clone())
        self.scale = nn.Parameter(1 + 0.1 * torch.randn(24))
        self.bias = nn.Parameter(torch.randn(24), requires_grad=False)

    def forward(self, x):
        raise AssertionError("the forward was not replaced")

layer = Layer()
mapping = {"RotatedLinear": {"cpu": kernels.LocalLayerRepository(first, layer_name="BOFTLinear")}}
with kernels.use_kernel_mapping(mapping):
    model = kernels.kernelize(nn.Sequential(layer), mode=kernels.Mode.TRAINING, device="cpu")
y = model(x)
rotated = one.butterfly_matmul(x, one.cayley(layer.skew))
torch.testing.assert_close(y, layer.scale * (rotated @ layer.weight.T) + layer.bias)
y.square().mean().backward()
assert layer.skew.grad.norm() > 0 and layer.scale.grad.norm() > 0
assert not any(name == "boft_ops" or name.startswith("boft_ops.") for name in sys.modules)
"""


@pytest.fixture
def repository(run, installed, tmp_path):
    """Return a function that makes the repository with the installed wheel."""

    def make(name):
        run(ROOT / "hub" / "make_repository.py", tmp_path / name, path=[installed])
        return tmp_path / name

    return make


@pytest.mark.exhaustive
def test_two_kernels_of_different_ids_in_one_process(run, repository):
    first, second = repository("first"), repository("second")
    for file in second.glob("build/*/metadata.json"):
        metadata = json.loads(file.read_text())
        other = json.loads((first / file.relative_to(second)).read_text())
        assert metadata == other  # equal contents have equal ids
        metadata["id"] += "_other"
        file.write_text(json.dumps(metadata))
    run("-c", USE, first, second, HF_HUB_OFFLINE="1")


@pytest.mark.exhaustive
def test_the_repository_is_complete(repository):
    from kernels._rust import Build, Metadata
    from kernels.variants import get_variants_local, resolve_variant

    folder = repository("whole")
    backends = {str(backend) for backend in Build.open(folder).general.backends}
    variants = get_variants_local(folder / "build")
    assert sorted(v.variant_str for v in variants) == sorted(p.name for p in folder.glob("build/*"))
    assert resolve_variant(variants, "cpu")[0].variant_str.startswith("torch-stable-abi210-cpu-")
    for variant in variants:
        copy = folder / "build" / variant.variant_str
        metadata = Metadata.read_from_file(copy / "metadata.json")
        assert (str(metadata.name), metadata.version) == ("boft-ops", 1)
        assert str(metadata.backend.backend_type) in backends
        assert metadata.id.isidentifier()
        assert (copy / "libboft_native.so").exists() == (variant.variant_str.endswith("-linux"))
        assert (copy / "triton_kernels" / "rotate.py").is_file()
    card = (folder / "README.md").read_text()
    assert "{" not in card
    assert all(f"`{variant.variant_str}`" in card for variant in variants)


def test_a_folder_with_files_is_refused(run, installed, tmp_path):
    (tmp_path / "file").touch()
    script = ROOT / "hub" / "make_repository.py"
    made = run(script, tmp_path, path=[installed], fails=True)
    assert f"FOLDER: expected a new or empty folder, got {tmp_path}" in made.stderr
