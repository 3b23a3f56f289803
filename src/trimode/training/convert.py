"""From a recipe to a run, and from a run to a checkpoint that decodes in every mode."""

import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from trimode.checkpoint import Checkpoint, save_checkpoint
from trimode.checkpoint.adapter_files import open_adapter, save_adapter
from trimode.checkpoint.ngram_files import NGRAMS, save_ngrams
from trimode.checkpoint.store import new_directory
from trimode.checkpoint.stored import listed
from trimode.diffusion.corruption import SampleNoise
from trimode.errors import DataError, MissingMaskTokenError, TrainingError
from trimode.model.config import ModelConfig
from trimode.model.transformer import Transformer
from trimode.text.ngrams import count_ngrams
from trimode.text.tokenizer import Tokenizer
from trimode.training.data import Document, TokenBatch, pack
from trimode.training.drafter import accepted_drafts, train_drafter
from trimode.training.joint import autoregressive, diffusion, joint
from trimode.training.objectives import Objective, convert_adapter, matched_drafts
from trimode.training.recipe import Recipe
from trimode.training.trainable import AdapterParameters, TrainableModel, merged_tensors

__all__ = [
    "DTYPES",
    "Held",
    "adapter_facts",
    "choose_mask",
    "export_adapter",
    "export_checkpoint",
    "make_model",
    "make_objective",
    "shard",
    "split_held_out",
    "take_adapter",
    "write_converted",
]

_UNUSED = re.compile(r"mask|unused|reserved|placeholder|extra_id|SPECIAL_\d", re.IGNORECASE)
_NEVER_SEEN = ("<jupyter_script>",)
"""Control tokens for code that chat models of the vocabulary never read: in SmolLM2 it still has the embedding that it began with."""
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
    transformer.recompute = recipe.train.recompute
    if recipe.weights == "full":
        return TrainableModel(transformer)
    if recipe.objective == "drafter" and (not config.trained_for_blocks or config.adapter_acts_on != "draft"):
        raise TrainingError(
            f"{recipe.base} is not a checkpoint whose own block view drafts, so it takes no drafter. "
            "Use objective = 'adapter' to convert it, or 'joint' to train its weights."
        )
    shape = recipe.adapter
    adapter = AdapterParameters(
        transformer,
        rank=shape.rank,
        alpha=shape.alpha,
        parts=shape.parts,
        mask_embedding=recipe.objective == "adapter",
        successor=shape.successor,
        seed=recipe.train.seed,
    )
    return TrainableModel(transformer, adapter.to(transformer.embedding.weight.device))


def make_objective(recipe: Recipe) -> Objective:
    """The objective that the recipe names."""
    match recipe.objective:
        case "adapter":
            return convert_adapter(recipe.blocks)
        case "drafter":
            return train_drafter(recipe.drafter, recipe.block_length)
        case "joint":
            return joint(recipe.joint, recipe.block_length)
        case "diffusion":
            return diffusion(recipe.joint, recipe.block_length)
        case "ar":
            return autoregressive()


def shard(model: TrainableModel) -> None:
    """Spread the layers' weights over the ranks; what lies outside of them stays whole on each."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.transformer.layers:
        fully_shard(layer)


def split_held_out(documents: list[Document], count: int) -> tuple[list[Document], list[Document]]:
    """Documents to train on, and the last `count` of them to measure with."""
    if count and len(documents) <= count:
        raise DataError(
            f"There are {len(documents)} documents, and data.held_out={count} of them are to be kept aside. Use less."
        )
    return (documents[:-count], documents[-count:]) if count else (documents, [])


class Held:
    """Measures on held-out documents what the recipe is after; given to the trainer as its evaluation."""

    def __init__(self, documents: list[Document], recipe: Recipe) -> None:
        self._documents = documents
        self._recipe = recipe

    def _measure(self, model: TrainableModel, batch: TokenBatch) -> dict[str, float]:
        block_length = self._recipe.block_length
        if self._recipe.objective == "adapter":
            return matched_drafts(model, batch, block_length=block_length)
        if self._recipe.objective == "drafter":
            return accepted_drafts(model, batch, block_length=block_length)
        loss = make_objective(self._recipe)(model, batch, SampleNoise(0))
        return {"loss": float(loss.total) / loss.count}

    def __call__(self, model: TrainableModel) -> dict[str, float]:
        sums: dict[str, float] = {}
        num = 0
        for batch in self._batches(model.device):
            for name, value in self._measure(model, batch).items():
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
    if recipe.objective == "drafter":
        return {"adapter_acts_on": "draft", "base_fingerprint": fingerprint}
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
    half = model.adapter.lora().each(lambda tensor: tensor.detach().bfloat16().cpu())
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


def export_checkpoint(directory: Path, model: TrainableModel, recipe: Recipe, tokenizer: Tokenizer | None) -> None:
    """Write trained weights as a Hugging Face directory in bfloat16, in place of an earlier one. Under torchrun every rank calls this
    and the first one writes."""
    config = model.config
    if recipe.objective != "ar":
        config = replace(
            config,
            trained_for_blocks=True,
            block_predicts="self",
            known_tokens_are_causal=False,
            adapter_acts_on="draft",
            block_length=recipe.block_length,
        )
    tensors = ((name, tensor.bfloat16().cpu()) for name, tensor in merged_tensors(model))
    if dist.is_initialized() and dist.get_rank() != 0:
        for _ in tensors:  # takes part in gathering
            pass
        return
    old = directory.parent / f".{directory.name}.{secrets.token_hex(4)}"
    try:
        if directory.exists():
            directory.rename(old)
        save_checkpoint(directory, config, tensors, tokenizer=tokenizer)
    except OSError as error:
        raise TrainingError(f"Cannot write {directory}: {error.strerror}. The run's state is intact.") from error
    finally:
        if old.exists() and not directory.exists():
            old.rename(directory)
        shutil.rmtree(old, ignore_errors=True)


def choose_mask(config: ModelConfig, tokenizer: Tokenizer | None, wanted: str | None = None) -> int:
    """The token that shall stand for what is not known yet: the wanted one, the config's own, or one that no text holds. Raises
    MissingMaskTokenError."""
    if wanted is not None:
        token = int(wanted) if wanted.isascii() and wanted.isdigit() else None
        if token is None and tokenizer is not None:
            token = tokenizer.token_to_id(wanted)
        if token is None or not 0 <= token < config.vocab_size or token in config.eos_token_ids:
            raise MissingMaskTokenError(
                f"{wanted!r} cannot be the mask: it is no token of the vocabulary, or ends texts."
            )
        return token
    if config.mask_token_id is not None:
        return config.mask_token_id
    candidates: list[str] = []
    if tokenizer is not None:
        free = sorted(tokenizer.special_ids - {config.bos_token_id, *config.eos_token_ids})
        names = {i: tokenizer.id_to_token(i) or "" for i in free}
        unused = [i for i in free if _UNUSED.search(names[i])]
        if unused:
            return unused[-1]
        # rows of the embedding that fill it up to a round number
        if tokenizer.id_to_token(config.vocab_size - 1) is None:
            return config.vocab_size - 1
        if never_seen := [i for i in free if names[i] in _NEVER_SEEN]:
            return never_seen[0]
        spoken = set(tokenizer.special_tokens.values())
        candidates = [n for n in names.values() if n not in spoken and n not in (tokenizer.chat_template or "")]
    such = f", such as {listed([repr(n) for n in candidates])}" if candidates else ""
    raise MissingMaskTokenError(
        "The vocabulary has no room for a mask: no reserved token and no spare row. "
        f"Name a token that no text holds by --mask-token{such}."
    )


def write_converted(
    directory: Path, run: Path, recipe: Recipe, base: Checkpoint, documents: Sequence[Document]
) -> None:
    """The checkpoint that a finished run makes of its base, whole or not at all, with a table of what the documents say."""
    ngrams = count_ngrams(((d.ids, d.num_prompt) for d in documents), base.config.vocab_size)
    if recipe.objective != "adapter":
        with new_directory(directory) as draft:
            shutil.copytree(run / "checkpoint", draft, dirs_exist_ok=True)
            save_ngrams(draft / NGRAMS, ngrams)
        return
    stored = open_adapter(run / "adapter", base.config)
    dtype = DTYPES.get(base.stored_dtype, torch.bfloat16)
    extra = {"trimode": {**stored.facts, "base_fingerprint": stored.base}}
    tensors, tokenizer = base.tensors(dtype=dtype), base.tokenizer()
    adapter = stored.read()
    save_checkpoint(
        directory, base.config, tensors, adapter=adapter, adapter_extra=extra, tokenizer=tokenizer, ngrams=ngrams
    )


def take_adapter(model: TrainableModel, directory: Path) -> None:
    """Begin from an adapter that was exported before. Raises TrainingError if its rank, parts or successor are others."""
    assert model.adapter is not None
    stored = open_adapter(directory, model.config)
    parts = sorted({name.split("_", 1)[1] for name in model.adapter.A})
    if stored.rank != model.adapter.rank or sorted(stored.parts) != parts:
        raise TrainingError(
            f"The adapter in {directory} has rank {stored.rank} on {', '.join(stored.parts)}; "
            f"the recipe asks for rank {model.adapter.rank} on {', '.join(parts)}. Make them equal."
        )
    lora = stored.read()
    width = 0 if lora.successor is None else len(lora.successor.inner)
    wanted = 0 if model.adapter.successor is None else len(model.adapter.successor["inner"])
    # one without may get a new one
    if width and width != wanted:
        raise TrainingError(
            f"The adapter in {directory} has a successor of width {width}; the recipe asks for {wanted}. Make them equal."
        )
    model.adapter.take(lora)
