"""GGUF files, against the gguf package's reader and writer and against transformers."""

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize

from tests.checkpoint.families import LLAMA3, SIZES, foreign_model, foreign_tensors
from trimode.checkpoint import describe, open_checkpoint
from trimode.checkpoint.gguf_files import read_gguf
from trimode.errors import CheckpointError, UnsupportedModelError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

PLACES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """The two halves of each head, row by row in turn: what llama.cpp's converter does to queries and keys."""
    head_rows = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return np.stack([head_rows[:, 0], head_rows[:, 1]], axis=2).reshape(rows.shape)


def write_gguf(path, model, architecture, *, kind=Kind.F32, extra=lambda writer: None, tensors=None):
    """A model of transformers as llama.cpp's converter would write it. Returns what dequantisation should give."""
    config = model.config
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    extra(writer)
    interleaved = architecture in ("llama", "mistral3")
    expected = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.float().numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads and interleaved:
            array = interleave(array, heads)
        stored_kind = kind if array.ndim == 2 else Kind.F32
        data = quantize(array, stored_kind)
        back = dequantize(data, stored_kind).astype(np.float32).reshape(array.shape)
        if heads and interleaved:
            pairs = back.reshape(heads, -1, 2, *back.shape[1:])
            back = np.concatenate([pairs[:, :, 0], pairs[:, :, 1]], axis=1).reshape(back.shape)
        expected[name] = torch.from_numpy(back.copy())
        writer.add_tensor(gguf_name(name), data, raw_dtype=stored_kind)
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def gguf_name(name: str) -> str:
    ends = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in ends or name == "lm_head.weight":
        return ends.get(name, "output.weight")
    _, _, layer, place = name.split(".", 3)
    place, suffix = place.rsplit(".", 1)
    return f"blk.{layer}.{PLACES[place]}.{suffix}"


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize(
    ("architecture", "case"),
    [
        ("llama", "llama"),
        ("llama", "llama tied"),
        ("llama", "llama with biases"),
        ("llama", "llama with its own head size"),
        ("qwen2", "qwen2"),
        ("qwen3", "qwen3"),
    ],
)
def test_every_architecture_comes_back_as_the_model_that_was_converted(architecture, case, tmp_path):
    model = foreign_model(case)
    write_gguf(tmp_path / "model.gguf", model, architecture)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    assert_same(dict(checkpoint.tensors(dtype=torch.float32)), foreign_tensors(model))
    config = checkpoint.config
    assert config.family == model.config.model_type
    assert config.tied_head == model.config.tie_word_embeddings
    assert (config.bos_token_id, config.eos_token_ids, config.max_positions) == (1, (2,), 256)
    assert checkpoint.stored_dtype == "float32"
    assert describe(checkpoint)["parameters"] == sum(p.numel() for p in model.parameters())


def block_model(**changes):
    """Wide enough for the blocks of 256 of the K encodings."""
    sizes = {**SIZES, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, **changes}
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_encoding_that_can_be_written_is_read_as_the_gguf_package_reads_it(kind, dtype, tmp_path):
    model = block_model(vocab_size=9000)  # the embedding takes several chunks
    expected = write_gguf(tmp_path / "model.gguf", model, "llama", kind=kind)
    model.load_state_dict(expected)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    found = dict(checkpoint.tensors(dtype=dtype))
    assert_same(found, {name: tensor.to(dtype) for name, tensor in foreign_tensors(model).items()})
    plain = {Kind.F32: "float32", Kind.F16: "float16", Kind.BF16: "bfloat16"}
    assert checkpoint.stored_dtype == plain.get(kind, "quantized")


def write_raw(path, kind, architecture="llama", *, embedding_bytes):
    """A file whose embedding is made of the given bytes."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(256)
    writer.add_block_count(1)
    writer.add_feed_forward_length(8)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tensor("token_embd.weight", embedding_bytes, raw_dtype=kind)
    shapes = {**dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (256, 256))}
    shapes |= {"ffn_gate": (8, 256), "ffn_up": (8, 256), "ffn_down": (256, 8), "attn_norm": (256,), "ffn_norm": (256,)}
    for place, shape in shapes.items():
        writer.add_tensor(f"blk.0.{place}.weight", np.ones(shape, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(256, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", [Kind.Q4_K, Kind.Q6_K])
def test_encodings_that_cannot_be_written_are_read_from_random_blocks(kind, tmp_path):
    numbers, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    assert numbers == 256
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (64, block_bytes), dtype=np.uint8)
    scales = random.uniform(0.001, 0.1, (64, 2)).astype(np.float16).view(np.uint8)
    if kind is Kind.Q4_K:
        blocks[:, :4] = scales
    else:
        blocks[:, -2:] = scales[:, :2]
    write_raw(tmp_path / "model.gguf", kind, embedding_bytes=blocks)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    name, found = next(iter(checkpoint.tensors(dtype=torch.float32)))
    expected = dequantize(blocks, kind)
    assert name == "embedding.weight"
    assert np.isfinite(expected).all()
    assert torch.equal(found, torch.from_numpy(expected))


def test_other_encodings_and_architectures_are_named_with_those_that_work(tmp_path):
    numbers, block_bytes = gguf.GGML_QUANT_SIZES[Kind.Q5_K]
    write_raw(tmp_path / "a.gguf", Kind.Q5_K, embedding_bytes=np.zeros((64, block_bytes * 256 // numbers), np.uint8))
    with pytest.raises(UnsupportedModelError, match=r"token_embd.weight .* Q5_K.* Q4_K"):
        open_checkpoint(tmp_path / "a.gguf")
    write_raw(tmp_path / "b.gguf", Kind.F32, "gemma3", embedding_bytes=np.ones((64, 256), np.float32))
    with pytest.raises(UnsupportedModelError, match=r"gemma3.*llama, mistral3, qwen2, qwen3"):
        open_checkpoint(tmp_path / "b.gguf")


def test_metadata_equal_the_gguf_packages_own_reading(tmp_path):
    def extra(writer):
        writer.add_token_list(["<s>", "été", "\n"])
        writer.add_token_scores([0.5, -1.0, 2.0])
        writer.add_token_types([3, 1, 1])
        writer.add_chat_template("{{ messages }}")
        writer.add_bool("a.bool", True)
        writer.add_int8("an.int8", -3)
        writer.add_uint64("a.uint64", 1 << 60)
        writer.add_float64("a.float64", 0.1)
        writer.add_array("nested", [["a", "b"], ["c"]])
        writer.add_array("numbers", [1, 2, 3])

    path = tmp_path / "model.gguf"
    write_gguf(path, foreign_model("llama"), "llama", extra=extra)
    metadata, tensors = read_gguf(path)
    theirs = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert {key: value for key, value in metadata.items() if key != "nested"} == {
        key: value for key, value in fields.items() if key != "nested"
    }
    assert metadata["nested"] == [["a", "b"], ["c"]]
    assert {name: tensor.offset for name, tensor in tensors.items()} == {t.name: t.data_offset for t in theirs.tensors}
    assert open_checkpoint(path).gguf_metadata == metadata


def test_yarn_and_llama_4_scaling_are_read_for_ministral(tmp_path):
    def extra(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(64)
        writer.add_rope_scaling_yarn_beta_fast(32.0)
        writer.add_rope_scaling_yarn_beta_slow(1.0)
        writer.add_rope_scaling_yarn_log_mul(1.0)
        writer.add_attn_temperature_scale(0.1)

    model = foreign_model("ministral3")
    model.save_pretrained(tmp_path / "theirs")
    write_gguf(tmp_path / "model.gguf", model, "mistral3", extra=extra)
    converted, original = open_checkpoint(tmp_path / "model.gguf"), open_checkpoint(tmp_path / "theirs")
    assert converted.config.rope.llama4_beta == pytest.approx(0.1)
    same = {"llama4_beta": None}
    from dataclasses import replace

    assert replace(converted.config.rope, **same) == replace(original.config.rope, **same)
    assert_same(dict(converted.tensors(dtype=torch.float32)), foreign_tensors(model))


def divisors(rope, head_size):
    """Llama 3's table as llama.cpp's converter computes it, in float32 at the end."""
    frequencies = rope["rope_theta"] ** (-np.arange(0, head_size, 2) / head_size)
    wavelengths = 2 * np.pi / frequencies
    original, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    found = []
    for wavelength in wavelengths:
        if wavelength < original / high:
            found.append(1.0)
        elif wavelength > original / low:
            found.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


@pytest.mark.parametrize(
    "rope",
    [
        LLAMA3,
        {**LLAMA3, "rope_theta": 500_000.0, "original_max_position_embeddings": 8192},
        {**LLAMA3, "factor": 32.0, "rope_theta": 500_000.0, "original_max_position_embeddings": 8192},
        {**LLAMA3, "high_freq_factor": 6.5, "rope_theta": 500_000.0, "original_max_position_embeddings": 10_000},
    ],
)
def test_llama_3_rope_is_recovered_from_its_table(rope, tmp_path):
    model = foreign_model("llama")
    model.config.head_dim = 8
    path = tmp_path / "model.gguf"
    sizes = {"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    model = block_model(**sizes, rope_parameters=rope)
    write_gguf(path, model, "llama", tensors={"rope_freqs.weight": divisors(rope, 128)})
    found = open_checkpoint(path).config.rope
    assert found.kind == "llama3"
    assert found.original_max_positions == rope["original_max_position_embeddings"]
    assert found.factor == rope["factor"]
    assert found.high_freq_factor == pytest.approx(rope["high_freq_factor"], rel=1e-4)
    assert found.low_freq_factor == 1.0


def test_a_table_that_is_not_llama_3s_is_refused(tmp_path):
    model = block_model()
    strange = np.linspace(1, 5, 32, dtype=np.float32)
    write_gguf(tmp_path / "model.gguf", model, "llama", tensors={"rope_freqs.weight": strange})
    with pytest.raises(UnsupportedModelError, match="not Llama 3"):
        open_checkpoint(tmp_path / "model.gguf")
    write_gguf(tmp_path / "b.gguf", model, "llama", tensors={"rope_freqs.weight": strange[:5]})
    with pytest.raises(CheckpointError, match="32 float32 numbers"):
        open_checkpoint(tmp_path / "b.gguf")
    write_gguf(tmp_path / "c.gguf", model, "llama", tensors={"rope_freqs.weight": np.ones(32, np.float32)})
    assert open_checkpoint(tmp_path / "c.gguf").config.rope.kind == "default"


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        (lambda writer: writer.add_expert_count(8), "mixture of experts"),
        (lambda writer: writer.add_rope_dimension_count(4), "a part of each head"),
        (lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), "longrope"),
        (lambda writer: writer.add_rope_scaling_attn_factors(2.0), "attn_factor"),
    ],
)
def test_what_a_gguf_asks_for_beyond_trimode_is_named(extra, told, tmp_path):
    write_gguf(tmp_path / "model.gguf", foreign_model("llama"), "llama", extra=extra)
    with pytest.raises(UnsupportedModelError, match=told):
        open_checkpoint(tmp_path / "model.gguf")


def test_linear_scaling_and_a_sliding_window_are_read(tmp_path):
    def extra(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(2.0)
        writer.add_sliding_window(100)

    write_gguf(tmp_path / "model.gguf", foreign_model("llama"), "llama", extra=extra)
    config = open_checkpoint(tmp_path / "model.gguf").config
    assert (config.rope.kind, config.rope.factor, config.max_positions) == ("linear", 2.0, 100)


def test_missing_tensors_are_named_as_gguf_names_them(tmp_path):
    model = foreign_model("llama")
    del model.model.layers[1].self_attn.k_proj
    write_gguf(tmp_path / "model.gguf", model, "llama")
    with pytest.raises(CheckpointError, match=r"lacks a tensor: blk.1.attn_k.weight"):
        open_checkpoint(tmp_path / "model.gguf")
