"""Shapes and types in trimode's signatures are checked by jaxtyping and beartype while tests run."""

import os

from jaxtyping import install_import_hook

import tests.checker  # noqa: F401  the hook looks it up by name

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# decoding.settings checks what users give by itself, with better words
CHECKED = [
    "trimode.model",
    *(f"trimode.decoding.{m}" for m in ("sampling", "unmasking", "block_diffusion", "self_speculation")),
]
_hook = install_import_hook(CHECKED, "tests.checker.check")

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True, scope="session")
def _threads():
    # tiny models lose more to handing work around than a second thread gains
    torch.set_num_threads(1)
