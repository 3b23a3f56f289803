"""What an answer must match: JSON, a JSON schema, a regular expression or a Lark grammar, over a checkpoint's tokens.

The parsing is llguidance's. Here a state is asked with the answer so far, not told of tokens one by one: it goes back to what two
answers share and forward from there, so that drafts that are rejected need no undoing by anybody.
"""

import json
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from trimode.errors import GrammarError, nearest
from trimode.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch
    from llguidance import LLMatcher

__all__ = ["Grammar", "GrammarKind", "GrammarState", "Grammars"]

GrammarKind = Literal["json_object", "json_schema", "regex", "lark"]
LONGEST_SOURCE = 100_000
"""Characters of a grammar."""
NUM_KEPT = 64
"""Grammars that stay compiled."""


class Grammars:
    """Compiles grammars for one vocabulary, and remembers the last ones."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        """vocab_size: rows of the model's logits."""
        try:
            from llguidance import LLTokenizer
        except ImportError:
            raise GrammarError(
                "Grammars need the package llguidance. Install it: pip install 'trimode[serve]'"
            ) from None
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(eos_token_ids)
        # the library knows of no tokens beyond the tokenizer's: rows without one are never allowed
        self._tokens: LLTokenizer = LLTokenizer(
            tokenizer.to_json(), n_vocab=max(vocab_size, tokenizer.vocab_size), eos_token=self._eos_token_ids
        )
        self._compiled = lru_cache(maxsize=NUM_KEPT)(self._compile)

    def compile(self, kind: GrammarKind, source: Any = None) -> "Grammar":
        """A grammar of this kind. Raises GrammarError in one line."""
        if kind not in get_args(GrammarKind):
            kinds = get_args(GrammarKind)
            raise GrammarError(f"A grammar is one of {', '.join(kinds)}; got {kind!r}.{nearest(str(kind), kinds)}")
        if kind == "json_object":
            if source is not None:
                raise GrammarError("json_object takes no source. Use json_schema to give a schema.")
            source = {"type": "object"}
        if kind in ("json_object", "json_schema"):
            if not isinstance(source, dict | bool):
                raise GrammarError(f"A JSON schema is an object; got {type(source).__name__}.")
            text = json.dumps(source)
        else:
            if not isinstance(source, str) or not source:
                raise GrammarError(f"A {kind} grammar is a text that is not empty; got {type(source).__name__}.")
            text = source
        if len(text) > LONGEST_SOURCE:
            raise GrammarError(f"The grammar has {len(text):,} characters; at most {LONGEST_SOURCE:,} are taken.")
        return self._compiled("json_schema" if kind == "json_object" else kind, text)

    def _compile(self, kind: str, text: str) -> "Grammar":
        from llguidance import LLMatcher

        if kind == "json_schema":
            # one blank at most: free white space lets a small model write blanks until its answer is full
            source = LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": r"[ \n]?"})
        elif kind == "regex":
            source = LLMatcher.grammar_from_regex(text)
        else:
            source = LLMatcher.grammar_from_lark(text)
        fault = LLMatcher.validate_grammar(source, self._tokens)
        if fault and not fault.startswith("WARNING"):
            raise GrammarError(f"The {kind} grammar cannot be used: {_one_line(fault)}")
        matcher = LLMatcher(self._tokens, source, log_level=0)
        if matcher.is_error():
            raise GrammarError(f"The {kind} grammar cannot be used: {_one_line(matcher.get_error())}")
        return Grammar(matcher, self._vocab_size, self._eos_token_ids)


class Grammar:
    """A compiled grammar; each answer starts a state of its own."""

    def __init__(self, matcher: "LLMatcher", vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids

    def start(self) -> "GrammarState":
        """The state of an answer that has no tokens yet."""
        return GrammarState(self._matcher.deep_copy(), self._vocab_size, self._eos_token_ids)


class GrammarState:
    """Which tokens may follow an answer."""

    def __init__(self, matcher: "LLMatcher", vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._read: list[int] = []
        self._last: tuple[tuple[int, ...], torch.Tensor] | None = None

    def allowed(self, answer: Sequence[int]) -> "torch.Tensor":
        """Booleans [V]. Where nothing may follow, and behind what the grammar does not allow, only the end of the text may."""
        import torch

        wanted = tuple(answer)
        if self._last is not None and self._last[0] == wanted:
            return self._last[1]
        allowed = np.zeros(self._vocab_size, dtype=bool)
        if self._go_to(wanted):
            bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
            num = min(len(bits), self._vocab_size)
            allowed[:num] = bits[:num]
        if self._matcher.is_error() or not allowed.any():
            allowed[:] = False
            allowed[self._eos_token_ids] = True
        mask = torch.from_numpy(allowed)
        self._last = (wanted, mask)
        return mask

    def _go_to(self, answer: tuple[int, ...]) -> bool:
        """Bring the parser behind these tokens; False if the grammar does not allow them, or has ended in them."""
        common = 0
        for old, new in zip(self._read, answer, strict=False):
            if old != new:
                break
            common += 1
        if common < len(self._read):
            self._matcher.rollback(len(self._read) - common)
            del self._read[common:]
        rest = list(answer[common:])
        if rest:
            num = self._matcher.try_consume_tokens(rest)
            self._read += rest[:num]
        return len(self._read) == len(answer)


def _one_line(fault: str) -> str:
    """The fault alone; the library shows the place in the grammar below it, which for a schema is one that nobody wrote."""
    lines = [line.strip() for line in fault.splitlines() if line.strip()]
    return " ".join(line for line in lines if "|" not in line and line.strip("^ "))[:300]
