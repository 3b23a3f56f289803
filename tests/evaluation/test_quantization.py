"""The report of what rounding changes: nothing for the same model, more for coarser rounding, and its figures by hand."""

import math

import pytest
import torch

import trimode
from tests.evaluation.speaking import speaking_model
from trimode.cli.app import run
from trimode.errors import SettingError
from trimode.evaluation.quantization import check_variants, compare, load_variant, report_windows


@pytest.fixture(scope="module")
def model():
    return speaking_model(width=64, mlp_width=64, num_heads=8)


def test_the_same_model_agrees_everywhere(model):
    for row in compare(model, model.logits, "float32"):
        assert row["agreement"] == {"value": 1.0, "standard_error": 0.0}
        assert row["kl_worst"] == 0.0
        assert row["perplexity"] == row["reference_perplexity"]


def test_agreement_kl_and_perplexity_are_what_their_names_say(model):
    other = speaking_model(1, width=64, mlp_width=64, num_heads=8)
    windows = report_windows(model, 16)[:3]
    causal, block = compare(model, other.logits, "other", windows)
    same, kl, nats = [], [], []
    for window in windows:
        p, q = (m.logits(window).log_softmax(-1) for m in (model, other))
        same += (p.argmax(-1) == q.argmax(-1)).tolist()
        kl += [float(torch.nn.functional.kl_div(q[i], p[i], log_target=True, reduction="sum")) for i in range(len(p))]
        nats += [-float(q[i, window[i + 1]]) for i in range(len(window) - 1)]
    assert causal["places"] == 48
    assert causal["agreement"]["value"] == pytest.approx(sum(same) / len(same))
    assert causal["kl"]["value"] == pytest.approx(sum(kl) / len(kl), rel=1e-4)
    assert causal["kl_worst"] == pytest.approx(max(kl), rel=1e-4)
    assert causal["perplexity"] == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-4)
    # four blocks of three masks a window, each with the adapter on its masks
    assert (block["view"], block["places"]) == ("block", 3 * 4 * 3)
    assert block["kl"]["value"] > 0


def test_q8_0_rounds_less_than_bfloat16_does(model):
    rounded = compare(model, load_variant(model, "q8_0"), "q8_0")[0]
    halved = speaking_model(width=64, mlp_width=64, num_heads=8)
    halved.transformer.to(torch.bfloat16)
    assert 0 < rounded["kl"]["value"] < 0.05
    assert rounded["agreement"]["value"] > 0.9


def test_the_text_comes_with_the_package_and_is_long_enough():
    real = trimode.load("smollm2-135m").tokenizer
    model = speaking_model()
    model.tokenizer = real
    assert 2000 < sum(map(len, report_windows(model))) < 8000
    model.tokenizer = None
    with pytest.raises(SettingError, match="no tokenizer"):
        report_windows(model)


def test_variants_are_checked_before_a_model_is_loaded():
    with pytest.raises(SettingError, match="Did you mean"):
        check_variants(["bfloat"])
    with pytest.raises(SettingError, match="names none"):
        check_variants([])


def test_a_gguf_file_is_rewritten_with_its_matrices_in_q8_0(tmp_path):
    import numpy as np
    from gguf import GGUFReader, GGUFWriter

    from trimode.evaluation.quantization import rewrite_as_q8_0

    source, target = tmp_path / "a.gguf", tmp_path / "b.gguf"
    writer = GGUFWriter(source, "llama")
    writer.add_context_length(77)
    writer.add_token_list(["a", "b"])
    matrix = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    writer.add_tensor("blk.0.attn_q.weight", matrix)
    writer.add_tensor("output_norm.weight", np.ones(64, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    rewrite_as_q8_0(source, target)
    reader = GGUFReader(target)
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    assert kinds == {"blk.0.attn_q.weight": "Q8_0", "output_norm.weight": "F32"}
    assert reader.fields["llama.context_length"].contents() == 77
    assert reader.fields["tokenizer.ggml.tokens"].contents() == ["a", "b"]


def test_the_command_prints_a_row_a_variant_and_view(model, monkeypatch, capfd):
    monkeypatch.setitem(vars(trimode), "load", lambda name, **_: model)
    assert run(["eval", "tiny", "--quantization-report", "--variants", "bfloat16,q8_0"]) == 0
    out = capfd.readouterr().out
    assert out.count("causal") == out.count("block") == 2
    assert max(map(len, out.splitlines())) <= 80
