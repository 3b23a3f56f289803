"""What requests may say, strictly: a field that is unknown, or of the wrong type, is named together with what was meant.

Decoder knobs are fields like OpenAI's own. Their ranges, and in which mode they do anything, are `decoding.settings`' business.
"""

import json
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trimode.errors import nearest
from trimode.server.faults import ApiError
from trimode.text.chat_template import Role

__all__ = [
    "ChatRequest",
    "CompletionRequest",
    "DetokenizeRequest",
    "GenerationRequest",
    "TokenizeRequest",
    "Tool",
    "parse_body",
]

_NOT_SERVED = {
    "audio": "only text is made here",
    "functions": "use tools",
    "function_call": "use tool_choice",
    "prediction": "self_spec drafts by itself",
    "web_search_options": "this server has no web search",
    "reasoning_effort": "use max_thinking_tokens",
    "verbosity": "say it in the prompt",
    "best_of": "use n and choose",
}
"""Fields of OpenAI's that would be without effect here."""


_SAID = {
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "string_type": "must be a string",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "too_short": "must not be empty",
    "string_pattern_mismatch": "must be 1 to 64 letters, digits, dots, dashes or underscores",
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Strict):
    """What a stream tells beside the text."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class GenerationRequest(_Strict):
    """What chats and completions have in common."""

    model: str | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stream_canvas: bool | None = None
    """With `stream`: the tentative block arrives as chunks of its own, without text."""
    return_token_ids: bool | None = None
    response_format: dict[str, Any] | None = None
    user: str | None = None
    """Taken, and never used."""
    metadata: dict[str, str] | None = None
    """Taken, and never used."""
    store: Literal[False] | None = None
    max_tokens: int | None = None
    # knobs, as `Settings` has them: it says best what is wrong with one
    mode: Any = None
    temperature: Any = None
    top_p: Any = None
    top_k: Any = None
    min_p: Any = None
    seed: Any = None
    stop: Any = None
    ignore_eos: Any = None
    repetition_penalty: Any = None
    presence_penalty: Any = None
    frequency_penalty: Any = None
    logit_bias: dict[str, float] | None = None
    max_thinking_tokens: Any = None
    end_think_token_id: Any = None
    block_length: Any = None
    block_size: Any = None
    threshold: Any = None
    unmasking: Any = None
    remasking: Any = None
    entropy_bound: Any = None
    max_denoising_steps: Any = None
    editing_threshold: Any = None
    max_post_steps: Any = None
    self_spec_kind: Any = None
    draft_lora: Any = None


KNOBS = tuple(
    name
    for name in GenerationRequest.model_fields
    if name not in ("model", "n", "max_tokens", "logit_bias", "stream", "stream_options", "stream_canvas", "metadata")
    and name not in ("return_token_ids", "response_format", "user", "store")
)
"""Fields that go to the decoder as they are."""


class Function(_Strict):
    """What a tool is called with."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Strict):
    """A function that the model may call."""

    type: Literal["function"]
    function: Function


class CalledFunction(_Strict):
    """A function and its arguments, as JSON text."""

    name: str
    arguments: str


class ToolCall(_Strict):
    """A call that an earlier answer made."""

    id: str
    type: Literal["function"]
    function: CalledFunction
    index: int | None = None


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One turn of a chat."""

    role: Role
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None


class ChatRequest(GenerationRequest):
    """/v1/chat/completions"""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables for the checkpoint's chat template, such as enable_thinking."""


class CompletionRequest(GenerationRequest):
    """/v1/completions"""

    prompt: str | list[str] | list[int] | list[list[int]]
    suffix: str | None = None
    """Text behind the gap that is to be filled."""
    logprobs: int | None = None
    echo: bool | None = None
    parse_special: bool | None = None
    """Special tokens in the prompt are recognised; else they are characters."""


class TokenizeRequest(_Strict):
    """/tokenize"""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True
    parse_special: bool = False


class DetokenizeRequest(_Strict):
    """/detokenize"""

    model: str | None = None
    tokens: list[int]


Body = TypeVar("Body", bound=BaseModel)


def parse_body(body: bytes, kind: type[Body]) -> Body:
    """A request out of its JSON. Raises ApiError 400 in one clear sentence."""
    try:
        content = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise ApiError(400, "The body is not UTF-8 text.") from None
    except RecursionError:
        raise ApiError(400, "The JSON of the body is nested too deeply.") from None
    except ValueError as error:
        raise ApiError(400, f"The body is not valid JSON: {error}.") from None
    if not isinstance(content, dict):
        raise ApiError(400, f"The body must be a JSON object; got {_json_type(content)}.")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise _first_fault(error, kind) from None
    except RecursionError:
        raise ApiError(400, "The JSON of the body is nested too deeply.") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _first_fault(error: ValidationError, kind: type[BaseModel]) -> ApiError:
    faults = error.errors(include_url=False)
    # a part of another kind first, then an unknown field: they are often why another one is missing
    fault = next((f for f in faults if f["loc"][-1] == "type" and f["type"] == "literal_error"), None)
    fault = fault or next((f for f in faults if f["type"] == "extra_forbidden"), faults[0])
    # of the kinds that a field may have, pydantic names each: they are none of the client's fields
    path = [str(p) for p in fault["loc"] if isinstance(p, int) or not ("[" in p or p in ("str", "list"))]
    where = ".".join(path)
    name = path[-1] if path else ""
    if fault["type"] == "extra_forbidden":
        if len(path) == 1 and name in _NOT_SERVED:
            return ApiError(400, f"{name} is not served here: {_NOT_SERVED[name]}. Leave it out.", param=name)
        hint = nearest(name, _known_fields(kind, path[:-1]))
        return ApiError(400, f"Unknown field {where!r}.{hint}", param=where, code="unknown_field")
    if fault["type"] == "missing":
        return ApiError(400, f"The field {where!r} is missing.", param=where)
    got = "" if fault["input"] is None or isinstance(fault["input"], dict | list) else f"; got {fault['input']!r:.80}"
    said = _SAID.get(fault["type"]) or fault["msg"].replace("Input should be", "must be")
    if where == "prompt" and kind is CompletionRequest:
        said = "must be a string, a list of strings, or token ids"
    return ApiError(400, f"{where} {said}{got}.", param=where)


def _known_fields(kind: type[BaseModel], path: list[str]) -> list[str]:
    if not path:
        return list(kind.model_fields)
    nested: dict[str, type[BaseModel]] = {
        "messages": Message,
        "content": TextPart,
        "tools": Tool,
        "tool_calls": ToolCall,
        "stream_options": StreamOptions,
    }
    words = [p for p in path if not p.isdigit()]
    if words[-1] == "function":
        return list((Function if words[0] == "tools" else CalledFunction).model_fields)
    return list(nested[words[-1]].model_fields) if words[-1] in nested else []
