"""What a run needs in memory, from the model's shape and the recipe alone, so that it can be said before anything is loaded.

Weights, gradients and the optimiser's moments are exact. Activations are counted from what autograd keeps of a layer, row by row; an
allocator's own losses and the moment of the largest product come on top.
"""

from dataclasses import dataclass

from trimode.model.config import ModelConfig
from trimode.training.recipe import Recipe

__all__ = ["TrainingMemory", "training_memory"]

WIDE = 4
"""Bytes of a trained number, of its gradient and of each of its two moments."""


@dataclass(frozen=True, slots=True)
class TrainingMemory:
    """Bytes on one rank."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def training_memory(config: ModelConfig, recipe: Recipe, num_ranks: int = 1) -> TrainingMemory:
    """Bytes that each of `num_ranks` ranks needs."""
    layer = sum(inputs * outputs for inputs, outputs in config.part_sizes.values())
    in_layers = config.num_layers * layer
    outside = config.num_parameters - in_layers
    held = in_layers // (num_ranks if recipe.train.shard else 1) + outside
    size = 2 if recipe.dtype == "bfloat16" else 4
    if recipe.weights == "full":
        trained, weights = held, held * WIDE
    else:
        trained = num_trained(config, recipe)
        weights = held * size + trained * WIDE
    return TrainingMemory(weights, trained * WIDE, trained * 2 * WIDE, _activations(config, recipe, size))


def num_trained(config: ModelConfig, recipe: Recipe) -> int:
    """Parameters of the recipe's LoRA, with the embedding of the mask where it is trained."""
    sizes = config.part_sizes
    factors = sum(sum(sizes[part]) for part in recipe.adapter.parts) * recipe.adapter.rank * config.num_layers
    return (
        factors + (config.width if recipe.objective == "adapter" else 0) + 3 * config.width * recipe.adapter.successor
    )


def _activations(config: ModelConfig, recipe: Recipe, size: int) -> int:
    documents, length = recipe.train.documents_per_forward, recipe.data.max_tokens
    D, V, q = config.width, config.vocab_size, config.num_heads * config.head_size
    kv = config.num_kv_heads * config.head_size
    full = recipe.weights == "full"
    clean = 0
    match recipe.objective:
        case "adapter" | "drafter":
            if recipe.objective == "adapter":
                longest = max(recipe.blocks.block_lengths)
                rows = documents * min(recipe.blocks.blocks_per_document, length) * (longest - 1)
            else:
                rows = documents * min(recipe.drafter.blocks_per_document, length) * recipe.block_length
            # every row's weights over its text; the text's keys and values
            over_text = config.num_heads * length * size
            clean = documents * length * 2 * kv * size * config.num_layers
        case "ar":
            rows, over_text = documents * length, 0
        case _:
            rows, over_text = documents * 2 * length, 0
    # under autocast the residual stream and the turned queries and keys stay float32
    wide = WIDE if full else size
    per_layer = wide * ((6 if full else 4.5) * D + 4 * q + 3 * kv) + size * 4 * config.mlp_width + over_text
    if not full:
        per_layer += size * len(recipe.adapter.parts) * recipe.adapter.rank
    kept = size * D * config.num_layers + per_layer if recipe.train.recompute else per_layer * config.num_layers
    head = 2 * rows * V * size
    casts = 0
    if full and size < WIDE:
        # autocast rounds weights for the products and keeps them for the gradient, all layers' or, recomputing, one's
        layer = sum(inputs * outputs for inputs, outputs in config.part_sizes.values())
        casts = size * (V * D + layer * (1 if recipe.train.recompute else config.num_layers))
    return int(rows * kept + clean + head + casts)
