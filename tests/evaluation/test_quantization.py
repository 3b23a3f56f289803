"""The report on rounding: every variant is measured against float32 in both views, and a worse one is told apart."""

from pathlib import Path

import pytest

import trimode
from trimode.errors import SettingError
from trimode.evaluation.quantization import compare, load_variant
from trimode.model import native

GOLDEN = Path(__file__).parents[1] / "golden" / "nld_tiny"
WINDOWS = [[(7 * i + 11 * w) % 90 + 5 for i in range(40)] for w in range(3)]


@pytest.fixture(params=["native", "torch"])
def reference(request):
    if request.param == "native" and not native.available():
        pytest.skip("the native engine was not built")
    return trimode.load(GOLDEN, dtype="float32", backend=request.param)


def test_float32_is_itself_and_rounded_weights_are_near(reference):
    for view, row in zip(("causal", "block"), compare(reference, reference.logits, "bfloat16", WINDOWS), strict=True):
        assert (row["view"], row["agreement"]["value"], row["kl"]["value"]) == (view, 1.0, 0.0)
    for name in ("q8_0", "bfloat16", *(["int8"] if native.available() else [])):
        for row in compare(reference, load_variant(reference, name), name, WINDOWS):
            assert 0 < row["kl_worst"] < 0.2, row


def test_the_variant_int8_is_the_native_engine_or_refused(reference, monkeypatch):
    monkeypatch.setattr(native, "_native", None)
    with pytest.raises(SettingError, match="needs the native engine"):
        load_variant(reference, "int8")
