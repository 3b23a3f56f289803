"""A compiler that fails leaves an installation that works through PyTorch."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_failing_compiler_leaves_a_working_installation(tmp_path):
    pytest.importorskip("pybind11")
    copy = tmp_path / "copy"
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", copy / "src", ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    environment = {**os.environ, "CXX": "/bin/false", "CC": "/bin/false"}
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        tmp_path,
        copy,
    ]
    done = subprocess.run(build, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("trimode-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
        archive.extractall(tmp_path / "site")
    code = (
        "import sys, trimode\n"
        "from trimode.model import native\n"
        "assert trimode.__file__.startswith(sys.argv[1]), trimode.__file__\n"
        "assert not native.available() and native.kernel_names() == []\n"
        "model = trimode.load(sys.argv[2])\n"
        "print(model.precision, len(model.generate([5, 6, 7], mode='self_spec', max_new_tokens=6, ignore_eos=True).token_ids))\n"
        "print(trimode.load(sys.argv[2], quantize='int8').precision)\n"
        "from trimode.cli.app import run\n"
        "assert run(['info', sys.argv[2]]) == 0\n"
    )
    golden = ROOT / "tests" / "golden" / "nld_tiny"
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "site"), str(golden)],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.startswith("float32 6\nbfloat16\n")
    assert "no native engine" in ran.stdout
