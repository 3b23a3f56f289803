"""Prompts as people write them, to ids as models read them."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from trimode.errors import PromptError
from trimode.model.config import ModelConfig
from trimode.text.chat_template import render_chat, validate_messages
from trimode.text.literal import LiteralTexts
from trimode.text.tokenizer import Tokenizer

__all__ = ["check_ids", "encode_prompt", "is_batch"]


def is_batch(prompt: Any) -> bool:
    """A list of prompts, as opposed to one prompt that happens to be a list (of messages, or of ids)."""
    if isinstance(prompt, str | bytes | Mapping) or not isinstance(prompt, Sequence):
        return False
    if len(prompt) == 0:
        return False
    return not isinstance(prompt[0], Mapping) and not _is_id(prompt[0])


def encode_prompt(
    prompt: Any,
    tokenizer: Tokenizer | None,
    config: ModelConfig,
    *,
    raw: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> tuple[int, ...]:
    """A string, chat messages or ids, to ids. Strings go through the chat template if there is one, unless `raw`.

    Special tokens written in messages are characters; in a raw string they are recognised.
    """
    if isinstance(prompt, str):
        if prompt == "":
            raise PromptError("The prompt is empty. Give it at least one character.")
        if tokenizer is None:
            raise PromptError("This checkpoint has no tokenizer. Give the prompt as a list of ids.")
        if raw or tokenizer.chat_template is None:
            return _not_empty(tokenizer.encode(prompt, add_special_tokens=True))
        prompt = [{"role": "user", "content": prompt}]
    if hasattr(prompt, "tolist"):
        prompt = prompt.tolist()
    if isinstance(prompt, Mapping | bytes) or not isinstance(prompt, Sequence):
        kind = type(prompt).__name__
        raise PromptError(f"A prompt is a string, a list of chat messages or a list of ids; got {kind}.")
    if variables is not None and not isinstance(variables, Mapping):
        raise PromptError(f"template takes a mapping of names to values; got {type(variables).__name__}.")
    if len(prompt) == 0:
        raise PromptError("The prompt is an empty list. Give it at least one prompt, message or id.")
    if isinstance(prompt[0], Mapping):
        messages = validate_messages(prompt)
        if tokenizer is None or tokenizer.chat_template is None:
            raise PromptError("This checkpoint has no chat template. Give the prompt as a string or as a list of ids.")
        literal = LiteralTexts(tokenizer)
        text = render_chat(
            tokenizer.chat_template,
            [{**literal.hide(message), "role": message["role"]} for message in messages],
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token,
            **literal.hide(variables or {}),
        )
        return _not_empty(literal.encode(text))
    return check_ids(prompt, config)


def check_ids(ids: Sequence[Any], config: ModelConfig) -> tuple[int, ...]:
    """Ids that exist. Raises PromptError naming the first that does not."""
    for place, token in enumerate(ids):
        if not _is_id(token):
            raise PromptError(
                f"Prompt element {place} is {token!r}; expected a token id, a message or a string throughout."
            )
        if not 0 <= operator.index(token) < config.vocab_size:
            raise PromptError(
                f"Prompt id {token} at place {place} is outside the vocabulary of {config.vocab_size:,} ids."
            )
    return tuple(operator.index(token) for token in ids)


def _is_id(value: Any) -> bool:
    # a tensor or array of one id has an index too, but it is a list
    if isinstance(value, bool | str) or getattr(value, "ndim", 0) > 0:
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def _not_empty(ids: Sequence[int]) -> tuple[int, ...]:
    if not ids:
        raise PromptError("The prompt has no tokens.")
    return tuple(ids)
