"""Chat messages to one prompt string, through the template that the checkpoint brings.

A template is a program written by a stranger, so it runs in jinja2's immutable sandbox, sees plain data only, and
whatever it raises leaves here as one `ChatTemplateError`. The environment (block trimming, loop controls, `tojson`,
`raise_exception`, `strftime_now`, the `generation` tag) is the one that templates on the Hugging Face hub expect.

The sandbox protects the machine, not the clock: a template may still loop long or build a long string.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, get_args

from trimode.errors import ChatTemplateError, PromptError, nearest

if TYPE_CHECKING:
    import jinja2

__all__ = ["Role", "render_chat", "validate_messages"]

Role = Literal["system", "developer", "user", "assistant", "tool"]
"""Who may speak in a chat. Most templates would print any other word as if somebody of that name had spoken."""
_LONGEST_ERROR = 300
"""Characters of a template's own complaint that are passed on."""


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    bos_token: str | None = None,
    eos_token: str | None = None,
    **variables: Any,
) -> str:
    """The prompt that `template` makes of `messages`.

    `add_generation_prompt` ends the prompt where the assistant's answer begins. Further `variables` (`tools`,
    `enable_thinking`, other special tokens, ...) reach the template under their names.

    Raises PromptError when the messages themselves are faulty (see `validate_messages`) and ChatTemplateError, with one
    line, when the template is broken, refuses the messages or tries what the sandbox forbids.
    """
    # Templates ask `tools is not none`, which an undefined name would answer wrongly, so these two always exist.
    # Special tokens are the other way round: None would be printed as the word "None", undefined prints nothing.
    names: dict[str, Any] = {"tools": None, "documents": None}
    names |= {name: token for name, token in (("bos_token", bos_token), ("eos_token", eos_token)) if token is not None}
    names |= variables
    names |= {"messages": validate_messages(messages), "add_generation_prompt": add_generation_prompt}
    try:
        return _compiled(template).render(names)
    except Exception as error:  # the template is foreign code: any exception type can come out of it
        raise ChatTemplateError(_one_line(error)) from error


def validate_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages as plain dicts, each with a known `role` and a string `content`; other keys are kept.

    A content given as parts, `[{"type": "text", "text": ...}, ...]`, is joined. The caller's messages stay as they are.

    Raises PromptError, with the index of the faulty message, for anything else.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise PromptError(
            f'messages must be a list of {{"role": ..., "content": ...}} mappings; got {type(messages).__name__}.'
        )
    if not messages:
        raise PromptError("messages is empty. Give at least one message, such as a user's question.")
    return [_validate_message(index, message) for index, message in enumerate(messages)]


def _validate_message(index: int, message: Mapping[str, Any]) -> dict[str, Any]:
    where = f"message {index}"
    if not isinstance(message, Mapping):
        raise PromptError(f'{where} must be a mapping with "role" and "content"; got {type(message).__name__}.')
    for key in ("role", "content"):
        if key not in message:
            raise PromptError(f'{where} has no "{key}". Every message needs a role and a content.')
    if not isinstance(message["role"], str):
        raise PromptError(f"{where}: role must be a string; got {type(message['role']).__name__}.")
    if message["role"] not in get_args(Role):
        role = str(message["role"])
        hint = nearest(role, get_args(Role)) or f" Use one of {', '.join(get_args(Role))}."
        raise PromptError(f"{where}: there is no role {role!r}.{hint}")
    plain = {
        str(key): _plain(value, f"{where}: {key}") for key, value in message.items() if key not in ("role", "content")
    }
    # Role and content lead, whatever order the caller wrote: a template may print a message with `tojson`.
    return {"role": str(message["role"]), "content": _joined_content(message["content"], where)} | plain


def _joined_content(content: object, where: str) -> str:
    if isinstance(content, str):
        return str(content)
    if not isinstance(content, Sequence) or isinstance(content, bytes | bytearray):
        raise PromptError(f"{where}: content must be a string or a list of text parts; got {type(content).__name__}.")
    texts = []
    for number, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise PromptError(
                f'{where}: part {number} of the content must be {{"type": "text", "text": "..."}}; got {kind!r}. '
                "Only text is understood."
            )
        texts.append(part["text"])
    return "".join(texts)


def _plain(value: Any, where: str) -> Any:
    """A copy made of JSON types only: methods of richer objects are none of a template's business."""
    if value is None or isinstance(value, bool):
        return value
    for plain_type in (str, int, float):
        if isinstance(value, plain_type):
            return plain_type(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, where) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where) for item in value]
    raise PromptError(f"{where} holds a {type(value).__name__}; only what JSON can write may stand in a message.")


@lru_cache(maxsize=32)
def _compiled(template: str) -> "jinja2.Template":
    return _environment().from_string(template)


@lru_cache(maxsize=1)
def _environment() -> "jinja2.Environment":
    from jinja2 import TemplateError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class GenerationTag(Extension):
        """`{% generation %}...{% endgeneration %}` marks the assistant's tokens for training; here it only prints."""

        tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class GuardedNamespace(Namespace):
        """A `namespace()` that stores no underscored names: these belong to Python, not to templates."""

        def __init__(*args, **kwargs):  # without `self`, so that `namespace(self=1)` stays possible
            guarded, *rest = args
            Namespace.__init__(guarded)
            for name, value in dict(*rest, **kwargs).items():
                guarded[name] = value

        def __setitem__(self, name, value):
            if str(name).startswith("_"):
                raise SecurityError(f"a namespace cannot hold the underscored name {name!r}")
            super().__setitem__(name, value)

    def raise_exception(message):
        raise TemplateError(message)

    def strftime_now(format):
        return datetime.now().strftime(format)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        # jinja2's own filter escapes <, > and & for web pages; a prompt wants the characters.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationTag]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "namespace": GuardedNamespace,
    }
    return environment


def _one_line(error: Exception) -> str:
    """The fault, the line of the template where it happened (if known) and what the template said."""
    from jinja2 import TemplateError, TemplateSyntaxError
    from jinja2.exceptions import SecurityError

    said = " ".join(str(error).split()) or type(error).__name__
    if len(said) > _LONGEST_ERROR:
        said = said[:_LONGEST_ERROR] + "..."
    if type(error) is TemplateError:  # only raise_exception raises the base class itself
        return f"The chat template refuses these messages: {said}"
    if isinstance(error, TemplateSyntaxError):
        return f"The chat template is not valid (line {error.lineno}): {said}"
    if isinstance(error, SecurityError):
        return f"The chat template tried what its sandbox forbids{_template_line(error)}: {said}"
    # Python's own errors (KeyError: 'x') say little without their name.
    name = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
    return f"The chat template failed{_template_line(error)}: {name}{said}"


def _template_line(error: Exception) -> str:
    trace, line = error.__traceback__, None
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":  # jinja2's name for templates made from strings
            line = trace.tb_lineno
        trace = trace.tb_next
    return "" if line is None else f" (line {line})"
