"""From a recipe to a run, and from a run to a checkpoint that decodes in every mode."""

import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from trimode.checkpoint.adapter_files import open_adapter, save_adapter
from trimode.errors import DataError, MissingMaskTokenError, TrainingError
from trimode.model.lora import Lora
from trimode.model.transformer import Transformer
from trimode.training.data import Document, TokenBatch, pack
from trimode.training.objectives import Objective, convert_adapter, matched_drafts
from trimode.training.recipe import Recipe
from trimode.training.trainable import AdapterParameters, TrainableModel

__all__ = [
    "DTYPES",
    "Held",
    "adapter_facts",
    "export_adapter",
    "make_model",
    "make_objective",
    "split_held_out",
    "take_adapter",
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HELD_OUT_DOCUMENTS_PER_FORWARD = 8


def make_model(recipe: Recipe, transformer: Transformer) -> TrainableModel:
    """What the recipe trains, over a transformer loaded unpacked: in the recipe's dtype where it stays frozen, else in float32."""
    config = transformer.config
    if config.mask_token_id is None:
        raise MissingMaskTokenError(
            f"{recipe.base} names no mask token. Set mask_token_id under 'trimode' in its config.json to an unused token."
        )
    if recipe.data.max_tokens > config.max_positions:
        raise TrainingError(
            f"data.max_tokens={recipe.data.max_tokens:,} exceeds the base's context of {config.max_positions:,}. Use less."
        )
    shape = recipe.adapter
    adapter = AdapterParameters(
        transformer,
        rank=shape.rank,
        alpha=shape.alpha,
        parts=shape.parts,
        mask_embedding=True,
        seed=recipe.train.seed,
    )
    return TrainableModel(transformer, adapter.to(transformer.embedding.weight.device))


def make_objective(recipe: Recipe) -> Objective:
    """The objective that the recipe names."""
    return convert_adapter(recipe.blocks)


def split_held_out(documents: list[Document], count: int) -> tuple[list[Document], list[Document]]:
    """Documents to train on, and the last `count` of them to measure with."""
    if count and len(documents) <= count:
        raise DataError(
            f"There are {len(documents)} documents, and data.held_out={count} of them are to be kept aside. Use less."
        )
    return (documents[:-count], documents[-count:]) if count else (documents, [])


class Held:
    """Measures drafts on held-out documents; given to the trainer as its evaluation."""

    def __init__(self, documents: list[Document], block_length: int) -> None:
        self._documents = documents
        self._block_length = block_length

    def __call__(self, model: TrainableModel) -> dict[str, float]:
        sums: dict[str, float] = {}
        num = 0
        for batch in self._batches(model.device):
            for name, value in matched_drafts(model, batch, block_length=self._block_length).items():
                sums[name] = sums.get(name, 0.0) + value * len(batch.lengths)
            num += len(batch.lengths)
        return {name: value / num for name, value in sums.items()}

    def _batches(self, device: torch.device) -> Iterator[TokenBatch]:
        size = HELD_OUT_DOCUMENTS_PER_FORWARD
        for start in range(0, len(self._documents), size):
            chosen = self._documents[start : start + size]
            yield pack(chosen, range(start, start + len(chosen)), device=device)


def adapter_facts(recipe: Recipe, fingerprint: dict[str, object]) -> dict[str, object]:
    """The object `"trimode"` of the adapter's config."""
    return {
        "known_tokens_are_causal": True,
        "adapter_acts_on": "masks",
        "block_predicts": "next",
        "block_length": recipe.block_length,
        "trained_for_blocks": True,
        "base_fingerprint": fingerprint,
    }


def export_adapter(directory: Path, model: TrainableModel, recipe: Recipe, fingerprint: dict[str, object]) -> None:
    """Write the trained adapter in PEFT's layout, in bfloat16, in place of an earlier one. Raises TrainingError if the disk refuses."""
    assert model.adapter is not None
    lora = model.adapter.lora()
    embedding = lora.mask_embedding
    half = Lora(
        {place: (A.detach().bfloat16().cpu(), B.detach().bfloat16().cpu()) for place, (A, B) in lora.factors.items()},
        lora.scale,
        None if embedding is None else embedding.detach().bfloat16().cpu(),
    )
    draft = directory.parent / f".{directory.name}.{secrets.token_hex(4)}"
    try:
        draft.mkdir(parents=True)
        save_adapter(draft, model.config, half, extra={"trimode": adapter_facts(recipe, fingerprint)})
        shutil.rmtree(directory, ignore_errors=True)
        draft.rename(directory)
    except OSError as error:
        raise TrainingError(f"Cannot write {directory}: {error.strerror}. The run's state is intact.") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)  # gone already if all went well


def take_adapter(model: TrainableModel, directory: Path) -> None:
    """Begin from an adapter that was exported before. Raises TrainingError if its rank or parts are others."""
    assert model.adapter is not None
    stored = open_adapter(directory, model.config)
    parts = sorted({name.split("_", 1)[1] for name in model.adapter.A})
    if stored.rank != model.adapter.rank or sorted(stored.parts) != parts:
        raise TrainingError(
            f"The adapter in {directory} has rank {stored.rank} on {', '.join(stored.parts)}; "
            f"the recipe asks for rank {model.adapter.rank} on {', '.join(parts)}. Make them equal."
        )
    model.adapter.take(stored.read())
