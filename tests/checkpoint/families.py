"""Tiny random models of every family, as transformers makes and saves them."""

import torch
import transformers

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
NLD_YARN = {**YARN, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 3.0}

CASES = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama 3 rope": ("llama", {"rope_parameters": LLAMA3}),
    "llama linear rope": ("llama", {"rope_parameters": LINEAR}),
    "llama with its own head size": ("llama", {"head_dim": 16}),
    "llama without grouped queries": ("llama", {"num_key_value_heads": 4}),
    "llama with three ends": ("llama", {"eos_token_id": [2, 5, 7]}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral with a window": ("mistral", {"sliding_window": 64}),
    "ministral3": ("ministral3", {"head_dim": 8, "rope_parameters": {**NLD_YARN, "llama_4_scaling_beta": 0.1}}),
    "qwen2": ("qwen2", {}),
    "qwen2 yarn": ("qwen2", {"rope_parameters": YARN, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3 with biases": ("qwen3", {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}),
}


def foreign_config(case: str):
    model_type, changes = CASES[case]
    return transformers.AutoConfig.for_model(model_type, **{**SIZES, **changes})


def foreign_model(case: str, seed: int = 0):
    """A model whose every parameter is random, biases and norms too."""
    model = transformers.AutoModelForCausalLM.from_config(foreign_config(case)).eval()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=random)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.2 * noise)
    return model


def foreign_tensors(model) -> dict[str, torch.Tensor]:
    """The model's own tensors fused under trimode's names, written down here a second time as the oracle."""
    state = model.state_dict()
    fused = {"embedding.weight": state["model.embed_tokens.weight"], "norm.weight": state["model.norm.weight"]}
    if not model.config.tie_word_embeddings:
        fused["head.weight"] = state["lm_head.weight"]
    groups = {
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "output": ("self_attn.o_proj",),
        "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
        "down": ("mlp.down_proj",),
        "attention_norm": ("input_layernorm",),
        "mlp_norm": ("post_attention_layernorm",),
        "q_norm": ("self_attn.q_norm",),
        "k_norm": ("self_attn.k_norm",),
    }
    for i in range(model.config.num_hidden_layers):
        for own, theirs in groups.items():
            for kind in ("weight", "bias"):
                if f"model.layers.{i}.{theirs[0]}.{kind}" in state:
                    pieces = [state[f"model.layers.{i}.{name}.{kind}"] for name in theirs]
                    fused[f"layers.{i}.{own}.{kind}"] = torch.cat(pieces)
    return fused
