"""A tiny model that reads and writes text: random weights behind an alphabet."""

from tests.worlds import EOS, MASK, random_lora, tiny_config, tiny_model
from trimode.text.tokenizer import Tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789 .?\n"
GATED = {"known_tokens_are_causal": True, "block_predicts": "next", "adapter_acts_on": "masks"}


def alphabet():
    """One token a character; ids 0 to 3 are special."""
    from tokenizers import Regex, decoders, pre_tokenizers
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import WordLevel

    names = {0: "<unk>", 1: "<s>", EOS: "</s>", MASK: "<mask>"}
    tokens = {name: i for i, name in names.items()} | {c: i + 4 for i, c in enumerate(LETTERS)}
    backend = Backend(WordLevel(tokens, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>"}
    return Tokenizer(backend, special_tokens=special)


def speaking_model(seed=0, **changes):
    """A converted tiny model with a tokenizer and no chat template."""
    changes = {"vocab_size": len(LETTERS) + 4, **GATED, **changes}
    model = tiny_model(seed, lora=random_lora(tiny_config(**changes)), **changes)
    model.tokenizer = alphabet()
    return model
