"""The native engine is an extension that may fail to build: trimode then runs through PyTorch, and `trimode info` says so."""

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

SOURCES = [
    "module",
    "model",
    "packing",
    "successor",
    "threads",
    "kernels_amx",
    "kernels_avx512vnni",
    "kernels_avxvnni",
    "kernels_avx2",
    "kernels_portable",
]

setup(
    ext_modules=[
        Pybind11Extension(
            "trimode._native",
            [f"src/trimode/native/{name}.cpp" for name in SOURCES],
            cxx_std=17,
            # no contraction: which products are fused with which sums must not hang on how many rows a kernel has
            extra_compile_args=["-O3", "-ffp-contract=off", "-pthread", "-Wno-maybe-uninitialized"],
            extra_link_args=["-pthread"],
            optional=True,
        )
    ]
)
