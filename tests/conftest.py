"""Shapes and types in trimode's signatures are checked by jaxtyping and beartype while tests run."""

import os

from jaxtyping import install_import_hook

import tests.checker  # noqa: F401  the hook looks it up by name

os.environ.setdefault("HF_HUB_OFFLINE", "1")
_hook = install_import_hook(["trimode.model", "trimode.decoding"], "tests.checker.check")

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True, scope="session")
def _threads():
    torch.set_num_threads(max(1, min(2, os.cpu_count() or 1)))
