"""Opening by any kind of name, describing from headers alone, adapters, and the reference checkpoint."""

import json
import struct
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.worlds import random_lora, random_tensors, tiny_config
from trimode.checkpoint import describe, open_checkpoint, save_checkpoint
from trimode.device import has_tiles
from trimode.errors import CheckpointError, CheckpointNotFoundError, UnsupportedModelError

GOLDEN = Path(__file__).parent.parent / "golden" / "nld_tiny"


def test_the_reference_checkpoint_opens_and_every_tensor_equals_safetensors_own_load():
    checkpoint = open_checkpoint(GOLDEN)
    state = load_file(GOLDEN / "model.safetensors")
    found = dict(checkpoint.tensors(dtype=torch.float32))
    pieces = []
    for i in range(3):
        layer, own = f"encoder.layers.{i}.", f"layers.{i}."
        q, k, v = (state[f"{layer}self_attn.{name}_proj.weight"] for name in "qkv")
        assert torch.equal(found[f"{own}qkv.weight"], torch.cat([q, k, v]))
        gate, up = state[f"{layer}mlp.gate_proj.weight"], state[f"{layer}mlp.up_proj.weight"]
        assert torch.equal(found[f"{own}gate_up.weight"], torch.cat([gate, up]))
        assert torch.equal(found[f"{own}output.weight"], state[f"{layer}self_attn.o_proj.weight"])
        assert torch.equal(found[f"{own}down.weight"], state[f"{layer}mlp.down_proj.weight"])
        assert torch.equal(found[f"{own}attention_norm.weight"], state[f"{layer}input_layernorm.weight"])
        assert torch.equal(found[f"{own}mlp_norm.weight"], state[f"{layer}post_attention_layernorm.weight"])
        pieces += [f"{own}{name}.weight" for name in ("attention_norm", "qkv", "output", "mlp_norm", "gate_up", "down")]
    assert torch.equal(found["embedding.weight"], state["encoder.embed_tokens.weight"])
    assert torch.equal(found["norm.weight"], state["encoder.norm.weight"])
    assert torch.equal(found["head.weight"], state["diffusion_head.weight"])
    assert list(found) == ["embedding.weight", *pieces, "norm.weight", "head.weight"]


def test_the_reference_checkpoints_config_and_adapter_are_read_as_written():
    checkpoint = open_checkpoint(str(GOLDEN))
    config = checkpoint.config
    assert (config.mask_token_id, config.block_length, config.eos_token_ids) == (100, 8, (11,))
    assert (config.trained_for_blocks, config.adapter_acts_on, config.tied_head) == (True, "draft", False)
    assert (config.rope.kind, config.rope.factor, config.rope.llama4_beta) == ("yarn", 16.0, 0.1)
    assert config.rope.original_max_positions == 32
    lora = checkpoint.adapter()
    state = load_file(GOLDEN / "linear_spec_lora" / "adapter_model.safetensors")
    assert lora.scale == 4.0
    assert lora.factors.keys() == {(i, "output") for i in range(3)}
    for i in range(3):
        for factor, half in zip(lora.factors[i, "output"], "AB", strict=True):
            name = f"base_model.model.encoder.layers.{i}.self_attn.o_proj.lora_{half}.weight"
            assert torch.equal(factor, state[name])
            assert factor.dtype == torch.float32
    assert describe(checkpoint)["adapter"] == {"rank": 4, "parts": ["output"], "parameters": 1536}


def test_export_of_the_reference_checkpoint_gives_back_its_tensors_by_their_names(tmp_path):
    first = open_checkpoint(GOLDEN)
    save_checkpoint(
        tmp_path / "out", first.config, first.tensors(dtype=torch.float32), adapter=first.adapter(),
    )  # fmt: skip
    for file in ("model.safetensors", "linear_spec_lora/adapter_model.safetensors"):
        ours, theirs = load_file(tmp_path / "out" / file), load_file(GOLDEN / file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ours = json.loads((tmp_path / "out" / "config.json").read_text())
    theirs = json.loads((GOLDEN / "config.json").read_text())
    assert "trimode" not in ours
    assert ours["architectures"] == theirs["architectures"]
    for key in ("rope_parameters", "mask_token_id", "block_size", "head_dim", "tie_word_embeddings", "eos_token_id"):
        assert ours[key].items() >= theirs[key].items() if isinstance(theirs[key], dict) else ours[key] == theirs[key]
    assert open_checkpoint(tmp_path / "out").config == first.config


ROPE = {
    **{"rope_type": "yarn", "rope_theta": 1e6, "factor": 16, "beta_fast": 32, "beta_slow": 1, "mscale": 1},
    **{"mscale_all_dim": 1, "original_max_position_embeddings": 16384, "llama_4_scaling_beta": 0.1},
}


@pytest.mark.parametrize(
    ("width", "mlp_width", "layers", "parameters", "bf16_bytes"),
    [
        (3072, 9216, 26, 3_831_659_520, 7_663_319_040),
        (4096, 14336, 34, 8_489_553_920, 16_979_107_840),
        (5120, 16384, 40, 13_506_073_600, 27_012_147_200),
    ],
)
def test_published_shapes_are_described_from_headers_alone(width, mlp_width, layers, parameters, bf16_bytes, tmp_path):
    raw = {
        "model_type": "nemotron_labs_diffusion",
        **{"vocab_size": 131072, "hidden_size": width, "intermediate_size": mlp_width, "num_hidden_layers": layers},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "mask_token_id": 100},
        **{"rope_parameters": ROPE, "eos_token_id": 11, "max_position_embeddings": 262144, "block_size": 32},
    }
    (tmp_path / "config.json").write_text(json.dumps(raw))
    shapes = {"encoder.embed_tokens.weight": [131072, width], "diffusion_head.weight": [131072, width]}
    shapes["encoder.norm.weight"] = [width]
    for i in range(layers):
        for name, shape in {
            **{"input_layernorm": [width], "post_attention_layernorm": [width], "self_attn.q_proj": [4096, width]},
            **{"self_attn.k_proj": [1024, width], "self_attn.v_proj": [1024, width], "self_attn.o_proj": [width, 4096]},
            **{"mlp.gate_proj": [mlp_width, width], "mlp.up_proj": [mlp_width, width]},
            "mlp.down_proj": [width, mlp_width],
        }.items():
            shapes[f"encoder.layers.{i}.{name}.weight"] = shape
    assert len(shapes) == 9 * layers + 3
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    raw_header = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw_header)) + raw_header)
        file.truncate(8 + len(raw_header) + end)  # sparse: not a byte of it is written

    facts = describe(open_checkpoint(tmp_path))
    assert facts["parameters"] == parameters
    assert facts["weight_bytes"] == bf16_bytes
    assert (facts["dtype"], facts["layers"], facts["context"]) == ("bfloat16", layers, 262144)
    cache_bytes = 2 * layers * 8 * 128 * 4096 * 2
    # a byte a weight and two of scales for each 32 (192 where the processor has tiles); norms stay in float32
    int8_bytes = facts["memory_bytes"].pop("int8") - cache_bytes
    group = 192 if has_tiles() else 32
    assert bf16_bytes // 2 < int8_bytes < bf16_bytes // 2 * (1 + 2 / group) * 1.001
    assert facts["memory_bytes"] == {
        "bfloat16": bf16_bytes + cache_bytes,
        "float32": 2 * (bf16_bytes + cache_bytes),
    }


def saved(directory, config=None, **arguments):
    config = config or tiny_config()
    save_checkpoint(directory, config, random_tensors(config), **arguments)
    return config


@pytest.mark.parametrize("parts", [("output",), ("query", "key", "value", "output", "gate", "up", "down")])
@pytest.mark.parametrize("family", ["nemotron_labs_diffusion", "llama"])
def test_adapters_come_back_as_they_were_saved(parts, family, tmp_path):
    config = tiny_config(family=family)
    lora = random_lora(config, parts=parts)
    saved(tmp_path / "model", config, adapter=lora, adapter_extra={"trimode": {"trained_for_blocks": True}})
    checkpoint = open_checkpoint(tmp_path / "model")
    again = checkpoint.adapter()
    assert again.scale == lora.scale
    assert again.factors.keys() == lora.factors.keys()
    for place, (A, B) in lora.factors.items():
        assert torch.equal(again.factors[place][0], A)
        assert torch.equal(again.factors[place][1], B)
    facts = describe(checkpoint)
    assert facts["adapter"]["parts"] == list(parts)
    assert facts["adapter"]["parameters"] == sum(tensor.numel() for tensor in lora.tensors())
    assert checkpoint.config == config


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_peft_puts_a_saved_adapter_on_the_same_maps_with_the_same_effect(tmp_path):
    import peft
    import transformers

    config = tiny_config(family="llama", mask_token_id=None, trained_for_blocks=False, block_length=32)
    lora = random_lora(config, parts=("query", "down"))
    saved(tmp_path / "model", config, adapter=lora)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    adapted = peft.PeftModel.from_pretrained(base, str(tmp_path / "model" / "linear_spec_lora")).eval()
    x = torch.randn(5, 32)
    layer = adapted.base_model.model.model.layers[1].self_attn.q_proj
    with torch.no_grad():
        expected = lora.add(1, ["query"], x, [layer.base_layer(x)])[0]
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_adapters_that_peft_saves_are_read(tmp_path):
    import peft
    import transformers

    saved(tmp_path / "model", tiny_config(family="llama"))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    settings = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["o_proj", "gate_proj"], use_rslora=True, init_lora_weights=False
    )
    adapted = peft.get_peft_model(base, settings)
    adapted.save_pretrained(tmp_path / "model" / "linear_spec_lora")
    lora = open_checkpoint(tmp_path / "model").adapter()
    assert lora.scale == 8 / 2  # rank-stabilised: alpha / sqrt(rank)
    assert lora.parts == {"output", "gate"}
    theirs = base.model.layers[1].mlp.gate_proj.lora_A["default"].weight
    assert torch.equal(lora.factors[1, "gate"][0], theirs)


def test_faulty_adapters_are_named(tmp_path):
    config = tiny_config()
    saved(tmp_path, config, adapter=random_lora(config))
    directory = tmp_path / "linear_spec_lora"
    raw = json.loads((directory / "adapter_config.json").read_text())
    state = load_file(directory / "adapter_model.safetensors")

    def check(told, *, kind=CheckpointError, change=lambda state: None, **changes):
        (directory / "adapter_config.json").write_text(json.dumps({**raw, **changes}))
        changed = dict(state)
        change(changed)
        save_file(changed, directory / "adapter_model.safetensors")
        with pytest.raises(kind, match=told) as caught:
            open_checkpoint(tmp_path)
        assert "\n" not in str(caught.value)

    name = "base_model.model.encoder.layers.1.self_attn.o_proj.lora_A.weight"
    check("IA3", kind=UnsupportedModelError, peft_type="IA3")
    check("use_dora", kind=UnsupportedModelError, use_dora=True)
    check("rank_pattern", kind=UnsupportedModelError, rank_pattern={"q_proj": 3})
    check("biases", kind=UnsupportedModelError, bias="all")
    check("r in", r=0)
    check("lora_alpha", lora_alpha="much")
    check("target_modules", target_modules=[])
    check("embed_tokens", kind=UnsupportedModelError, target_modules=["embed_tokens"])
    check(r"lacks layers\.0\.q_proj\.lora_A", target_modules=["o_proj", "q_proj"])
    check("does not announce", target_modules=["q_proj"], change=lambda s: s.update(_renamed(s, "q_proj")))
    check(r"lacks layers\.1\.o_proj\.lora_A", change=lambda state: state.pop(name))
    check("lacks", target_modules=".*o_proj", change=lambda state: state.pop(name))
    check("expected", change=lambda state: state.update({name: torch.ones(3, 31)}))
    check("expected", r=4)
    check("do not adapt", change=lambda state: state.update({"nose": torch.ones(1)}))
    check("do not adapt", change=lambda state: state.update({name.replace(".1.", ".2."): torch.ones(3, 32)}))
    check("unknown key 'blocks'", trimode={"blocks": 3})
    (directory / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no adapter_model"):
        open_checkpoint(tmp_path)


def _renamed(state, part):
    sizes = {"A": (3, 32), "B": (32, 3)}
    return {
        f"base_model.model.encoder.layers.{i}.self_attn.{part}.lora_{half}.weight": torch.ones(sizes[half])
        for i in range(2)
        for half in "AB"
    }


def test_an_adapter_that_does_not_fit_is_not_saved(tmp_path):
    config = tiny_config()
    lora = random_lora(replace(config, width=64))
    with pytest.raises(CheckpointError, match="do not fit"):
        saved(tmp_path / "model", config, adapter=lora)
    with pytest.raises(CheckpointError, match="already taken"):
        saved(tmp_path / "model", config, adapter=random_lora(config), adapter_extra={"r": 9})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["smollm2-135", "no/such/place", "./nowhere", "missing.gguf", "", "a\0b", "x" * 5000])
def test_names_that_are_nothing_get_one_line_with_the_presets(name):
    with pytest.raises(CheckpointNotFoundError, match="smollm2-135m") as caught:
        open_checkpoint(name)
    assert "\n" not in str(caught.value)
    if name == "smollm2-135":
        assert "Did you mean 'smollm2-135m'?" in str(caught.value)


def test_hub_ids_are_fetched_with_their_revision_and_opened(tmp_path, monkeypatch):
    config = saved(tmp_path / "snapshot")
    asked = []

    def snapshot_download(repository, *, revision, allow_patterns):
        asked.append((repository, revision))
        assert {"*.json", "*.jinja", "linear_spec_lora/*"} <= set(allow_patterns)
        assert not any("bin" in pattern for pattern in allow_patterns)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("somebody/something").config == config
    checkpoint = open_checkpoint("some-body/some.thing@refs/pr/3")
    assert asked == [("somebody/something", None), ("some-body/some.thing", "refs/pr/3")]
    assert checkpoint.name == "some-body/some.thing@refs/pr/3"
    assert checkpoint.path == tmp_path / "snapshot"


def test_without_a_network_a_hub_id_is_not_found_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointNotFoundError, match="somebody/something") as caught:
        open_checkpoint("somebody/something")
    assert "\n" not in str(caught.value)


def test_a_local_directory_comes_before_a_hub_id(tmp_path, monkeypatch):
    saved(tmp_path / "somebody" / "something")
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("somebody/something").path == Path("somebody/something")


def test_a_checkpoint_without_a_mask_token_has_one_mode(tmp_path):
    saved(tmp_path / "model", tiny_config(mask_token_id=None))
    facts = describe(open_checkpoint(tmp_path / "model"))
    assert facts["modes"] == ["ar"]
    assert (facts["mask_token_id"], facts["block_length"], facts["adapter"]) == (None, None, None)
    json.dumps(facts)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_mask_embedding_travels_as_pefts_trainable_token(tmp_path):
    import peft
    import transformers

    config = tiny_config(family="llama", adapter_acts_on="masks")
    lora = replace(random_lora(config), mask_embedding=torch.randn(config.width))
    saved(tmp_path / "model", config, adapter=lora)
    checkpoint = open_checkpoint(tmp_path / "model")
    assert torch.equal(checkpoint.adapter().mask_embedding, lora.mask_embedding)
    assert describe(checkpoint)["adapter"]["parameters"] == sum(tensor.numel() for tensor in lora.tensors())
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    adapted = peft.PeftModel.from_pretrained(base, str(tmp_path / "model" / "linear_spec_lora")).eval()
    embedded = adapted.get_input_embeddings()(torch.tensor([4, config.mask_token_id]))
    assert torch.equal(embedded[1], lora.mask_embedding)
    assert torch.equal(embedded[0], base.get_input_embeddings().weight[4])


def test_an_embedding_of_another_token_is_refused(tmp_path):
    config = tiny_config(family="llama", adapter_acts_on="masks")
    saved(tmp_path, config, adapter=replace(random_lora(config), mask_embedding=torch.randn(config.width)))
    where = tmp_path / "linear_spec_lora" / "adapter_config.json"
    raw = json.loads(where.read_text())
    where.write_text(json.dumps({**raw, "trainable_token_indices": [7]}))
    with pytest.raises(UnsupportedModelError, match="mask token"):
        open_checkpoint(tmp_path)


def test_an_adapter_knows_its_base_in_any_dtype_and_refuses_another(tmp_path):
    config = tiny_config(family="llama", adapter_acts_on="masks")
    saved(tmp_path / "first", config)
    fingerprint = open_checkpoint(tmp_path / "first").fingerprint()
    extra = {"trimode": {"base_fingerprint": fingerprint}}

    def beside(name, tensors):
        save_checkpoint(tmp_path / name, config, tensors, adapter=random_lora(config), adapter_extra=extra)
        return open_checkpoint(tmp_path / name)

    same = [(name, tensor.bfloat16()) for name, tensor in random_tensors(config)]
    assert beside("rounded", same).adapter() is not None
    with pytest.raises(CheckpointError, match="another base"):
        beside("other", random_tensors(config, seed=9)).adapter()
    # norms alike, as in models nobody trained: the weights tell them apart
    norms = dict(random_tensors(config))
    mixed = [(name, norms[name] if "norm" in name else tensor) for name, tensor in random_tensors(config, seed=9)]
    with pytest.raises(CheckpointError, match="another base"):
        beside("mixed", mixed).adapter()
