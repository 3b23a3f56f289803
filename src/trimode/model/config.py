"""What a model is: its sizes and its tri-mode facts, in trimode's own words.

Foreign names (`hidden_size`, `llama.block_count`) are translated in `checkpoint.config_files`; nothing here knows them.
"""

from dataclasses import dataclass
from typing import Literal

__all__ = ["ModelConfig", "RopeConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding: which inverse frequencies, and how queries grow with their position."""

    theta: float = 10_000.0
    """Base of the geometric series of wavelengths."""
    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    """How the frequencies are stretched for long contexts."""
    factor: float = 1.0
    """Stretch of the low frequencies. YaRN with a factor below 1 occurs (Nemotron-Labs-Diffusion-3B-Base: 0.25)."""
    original_max_positions: int | None = None
    """Positions that the model was trained on before it was stretched."""
    beta_fast: float = 32.0
    """YaRN: rotations over the original context above which a frequency stays as it is."""
    beta_slow: float = 1.0
    """YaRN: rotations below which a frequency is divided by the factor."""
    mscale: float | None = None
    """YaRN: numerator of the scale on cos and sin."""
    mscale_all_dim: float | None = None
    """YaRN: denominator of that scale."""
    attention_factor: float | None = None
    """YaRN: scale on cos and sin given outright."""
    truncate: bool = True
    """YaRN: round the ramp's ends to whole dimensions."""
    low_freq_factor: float = 1.0
    """Llama 3: wavelengths longer than original/low are divided by the factor."""
    high_freq_factor: float = 4.0
    """Llama 3: wavelengths shorter than original/high stay as they are."""
    llama4_beta: float | None = None
    """Llama 4: queries are multiplied by 1 + beta * log(1 + floor(position / original_max_positions)). None: off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A Llama-like decoder, and how its block view was trained if it was."""

    family: str
    """The `model_type` that it came from, kept for writing it back."""
    vocab_size: int
    """Rows of the embedding table; ids at or above it do not exist."""
    width: int
    """Size D of the residual stream."""
    mlp_width: int
    """Size of the gated inner layer."""
    num_layers: int
    num_heads: int
    """Query heads H."""
    num_kv_heads: int
    """Key-value heads G; H is a multiple of G."""
    head_size: int
    """Size K of a head; H * K may differ from D."""
    norm_eps: float = 1e-5
    rope: RopeConfig = RopeConfig()
    max_positions: int = 2048
    """Longest context in tokens, prompt and answer together."""
    tied_head: bool = False
    """The output head is the embedding table."""
    qkv_bias: bool = False
    output_bias: bool = False
    """Bias on the attention's output projection."""
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over each head of queries and keys, before RoPE (Qwen 3)."""

    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    """Any of these ends a text."""
    mask_token_id: int | None = None
    """The token that stands for 'not known yet'; None: the checkpoint decodes autoregressively only."""
    block_length: int = 32
    """Tokens in a diffusion block unless a request says otherwise."""
    block_predicts: Literal["self", "next"] = "self"
    """Row j of a block step predicts position j ("self") or j + 1 ("next": checkpoints trained with a shift)."""
    known_tokens_are_causal: bool = False
    """In a block step, the final tokens before the block see causally (converted models: they stay the base model bit for
    bit) instead of seeing the block (Nemotron-Labs-Diffusion)."""
    trained_for_blocks: bool = False
    """Somebody trained the block view; otherwise drafts are noise, and self-speculation is exact but slow."""
    adapter_acts_on: Literal["draft", "masks"] = "draft"
    """Where a draft adapter acts: every input of a self-speculation draft, and nowhere else ("draft": `linear_spec_lora`),
    or the mask inputs of every block step ("masks": converted models)."""

    @property
    def part_sizes(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of each linear map of a layer."""
        D, I, q, kv = self.width, self.mlp_width, self.num_heads * self.head_size, self.num_kv_heads * self.head_size  # noqa: E741
        return {
            "query": (D, q),
            "key": (D, kv),
            "value": (D, kv),
            "output": (q, D),
            "gate": (D, I),
            "up": (D, I),
            "down": (I, D),
        }

    @property
    def num_parameters(self) -> int:
        """Parameters of the model, the tied head counted once."""
        D, K, H, G = self.width, self.head_size, self.num_heads, self.num_kv_heads
        attention = D * K * (H + 2 * G) + H * K * D
        attention += K * (H + 2 * G) * self.qkv_bias + D * self.output_bias + 2 * K * self.qk_norm
        mlp = 3 * D * self.mlp_width + (2 * self.mlp_width + D) * self.mlp_bias
        head = 0 if self.tied_head else self.vocab_size * D
        return self.num_layers * (attention + mlp + 2 * D) + self.vocab_size * D + D + head
