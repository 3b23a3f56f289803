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
    # two blocks of three masks a window, each with the adapter on its masks
    assert (block["view"], block["places"]) == ("block", 3 * 2 * 3)
    assert block["kl"]["value"] > 0


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "m"
    model.save(folder)
    loaded = trimode.load(folder, dtype="float32", backend="torch")
    assert loaded.config.vocab_size == model.config.vocab_size
    return loaded


def test_rounded_weights_are_near_and_not_equal(saved):
    coarse = compare(saved, load_variant(saved, "bfloat16"), "bfloat16")
    fine = compare(saved, load_variant(saved, "q8_0"), "q8_0")
    for rows in (coarse, fine):
        for row in rows:
            assert 0 < row["kl"]["value"] < 0.1
            assert 0.85 < row["agreement"]["value"] <= 1


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


def test_the_command_prints_a_row_a_variant_and_view(saved, capfd):
    assert run(["eval", str(saved.name), "--quantization-report", "--variants", "bfloat16,q8_0"]) == 0
    out = capfd.readouterr().out
    assert out.count("causal") == out.count("block") == 2
    assert max(map(len, out.splitlines())) <= 80
