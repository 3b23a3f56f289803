"""Text to ids and back, for any checkpoint: from a Hugging Face directory or from GGUF metadata.

The work is done by the `tokenizers` library; here is what its file does not hold (which token begins and ends a text,
the chat template) and one calm behaviour: no truncation, no padding, no clean-up of spaces. How a GGUF file's vocabulary
becomes a tokenizer is told in `gguf_vocabulary`.
"""

import json
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from trimode.errors import CheckpointError, PromptError

if TYPE_CHECKING:
    import tokenizers

__all__ = ["Tokenizer"]

_NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "sep_token",
    "cls_token",
    "mask_token",
)
_BYTE_FALLBACK = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Tokenizer:
    """Strings to ids and back, and what a checkpoint says about its special tokens and its chat template."""

    def __init__(
        self,
        backend: "tokenizers.Tokenizer",
        *,
        special_tokens: Mapping[str, str] | None = None,
        extra_special_tokens: Iterable[str] = (),
        chat_templates: Mapping[str, str] | None = None,
    ):
        """Wrap `backend`, which this object then owns.

        `special_tokens` maps roles (`bos_token`, `eos_token`, `pad_token`, ...) to tokens. These and the
        `extra_special_tokens` are recognised in text and skipped in decoding; those that the vocabulary does not hold
        are not added to it, since the model has no embedding for them. `chat_templates` maps names to templates; the
        one used by default is called `default`.
        """
        self._backend = backend
        self._bytes: dict[int, bytes | None] = {}
        # Both are settings for training batches that some checkpoints left in their file: they would cut a prompt.
        backend.no_truncation()
        backend.no_padding()
        self.special_tokens: Mapping[str, str] = MappingProxyType(dict(special_tokens or {}))
        """Role to token, as the checkpoint names them."""
        self.named_chat_templates: Mapping[str, str] = MappingProxyType(dict(chat_templates or {}))
        """Every chat template of the checkpoint by its name; empty when there is none."""
        self._mark_special([*self.special_tokens.values(), *extra_special_tokens])
        self.special_ids: frozenset[int] = frozenset(
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        )
        """The ids that `decode` skips."""

    def _mark_special(self, tokens: Iterable[str]) -> None:
        from tokenizers import AddedToken

        known = {token.content for token in self._backend.get_added_tokens_decoder().values()}
        new = [
            token
            for token in dict.fromkeys(tokens)
            if token and token not in known and self._backend.token_to_id(token) is not None
        ]
        if new:
            self._backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in new])

    # ---- between text and ids

    def encode(self, text: str, *, add_special_tokens: bool = False, literally: bool = False) -> list[int]:
        """The ids of `text`. Special tokens written in it, such as `<|im_start|>`, are recognised, unless it is taken `literally`:
        then they are characters like any others.

        `add_special_tokens` adds what the checkpoint puts around a text, such as its first token. Raises PromptError
        when `text` is not a string or holds a lone surrogate, which no tokenizer can read.
        """
        if not isinstance(text, str):
            raise PromptError(f"a text to encode must be a string; got {type(text).__name__}.")
        try:
            backend = self._literal_backend if literally else self._backend
            return backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:
            surrogate = next((index for index, char in enumerate(text) if "\ud800" <= char <= "\udfff"), None)
            if surrogate is None:
                raise
            raise PromptError(
                f"the text holds half a character (a lone surrogate, {text[surrogate]!r}) "
                f"behind {text[max(0, surrogate - 12) : surrogate]!r}. "
                "Decode it from its bytes again, or replace it."
            ) from error

    @cached_property
    def _literal_backend(self) -> "tokenizers.Tokenizer":
        from tokenizers import Tokenizer as Backend

        # a copy: the setting is the object's, and other threads encode with the first one
        backend = Backend.from_str(self._backend.to_str())
        backend.encode_special_tokens = True
        return backend

    @cached_property
    def special_texts(self) -> tuple[str, ...]:
        """How the special tokens are written, longest first."""
        texts = (self.id_to_token(token_id) for token_id in self.special_ids)
        return tuple(sorted(filter(None, texts), key=len, reverse=True))

    def to_json(self) -> str:
        """The contents of a tokenizer.json."""
        return self._backend.to_str()

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 show as U+FFFD, and ids above the vocabulary print nothing.

        Spaces stay as the tokens say. Raises PromptError for a negative id.
        """
        try:
            return self._backend.decode([int(token_id) for token_id in ids], skip_special_tokens=skip_special_tokens)
        except OverflowError as error:
            raise PromptError("the ids to decode hold one that is negative or beyond 32 bits.") from error

    # ---- the vocabulary

    @cached_property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included. The model's embedding table may have more rows than that."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def token_to_id(self, token: str) -> int | None:
        """The id of a token in the vocabulary's own spelling, or None."""
        return self._backend.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        """A token in the vocabulary's own spelling, or None when there is none with this id."""
        return self._backend.id_to_token(token_id) if 0 <= token_id < 2**32 else None

    @property
    def bos_token(self) -> str | None:
        """The token that begins a text."""
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        """The token that ends a text."""
        return self.special_tokens.get("eos_token")

    @property
    def bos_token_id(self) -> int | None:
        """None when no token is named, or when the vocabulary does not hold the named one."""
        return None if self.bos_token is None else self.token_to_id(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        """None when no token is named, or when the vocabulary does not hold the named one."""
        return None if self.eos_token is None else self.token_to_id(self.eos_token)

    @property
    def chat_template(self) -> str | None:
        """The chat template used by default."""
        return self.named_chat_templates.get("default")

    # ---- what single tokens print, for streams and grammars

    @cached_property
    def is_byte_level(self) -> bool:
        """Each token stands for bytes, whatever its neighbours are; `token_bytes` says which."""
        from tokenizers import decoders

        return isinstance(self._backend.decoder, decoders.ByteLevel)

    def token_bytes(self, token_id: int) -> bytes | None:
        """The bytes that this token adds to a text, or None: the id is unknown or the vocabulary is not byte-level."""
        # every token of an answer asks; most ask again
        if token_id not in self._bytes:
            self._bytes[token_id] = self._read_bytes(token_id)
        return self._bytes[token_id]

    def _read_bytes(self, token_id: int) -> bytes | None:
        token = self.id_to_token(token_id) if self.is_byte_level else None
        if token is None:
            return None
        try:
            return bytes(_BYTE_OF_CHARACTER[character] for character in token)
        except KeyError:  # an added token, written in plain text
            return token.encode()

    def is_byte_fallback(self, token_id: int) -> bool:
        """This token is one raw byte, `<0x0A>`, that is read together with the byte tokens around it."""
        if not self._has_byte_fallback:
            return False
        token = self.id_to_token(token_id)
        return token is not None and _BYTE_FALLBACK.fullmatch(token) is not None

    @cached_property
    def _has_byte_fallback(self) -> bool:
        decoder = self._backend.decoder
        return decoder is not None and b'"ByteFallback"' in decoder.__getstate__()

    # ---- reading and writing

    @classmethod
    def from_directory(cls, path: str | Path) -> "Tokenizer | None":
        """The tokenizer of a Hugging Face checkpoint directory, or None when it holds no `tokenizer.json`.

        Chat templates come from `chat_template.jinja` and `additional_chat_templates/`, else `chat_template.json`, else
        `tokenizer_config.json`. Raises CheckpointError, naming the file, when one of them is damaged.
        """
        directory = Path(path)
        if not (directory / "tokenizer.json").is_file():
            return None
        backend = _read_backend(directory / "tokenizer.json")
        config = _read_json(directory / "tokenizer_config.json")
        # Older checkpoints name their special tokens only here; where both do, the config is the one kept up to date.
        config = _read_json(directory / "special_tokens_map.json") | config
        config_file = directory / "tokenizer_config.json"
        tokens = {role: _token_content(config.get(role), role, config_file) for role in _NAMED_TOKENS}
        extra = config.get("additional_special_tokens") or config.get("extra_special_tokens") or ()
        if isinstance(extra, Mapping):  # role to token, for roles of the model's own
            extra = extra.values()
        return cls(
            backend,
            special_tokens={role: token for role, token in tokens.items() if token is not None},
            extra_special_tokens=[
                token for entry in extra if (token := _token_content(entry, "extra_special_tokens", config_file))
            ],
            chat_templates=_read_chat_templates(directory, config),
        )

    @classmethod
    def from_gguf_metadata(cls, metadata: Mapping[str, Any]) -> "Tokenizer | None":
        """The tokenizer that a GGUF file's metadata describes (plain values under GGUF's keys), or None without one.

        Raises UnsupportedModelError for a kind of vocabulary or a pre-tokenizer that is not known, and CheckpointError
        when the arrays contradict one another.
        """
        from trimode.text.gguf_vocabulary import build_backend, read_special_tokens

        backend = build_backend(metadata)
        if backend is None:
            return None
        named = "tokenizer.chat_template."
        templates = {key.removeprefix(named): value for key, value in metadata.items() if key.startswith(named)}
        if metadata.get("tokenizer.chat_template"):
            templates["default"] = metadata["tokenizer.chat_template"]
        return cls(backend, special_tokens=read_special_tokens(metadata), chat_templates=templates)

    def save(self, directory: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which this class and transformers read back.

        Older chat template files in the directory are removed: readers would prefer them to what is written here.
        """
        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(target / "tokenizer.json"), pretty=False)
        config: dict[str, Any] = {
            # The one class that takes tokenizer.json as it is; the others rebuild parts of it in their own way.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            # Written even when there is none, so that an older special_tokens_map.json beside it has no say.
            "bos_token": None,
            "eos_token": None,
            **self.special_tokens,
        }
        if set(self.named_chat_templates) == {"default"}:
            config["chat_template"] = self.chat_template
        elif self.named_chat_templates:
            config["chat_template"] = [
                {"name": name, "template": template} for name, template in self.named_chat_templates.items()
            ]
        for stale in (
            target / "chat_template.jinja",
            target / "chat_template.json",
            *(target / "additional_chat_templates").glob("*.jinja"),
        ):
            stale.unlink(missing_ok=True)
        text = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
        (target / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _byte_of_character() -> dict[str, int]:
    """GPT-2's spelling of bytes, reversed: printable Latin-1 stands for itself, the rest for characters from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()


def _read_backend(file: Path) -> "tokenizers.Tokenizer":
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # plain Exception for bad JSON; a Rust panic, a BaseException, for bad merges
        raise CheckpointError(f"{file} is not a tokenizer that can be read ({error}). Download it again.") from error


def _read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is no such file."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # also what is no UTF-8
        raise CheckpointError(f"{file} is not valid JSON ({error}). Download it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold a JSON object; got {type(content).__name__}.")
    return content


def _token_content(entry: object, role: str, file: Path) -> str | None:
    """A token in a config is its text, or an object with its text (and matching rules, which tokenizer.json has)."""
    content = entry.get("content") if isinstance(entry, Mapping) else entry
    if content is not None and not isinstance(content, str):
        raise CheckpointError(f'{file}: {role} must be a string or an object with "content"; got {entry!r}.')
    return content


def _read_chat_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    try:
        files = sorted((directory / "additional_chat_templates").glob("*.jinja"))
        templates = {file.stem: file.read_text(encoding="utf-8") for file in files}
        if (file := directory / "chat_template.jinja").is_file():
            templates["default"] = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"a chat template in {directory} is not UTF-8 ({error}). Download it again.") from error
    if templates:
        return templates
    from_json = _read_json(file := directory / "chat_template.json")
    found = from_json.get("chat_template")
    if found is None:
        found, file = config.get("chat_template"), directory / "tokenizer_config.json"
    if found is None:
        return {}
    if isinstance(found, str):
        return {"default": found}
    for entry in found if isinstance(found, list) else [found]:
        match entry:
            case {"name": str(name), "template": str(template)}:
                templates[name] = template
            case _:
                raise CheckpointError(
                    f"{file}: chat_template must be a string or a list of objects with name and template; got {entry!r}."
                )
    return templates
