"""Hugging Face directories in and out, against transformers."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.checkpoint.families import (
    CASES,
    LLAMA3,
    NLD_YARN,
    SIZES,
    YARN,
    foreign_config,
    foreign_model,
    foreign_tensors,
)
from trimode.checkpoint import describe, open_checkpoint, save_checkpoint
from trimode.checkpoint.config_files import read_config
from trimode.errors import CheckpointError, UnsupportedModelError
from trimode.model.rope import inverse_frequencies

# transformers warns about its own internals while it saves and loads
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def own_tensors(checkpoint, dtype=torch.float32):
    return dict(checkpoint.tensors(dtype=dtype))


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("case", CASES)
def test_import_fuses_exactly_the_tensors_that_transformers_saved(case, tmp_path):
    model = foreign_model(case)
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert_same(own_tensors(checkpoint), foreign_tensors(model))
    assert describe(checkpoint)["parameters"] == sum(p.numel() for p in model.parameters())
    assert next(iter(checkpoint.tensors(dtype=torch.float32)))[0] == "embedding.weight"


@pytest.mark.parametrize("case", CASES)
def test_import_then_export_is_the_identity_for_trimode_and_for_transformers(case, tmp_path):
    model = foreign_model(case)
    model.save_pretrained(tmp_path / "theirs")
    first = open_checkpoint(tmp_path / "theirs")
    save_checkpoint(tmp_path / "ours", first.config, first.tensors(dtype=torch.float32))
    again = open_checkpoint(tmp_path / "ours")
    assert again.config == first.config
    assert_same(own_tensors(again), own_tensors(first))

    back, loading = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert type(back) is type(model)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    ids = torch.arange(1, 41)[None]  # within the window of the case that has one: there both are the same function
    with torch.no_grad():
        assert torch.equal(back.eval()(ids).logits, model(ids).logits)


@pytest.mark.parametrize("case", CASES)
def test_config_values_equal_what_transformers_computes(case, tmp_path):
    foreign = foreign_config(case)
    foreign.save_pretrained(tmp_path)
    config = read_config(json.loads((tmp_path / "config.json").read_text()), where="config.json")
    assert config.family == foreign.model_type
    assert config.head_size == (getattr(foreign, "head_dim", None) or 32 // 4)
    assert (config.width, config.mlp_width, config.vocab_size) == (32, 48, 61)
    assert config.num_kv_heads == foreign.num_key_value_heads
    assert config.norm_eps == foreign.rms_norm_eps
    assert config.tied_head == foreign.tie_word_embeddings
    eos = foreign.eos_token_id
    assert config.eos_token_ids == tuple(eos if isinstance(eos, list) else [eos])
    window = getattr(foreign, "sliding_window", None)
    assert config.max_positions == min(256, window or 256)

    model = foreign_model(case)
    frequencies, scale = inverse_frequencies(config.rope, config.head_size)
    torch.testing.assert_close(frequencies, model.model.rotary_emb.inv_freq, rtol=2e-6, atol=0)
    assert scale == pytest.approx(model.model.rotary_emb.attention_scaling)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "ministral3", "qwen2", "qwen3"])
def test_what_a_config_leaves_out_takes_the_default_of_the_familys_own_class(model_type):
    sparse = {
        "model_type": model_type,
        **{"vocab_size": 64, "hidden_size": 1024, "intermediate_size": 64, "num_hidden_layers": 1},
        "num_attention_heads": 32,
    }
    theirs = transformers.AutoConfig.for_model(**sparse)
    config = read_config(sparse, where="config.json")
    assert config.num_kv_heads == theirs.num_key_value_heads
    assert config.head_size == (getattr(theirs, "head_dim", None) or 1024 // 32)
    assert config.norm_eps == theirs.rms_norm_eps
    assert config.max_positions == min(theirs.max_position_embeddings, getattr(theirs, "sliding_window", None) or 10**9)
    assert config.rope.theta == theirs.rope_parameters["rope_theta"]
    assert config.rope.kind == theirs.rope_parameters["rope_type"]
    assert config.bos_token_id == theirs.bos_token_id
    assert config.eos_token_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))
    assert config.qkv_bias == (model_type == "qwen2")


@pytest.mark.parametrize("parameters", [LLAMA3, YARN, {"rope_type": "default", "rope_theta": 5e5}])
def test_old_and_new_spelling_of_rope_mean_the_same(parameters):
    plain = {"model_type": "llama", **SIZES}
    new = read_config({**plain, "rope_parameters": parameters}, where="config.json")
    old_scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    old_scaling["type"] = old_scaling.pop("rope_type")
    old = {**plain, "rope_theta": parameters["rope_theta"], "rope_scaling": old_scaling}
    if old_scaling["type"] == "default":
        old["rope_scaling"] = None
    assert read_config(old, where="config.json") == new


def test_a_yarn_factor_below_one_is_kept_as_the_file_has_it():
    raw = {"model_type": "nemotron_labs_diffusion", **SIZES, "max_position_embeddings": 4096}
    raw["rope_parameters"] = {**NLD_YARN, "factor": 0.25, "original_max_position_embeddings": 16384, "rope_theta": 1e6}
    config = read_config(raw, where="config.json")
    assert config.rope.factor == 0.25
    assert config.head_size == 128
    frequencies, scale = inverse_frequencies(config.rope, 128)
    # The two constants were computed from the formula in the reference's arithmetic.
    assert frequencies[36].item() == pytest.approx(0.001612369, rel=1e-6)
    assert frequencies[63].item() == pytest.approx(4.963751e-06, rel=1e-6)
    assert scale == 1.0


def test_nemotron_configs_ignore_biases_and_treat_minus_one_as_no_mask():
    raw = {"model_type": "nemotron_labs_diffusion", **SIZES, "rope_parameters": NLD_YARN}
    config = read_config({**raw, "attention_bias": True, "mlp_bias": True, "mask_token_id": -1}, where="config.json")
    assert not (config.qkv_bias)
    assert not (config.output_bias)
    assert not (config.mlp_bias)
    assert config.mask_token_id is None
    assert read_config(raw, where="config.json").mask_token_id is None
    config = read_config({**raw, "mask_token_id": 60, "block_size": 16}, where="config.json")
    assert (config.mask_token_id, config.block_length, config.trained_for_blocks) == (60, 16, True)
    assert (config.adapter_acts_on, config.known_tokens_are_causal) == ("draft", False)


def test_a_qwen_window_counts_only_if_some_layer_slides():
    raw = {"model_type": "qwen2", **SIZES, "use_sliding_window": True, "sliding_window": 32}
    assert read_config({**raw, "max_window_layers": 1}, where="config.json").max_positions == 32
    assert read_config({**raw, "max_window_layers": 2}, where="config.json").max_positions == 256
    assert read_config({**raw, "use_sliding_window": False}, where="config.json").max_positions == 256
    kinds = ["full_attention", "sliding_attention"]
    assert read_config({**raw, "layer_types": kinds}, where="config.json").max_positions == 32


def test_the_end_of_text_comes_from_generation_config_and_sampling_only_if_it_samples(tmp_path):
    foreign_model("llama").save_pretrained(tmp_path)

    def opened(**generation):
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return open_checkpoint(tmp_path)

    assert opened(eos_token_id=[5, 6]).config.eos_token_ids == (5, 6)
    assert opened().config.eos_token_ids == (2,)
    assert opened(temperature=0.6).generation_defaults == {}
    assert opened(do_sample=False, temperature=0.6).generation_defaults == {"temperature": 0.0}
    sampled = opened(do_sample=True, temperature=0.6, top_p=0.95, top_k=20)
    assert sampled.generation_defaults == {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
    with pytest.raises(CheckpointError, match="temperature"):
        opened(do_sample=True, temperature="warm")


TRIMODE = {
    "mask_token_id": 60,
    "block_length": 8,
    "block_predicts": "next",
    "known_tokens_are_causal": True,
    "trained_for_blocks": True,
    "adapter_acts_on": "masks",
}


def test_trimodes_own_facts_ride_along_and_transformers_does_not_mind(tmp_path):
    from dataclasses import replace

    model = foreign_model("qwen3")
    model.save_pretrained(tmp_path / "base")
    base = open_checkpoint(tmp_path / "base")
    assert describe(base)["modes"] == ["ar"]
    converted = replace(base.config, **TRIMODE)
    save_checkpoint(tmp_path / "converted", converted, base.tensors(dtype=torch.float32))
    assert json.loads((tmp_path / "converted" / "config.json").read_text())["trimode"] == TRIMODE
    again = open_checkpoint(tmp_path / "converted")
    assert again.config == converted
    assert describe(again)["modes"] == ["ar", "diffusion", "self_spec"]
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "converted").eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(back(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        ({"mask_token": 3}, "mask_token_id"),
        ({"mask_token_id": "3"}, "mask_token_id"),
        ({"mask_token_id": 61}, "outside its vocabulary"),
        ({"block_length": 0}, "block_length"),
        ({"block_predicts": "both"}, "block_predicts"),
        ({"trained_for_blocks": 1}, "trained_for_blocks"),
        ([], None),
        ("x", "trimode"),
    ],
)
def test_wrong_facts_are_named(facts, told):
    raw = {"model_type": "llama", **SIZES, "trimode": facts}
    if told is None:
        with pytest.raises(CheckpointError):
            read_config(raw, where="config.json")
        return
    with pytest.raises(CheckpointError, match=told) as caught:
        read_config(raw, where="config.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "told", "kind"),
    [
        ({"model_type": "lama"}, "Did you mean 'llama'", UnsupportedModelError),
        ({"model_type": None}, "model_type", CheckpointError),
        ({"hidden_act": "gelu"}, "gelu", UnsupportedModelError),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic", UnsupportedModelError),
        ({"rope_scaling": {"rope_type": "longrope"}}, "longrope", UnsupportedModelError),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "0.5", UnsupportedModelError),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "each kind", UnsupportedModelError),
        ({"rope_parameters": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor", CheckpointError),
        ({"rope_parameters": {**LLAMA3, "factor": float("nan")}}, "factor", CheckpointError),
        ({"rope_theta": 0}, "rope_theta", CheckpointError),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised", UnsupportedModelError),
        ({"hidden_size": 0}, "hidden_size", CheckpointError),
        ({"hidden_size": -32}, "hidden_size", CheckpointError),
        ({"hidden_size": 33}, "multiple", CheckpointError),
        ({"hidden_size": "32"}, "hidden_size", CheckpointError),
        ({"hidden_size": True}, "hidden_size", CheckpointError),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers", CheckpointError),
        ({"num_key_value_heads": 3}, "multiple", CheckpointError),
        ({"head_dim": 7}, "even", CheckpointError),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps", CheckpointError),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings", CheckpointError),
        ({"eos_token_id": "end"}, "eos_token_id", CheckpointError),
        ({"rope_parameters": 3}, "rope_parameters", CheckpointError),
    ],
)
def test_a_config_that_cannot_be_run_says_why_in_one_line(changes, told, kind):
    with pytest.raises(kind, match=told) as caught:
        read_config({"model_type": "llama", **SIZES, **changes}, where="config.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"])
def test_a_missing_size_is_named(key):
    raw = {name: value for name, value in {"model_type": "llama", **SIZES}.items() if name != key}
    with pytest.raises(CheckpointError, match=f"{key} in config.json .* missing"):
        read_config(raw, where="config.json")


def test_shards_hold_the_same_as_one_file_in_both_directions(tmp_path):
    model = foreign_model("llama with biases")
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 2
    first = open_checkpoint(tmp_path / "theirs")
    assert_same(own_tensors(first), foreign_tensors(model))
    save_checkpoint(tmp_path / "ours", first.config, first.tensors(dtype=torch.float32), max_shard_bytes=20_000)
    names = sorted(path.name for path in (tmp_path / "ours").glob("*.safetensors"))
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert all(path.stat().st_size < 60_000 for path in (tmp_path / "ours").glob("*.safetensors"))
    assert_same(own_tensors(open_checkpoint(tmp_path / "ours")), own_tensors(first))
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert_same(dict(back.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize(
    "prefix", ["encoder.", "model.", "language_model.", "language_model.model.", "model.language_model.", ""]
)
@pytest.mark.parametrize("head", ["lm_head.weight", "diffusion_head.weight"])
def test_any_wrapper_class_may_have_saved_the_tensors(prefix, head, tmp_path):
    model = foreign_model("llama")
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    renamed = {name.replace("model.", prefix, 1): tensor for name, tensor in state.items() if name != "lm_head.weight"}
    renamed[head] = state["lm_head.weight"]
    renamed[f"{prefix}layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # a buffer of old checkpoints
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same(own_tensors(open_checkpoint(tmp_path)), foreign_tensors(model))


def test_the_language_half_of_a_seeing_checkpoint_is_opened(tmp_path):
    model = foreign_model("ministral3")
    model.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mistral3", "text_config": raw, "vision_config": {}, "trimode": {"mask_token_id": 9}})
    )
    state = load_file(tmp_path / "model.safetensors")
    state = {f"language_model.{name}": tensor for name, tensor in state.items()}
    state["vision_tower.patch_conv.weight"] = torch.zeros(3, 3)
    save_file(state, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.config.family, checkpoint.config.mask_token_id) == ("ministral3", 9)
    assert_same(own_tensors(checkpoint), foreign_tensors(model))


def test_a_tied_checkpoint_may_carry_its_head_once_more(tmp_path):
    model = foreign_model("llama tied")
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file({**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config.tied_head
    assert "head.weight" not in own_tensors(checkpoint)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float16, torch.bfloat16])
def test_numbers_are_rounded_once_from_what_is_stored(stored, wanted, tmp_path):
    model = foreign_model("qwen2").to(stored)
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    expected = {name: tensor.to(wanted) for name, tensor in foreign_tensors(model).items()}
    assert_same(own_tensors(checkpoint, wanted), expected)
    names = {torch.float64: "float32"}
    assert checkpoint.stored_dtype == names.get(stored, str(stored).removeprefix("torch."))
    assert checkpoint.weight_bytes == sum(p.numel() * p.element_size() for p in model.parameters())
    assert checkpoint.gguf_metadata is None


def test_tensors_larger_than_a_chunk_arrive_whole(tmp_path):
    config = transformers.LlamaConfig(**{**SIZES, "vocab_size": 70_001, "num_hidden_layers": 1})
    model = transformers.LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    found = own_tensors(checkpoint)
    assert_same(found, {name: tensor.float() for name, tensor in foreign_tensors(model).items()})


def rewritten(directory, change):
    state = load_file(directory / "model.safetensors")
    change(state)
    save_file(state, directory / "model.safetensors")


def test_missing_extra_and_misshapen_tensors_are_named(tmp_path):
    def check(change, told):
        foreign_model("llama").save_pretrained(tmp_path)
        rewritten(tmp_path, change)
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(tmp_path)
        assert told in str(caught.value)
        assert "\n" not in str(caught.value)

    check(lambda state: state.pop("model.norm.weight"), "lacks a tensor: model.norm.weight")
    check(lambda state: state.pop("lm_head.weight"), "lacks a tensor: lm_head.weight")
    check(lambda state: state.update({"model.layers.2.norm": torch.ones(2)}), "model.layers.2.norm")
    check(lambda state: state.update({f"extra.{i}": torch.ones(1) for i in range(7)}), "and 2 more")
    check(
        lambda state: state.update({"model.norm.weight": torch.ones(31)}),
        "model.norm.weight is [31], expected [32]",
    )
    check(lambda state: state.update({"norm.weight": torch.ones(32)}), "mean the same")
    check(
        lambda state: state.update({"model.norm.weight": torch.ones(32, dtype=torch.uint8)}),
        "model.norm.weight of",
    )
    check(lambda state: [state.pop(name) for name in list(state)[1:]], "too few for 2 layers")


def test_export_refuses_what_would_lose_something(tmp_path):
    from dataclasses import replace

    foreign_model("llama").save_pretrained(tmp_path / "base")
    base = open_checkpoint(tmp_path / "base")
    tensors = own_tensors(base)

    def refused(config, items, told, directory="out"):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(CheckpointError, match=told):
            save_checkpoint(tmp_path / directory, config, items)
        assert sorted(tmp_path.rglob("*")) == before

    refused(base.config, tensors.items(), "not empty", directory="base")
    refused(base.config, list(tensors.items())[1:], "embedding.weight did not come")
    refused(base.config, [*tensors.items(), ("norm.weight", tensors["norm.weight"])], "came twice")
    refused(base.config, [("nose.weight", torch.ones(3))], "nose.weight is no parameter")
    refused(base.config, [("norm.weight", torch.ones(3))], "norm.weight is .3., expected .32.")
    refused(base.config, [("norm.weight", torch.ones(32, dtype=torch.int32))], "floating-point")
    biased = replace(base.config, output_bias=True)
    biases = {f"layers.{i}.output.bias": torch.zeros(32) for i in range(2)}
    refused(biased, {**tensors, **biases}.items(), "cannot say output_bias")
    refused(replace(base.config, family="gpt2"), tensors.items(), "gpt2")

    def breaks_off():
        yield "norm.weight", tensors["norm.weight"]
        raise RuntimeError("the power went")

    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RuntimeError, match="power"):
        save_checkpoint(tmp_path / "out", base.config, breaks_off())
    assert sorted(tmp_path.rglob("*")) == before

    (tmp_path / "empty").mkdir()
    save_checkpoint(tmp_path / "empty", base.config, reversed(tensors.items()))
    assert_same(own_tensors(open_checkpoint(tmp_path / "empty")), tensors)
