"""A `tokenizers.Tokenizer` from the vocabulary in a GGUF file's metadata.

GGUF keeps the tokens, their kinds, and merges (byte-level BPE, model `gpt2`) or scores (SentencePiece BPE, model
`llama`). How text is cut before merging is only named (`tokenizer.ggml.pre`); the rules behind the names are here. They
are those of the families' original tokenizer.json files, where other readers of GGUF simplify them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trimode.errors import CheckpointError, UnsupportedModelError, nearest

if TYPE_CHECKING:
    import tokenizers

__all__ = ["build_backend", "read_special_tokens"]

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
"""Kinds of tokens in `tokenizer.ggml.token_type` (2 is unknown, 5 unused, 6 a raw byte)."""

_SPECIAL_TOKEN_KEYS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
    "mask_token": "mask_token_id",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Splitting:
    """How a family of byte-level vocabularies cuts text into the words that merges stay within."""

    pattern: str | None = None
    """Every match is a word. None: GPT-2's pattern, which the library has built in."""
    single_digits: bool = False
    """Each digit is cut out before the pattern is applied."""
    composed: bool = False
    """Characters are put in composed form (NFC) first: e and a combining accent become one letter."""
    ignore_merges: bool = False
    """A word that is itself a token is taken whole, even where no merges lead to it."""
    adds_bos: bool = False
    """A text begins with the bos token unless the file says otherwise."""


_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_PATTERN = _LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_GPT2 = _Splitting()
_SMOLLM = _Splitting(single_digits=True)
_LLAMA3 = _Splitting(pattern=_LLAMA3_PATTERN, ignore_merges=True, adds_bos=True)
_QWEN2 = _Splitting(pattern=_QWEN2_PATTERN, composed=True)
_TEKKEN = _Splitting(pattern=_TEKKEN_PATTERN, ignore_merges=True, adds_bos=True)

_SPLITTINGS = {
    "default": _GPT2,  # also what files without the key get
    "gpt-2": _GPT2,
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "qwen2": _QWEN2,
    "refact": _SMOLLM,
    "smollm": _SMOLLM,
    "starcoder": _SMOLLM,
    "tekken": _TEKKEN,
}


def build_backend(metadata: Mapping[str, Any]) -> "tokenizers.Tokenizer | None":
    """The tokenizer that the `tokenizer.ggml.*` values describe, or None when they describe none.

    Raises UnsupportedModelError for an unknown model or pre-tokenizer, CheckpointError for contradictory arrays.
    """
    model = metadata.get("tokenizer.ggml.model", "none")
    if model in ("none", "no_vocab"):
        return None
    if model not in ("gpt2", "llama"):
        raise UnsupportedModelError(
            f"tokenizer.ggml.model {model!r} is not supported. "
            "Supported: 'gpt2' (byte-level BPE) and 'llama' (SentencePiece BPE)."
        )
    tokens = _required(metadata, "tokens")
    kinds = metadata.get("tokenizer.ggml.token_type")
    if kinds is not None and len(kinds) != len(tokens):
        raise CheckpointError(f"tokenizer.ggml.token_type has {len(kinds)} entries for {len(tokens)} tokens.")
    ids = {token: index for index, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        twice = next(token for index, token in enumerate(tokens) if ids[token] != index)
        raise CheckpointError(f"tokenizer.ggml.tokens holds {twice!r} twice.")
    build = _byte_level if model == "gpt2" else _sentencepiece
    backend, adds_bos = build(metadata, tokens, kinds, ids)
    if kinds is not None:
        _add_marked_tokens(backend, tokens, kinds)
    _add_outer_tokens(backend, metadata, adds_bos)
    return backend


def read_special_tokens(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Role (`bos_token`, ...) to token, for the roles that the file fills.

    Raises CheckpointError for an id outside the vocabulary.
    """
    tokens = _required(metadata, "tokens")
    named = {}
    for role, key in _SPECIAL_TOKEN_KEYS.items():
        index = metadata.get(f"tokenizer.ggml.{key}")
        if index is None:
            continue
        if not 0 <= index < len(tokens):
            raise CheckpointError(f"tokenizer.ggml.{key} is {index}, outside the vocabulary of {len(tokens)} tokens.")
        named[role] = tokens[index]
    return named


def _byte_level(
    metadata: Mapping[str, Any], tokens: list[str], kinds: Sequence[int] | None, ids: dict[str, int]
) -> "tuple[tokenizers.Tokenizer, bool]":
    """Byte-level BPE. `tokenizer.ggml.add_space_prefix` is left unread: it is about SentencePiece vocabularies only."""
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in _SPLITTINGS:
        raise UnsupportedModelError(
            f"tokenizer.ggml.pre {name!r} names a pre-tokenizer that is not known. "
            f"Known: {', '.join(sorted(_SPLITTINGS))}.{nearest(str(name), _SPLITTINGS)}"
        )
    splitting = _SPLITTINGS[name]
    _required(metadata, "merges")
    backend = Tokenizer(BPE(vocab=ids, merges=_given_merges(metadata, ids), ignore_merges=splitting.ignore_merges))
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if splitting.single_digits else []
    if splitting.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(splitting.pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitting.pattern is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    if splitting.composed:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend, splitting.adds_bos


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: list[str], kinds: Sequence[int] | None, ids: dict[str, int]
) -> "tuple[tokenizers.Tokenizer, bool]":
    """SentencePiece BPE: spaces are written "▁", unknown characters become byte tokens, no splitting into words."""
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    if "tokenizer.ggml.merges" in metadata:
        merges = _given_merges(metadata, ids)
    else:
        merges = _merges_from_scores(tokens, _required(metadata, "scores"), kinds, ids)
    unknown = read_special_tokens(metadata).get("unk_token")
    backend = Tokenizer(BPE(vocab=ids, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    # The space in front of a text is put there by a normalizer, as in the original files of Llama 2 and its kin. So
    # each stretch of text between special tokens gets one, and one that begins with spaces gets one more.
    prefixed = metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefixed else spaces
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefixed:
        steps.append(decoders.Strip(content=" ", left=1, right=0))
    backend.decoder = decoders.Sequence(steps)
    return backend, True


def _given_merges(metadata: Mapping[str, Any], ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """The file's merges as pairs, best first."""
    pairs = []
    for merge in metadata["tokenizer.ggml.merges"]:
        cut = merge.find(" ", 1)  # from 1: a part may itself begin with a space
        left, right = merge[:cut], merge[cut + 1 :]
        # Checked here because the library panics instead of raising.
        if cut < 0 or left not in ids or right not in ids or left + right not in ids:
            raise CheckpointError(f"tokenizer.ggml.merges holds {merge!r}, which joins no two tokens to a third.")
        pairs.append((left, right))
    return pairs


def _merges_from_scores(
    tokens: list[str], scores: Sequence[float], kinds: Sequence[int] | None, ids: Mapping[str, int]
) -> list[tuple[str, str]]:
    """The merges that SentencePiece's scores imply: every way to make a token of two, the best-scored token first."""
    if len(scores) != len(tokens):
        raise CheckpointError(f"tokenizer.ggml.scores has {len(scores)} entries for {len(tokens)} tokens.")
    # Control and byte tokens never come from merging, however their spelling splits: "<s>" is not "<" and "s>".
    pieces = {token: index for token, index in ids.items() if kinds is None or kinds[index] == _NORMAL}
    ranked = []
    for token, index in pieces.items():
        cuts = [
            (pieces[token[:cut]], pieces[token[cut:]], cut)
            for cut in range(1, len(token))
            if token[:cut] in pieces and token[cut:] in pieces
        ]
        # Equal scores: longer left part first, then earlier tokens, as the Hugging Face converter orders them.
        ranked += [(-scores[index], -cut, cut - len(token), index, left, right) for left, right, cut in cuts]
    ranked.sort()
    return [(tokens[left], tokens[right]) for *_, left, right in ranked]


def _add_marked_tokens(backend: "tokenizers.Tokenizer", tokens: Sequence[str], kinds: Sequence[int]) -> None:
    """Tokens that are found in text before anything else; control tokens are also skipped in decoding."""
    from tokenizers import AddedToken

    def marked(kind: int) -> list[AddedToken]:
        return [
            AddedToken(token, special=kind == _CONTROL, normalized=False)
            for token, its_kind in zip(tokens, kinds, strict=True)
            if its_kind == kind and token
        ]

    backend.add_special_tokens(marked(_CONTROL))
    backend.add_tokens(marked(_USER_DEFINED))


def _add_outer_tokens(backend: "tokenizers.Tokenizer", metadata: Mapping[str, Any], adds_bos: bool) -> None:
    """What `encode(add_special_tokens=True)` puts before and after a text."""
    from tokenizers.processors import TemplateProcessing

    named = read_special_tokens(metadata)
    wanted = {
        "bos_token": metadata.get("tokenizer.ggml.add_bos_token", adds_bos),
        "eos_token": metadata.get("tokenizer.ggml.add_eos_token", False),
    }
    before = [named["bos_token"]] if wanted["bos_token"] and "bos_token" in named else []
    after = [named["eos_token"]] if wanted["eos_token"] and "eos_token" in named else []
    if before or after:
        backend.post_processor = TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *(f"{token}:1" for token in before), "$B:1", *(f"{t}:1" for t in after)],
            special_tokens=[(token, backend.token_to_id(token)) for token in dict.fromkeys(before + after)],
        )


def _required(metadata: Mapping[str, Any], name: str) -> list[Any]:
    values = metadata.get(f"tokenizer.ggml.{name}")
    if values is None:
        raise CheckpointError(f"the GGUF metadata has no tokenizer.ggml.{name}, which this kind of tokenizer needs.")
    return values
