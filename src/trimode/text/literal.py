"""Special tokens that a person typed are characters, not commands: what stands in a message can never end it."""

import re
import secrets
from collections.abc import Mapping
from typing import Any

from trimode.text.tokenizer import Tokenizer

__all__ = ["LiteralTexts"]


class LiteralTexts:
    """Takes special tokens out of what people wrote, before a template surrounds it with real ones, and puts them back as characters.

    Ids change only where somebody wrote such a token; all other text is encoded in one piece with its template.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = re.compile("|".join(map(re.escape, tokenizer.special_texts)) or r"(?!)")
        # nobody can have written this
        self._mark = f"\ue000{secrets.token_hex(8)}\ue001"
        self._found: list[str] = []

    def hide(self, value: Any) -> Any:
        """The same with every special token in it, however deep, replaced by a mark."""
        if isinstance(value, str):
            return self._special.sub(self._replacement, value)
        if isinstance(value, Mapping):
            return {key: self.hide(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide(item) for item in value]
        return value

    def _replacement(self, match: re.Match[str]) -> str:
        self._found.append(match.group())
        return f"{self._mark}{len(self._found) - 1}\ue002"

    def encode(self, text: str) -> list[int]:
        """The ids of a rendered text: its own special tokens are real, the marked ones are characters."""
        if not self._found:
            return self._tokenizer.encode(text)
        ids = []
        for i, part in enumerate(re.split(f"{self._mark}(\\d+)\ue002", text)):
            if i % 2:
                ids += self._tokenizer.encode(self._found[int(part)], literally=True)
            elif part:
                ids += self._tokenizer.encode(part)
        return ids
