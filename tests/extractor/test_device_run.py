"""What a run on a GPU is made by and what its forward calls, as far as that shows without one."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from headwater.extractor.maker import made_by, maker
from headwater.extractor.model.activations import ACTIVATIONS
from headwater.kernels.gpu import launch
from headwater.store.entry import different


class Calls(TorchDispatchMode):
    """Note every operator of torch that is called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_gelu_in_float32_is_one_call_on_a_device():
    """A number put into a tensor there would be a copy that waits for the device, in every layer."""
    x = torch.empty(3, 5, device="meta")
    with Calls() as calls:
        ACTIVATIONS["gelu_new"](x)
    assert calls.names == ["aten.gelu_.default"]


def test_a_run_on_a_device_is_made_by_its_compiler_and_launch_table(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    of_run = maker("cuda")
    assert of_run["kernels"].startswith(("triton ", "torch"))
    assert not different(maker("cuda"), of_run)

    changed = {key: {size: "16x16 w1 s1" for size in row} for key, row in launch.TABLE.items()}
    with monkeypatch.context() as patch:
        patch.setattr(launch, "TABLE", changed)
        if launch.identity() != "torch":
            assert set(different(maker("cuda"), of_run)) == {"kernels"}
    with monkeypatch.context() as patch:
        patch.setattr(launch, "version", lambda name: "0.1")
        assert set(different(maker("cuda"), of_run)) == {"kernels"}


@pytest.mark.parametrize("make", [made_by, maker])
def test_a_run_on_a_cpu_names_no_kernels(make):
    assert "kernels" not in make("cpu")
