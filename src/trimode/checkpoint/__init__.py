"""Checkpoints on disk: the only code that knows foreign names.

`open_checkpoint` reads headers, `Checkpoint.tensors` the weights by trimode's own names, `save_checkpoint` writes a Hugging Face
directory. Nothing here imports torch before weights are asked for, and nothing is ever unpickled.
"""

from trimode.checkpoint.adapter_files import save_adapter
from trimode.checkpoint.presets import PRESETS
from trimode.checkpoint.store import Checkpoint, describe, open_checkpoint, save_checkpoint, save_packed_checkpoint

__all__ = [
    "PRESETS",
    "Checkpoint",
    "describe",
    "open_checkpoint",
    "save_adapter",
    "save_checkpoint",
    "save_packed_checkpoint",
]
