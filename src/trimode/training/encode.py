"""Sources to training documents: chats and texts become ids with the base's own tokenizer and template."""

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from trimode.checkpoint import Checkpoint
from trimode.errors import DataError
from trimode.text.chat_template import render_chat, validate_messages
from trimode.text.tokenizer import Tokenizer
from trimode.training.data import Document, Encode, Skip, make_documents, read_records
from trimode.training.hub import read_hub
from trimode.training.recipe import Source

__all__ = ["make_encode", "read_source"]


def read_source(
    source: Source, encode: Encode, *, max_tokens: int, vocab_size: int, skip: Skip | None = None
) -> list[Document]:
    """The documents of a file or of a data set on the hub."""
    if source.path is not None:
        records = islice(read_records(Path(source.path), skip=skip), source.limit)
        where = source.path
    else:
        assert source.hub is not None
        records = read_hub(source.hub, subset=source.subset, split=source.split or "train", limit=source.limit)
        where = source.hub
    return make_documents(records, where, encode, max_tokens=max_tokens, vocab_size=vocab_size, skip=skip)


def make_encode(checkpoint: Checkpoint) -> Encode:
    """A chat is given up to its last message, the assistant's; of a text nothing is given."""
    tokenizer = checkpoint.tokenizer()

    def encode(value: Any) -> tuple[list[int], int]:
        if tokenizer is None:
            raise DataError("the base has no tokenizer; give prompt_ids and answer_ids.")
        if isinstance(value, str):
            return tokenizer.encode(value, add_special_tokens=True), 0
        return _chat(value, tokenizer)

    return encode


def _chat(value: Any, tokenizer: Tokenizer) -> tuple[list[int], int]:
    if not isinstance(value, Sequence) or not value or not all(isinstance(m, Mapping) for m in value):
        raise DataError("text must be a text, and messages a list of messages.")
    if value[-1].get("role") != "assistant" or len(value) < 2:
        raise DataError("its last message must be the assistant's, behind another one.")
    template = tokenizer.chat_template
    if template is None:
        raise DataError("the base has no chat template; give text, or prompt_ids and answer_ids.")
    messages = validate_messages(value)

    def render(some: Sequence[Mapping[str, Any]], *, ask: bool) -> str:
        return render_chat(
            template, some, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token, add_generation_prompt=ask
        )

    prompt, whole = render(messages[:-1], ask=True), render(messages, ask=False)
    if not whole.startswith(prompt):
        raise DataError("the chat template rewrites earlier messages; give prompt_ids and answer_ids.")
    given = tokenizer.encode(prompt)
    return [*given, *tokenizer.encode(whole[len(prompt) :])], len(given)
