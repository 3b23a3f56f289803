"""Law 6, the autoregressive families' part: tiny random models give transformers' logits."""

import pytest
import torch
import transformers

import trimode

BASE = {
    "vocab_size": 120,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
MINISTRAL = {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}

FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "llama tied, head size of its own": ("LlamaConfig", {"tie_word_embeddings": True, "head_dim": 24}),
    "llama with biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama 3 scaling": ("LlamaConfig", {"rope_parameters": LLAMA3}),
    "llama linear scaling": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "llama yarn": ("LlamaConfig", {"rope_parameters": YARN}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "ministral3": ("Ministral3Config", {"rope_parameters": MINISTRAL, "head_dim": 32}),
    "ministral3 with a factor below one": (
        "Ministral3Config",
        {"rope_parameters": {**MINISTRAL, "factor": 0.25}, "head_dim": 32},
    ),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "qwen3 with biases": ("Qwen3Config", {"head_dim": 16, "attention_bias": True}),
}


def random_peer(name: str):
    """A random transformers model whose biases and norms are not what they were initialised to."""
    kind, changes = FAMILIES[name]
    torch.manual_seed(0)
    peer = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**{**BASE, **changes})).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return peer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILIES)
def test_tiny_random_models_give_the_logits_of_transformers(name, tmp_path):
    peer = random_peer(name)
    peer.save_pretrained(tmp_path)
    model = trimode.load(tmp_path)
    assert model.dtype == torch.float32
    # long enough to pass the original context and two periods of Llama 4's query scale
    ids = torch.randint(3, 120, (100,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = peer(ids[None]).logits[0]
    torch.testing.assert_close(model.logits(ids.tolist()), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_model_is_read_back_by_transformers_with_the_same_logits(name, tmp_path):
    peer = random_peer(name)
    peer.save_pretrained(tmp_path / "in")
    trimode.load(tmp_path / "in").save(tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ids = torch.randint(3, 120, (1, 60), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.equal(peer(ids).logits, again(ids).logits)


@pytest.mark.filterwarnings("ignore")
def test_greedy_ids_are_those_of_transformers(tmp_path):
    peer = random_peer("llama 3 scaling")
    peer.save_pretrained(tmp_path)
    ids = [5, 9, 30, 77]
    with torch.no_grad():
        out = peer.generate(torch.tensor([ids]), attention_mask=torch.ones(1, 4), do_sample=False, max_new_tokens=50)
    assert trimode.load(tmp_path).generate(ids, mode="ar", max_new_tokens=50).token_ids == out[0, 4:].tolist()
