"""Tools: how they are told to a model, held to their schemas, and read out of its answer.

One spelling, the widespread one: `<tool_call>`, a JSON object with `name` and `arguments`, `</tool_call>`. A grammar sees to it that
what is called exists and fits its schema; nothing is mended afterwards.
"""

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trimode.errors import nearest
from trimode.server.faults import ApiError
from trimode.server.schema import Message, Tool

__all__ = ["ToolCallReader", "ToolUse", "as_plain_messages", "read_tools"]

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MOST_CALLS = 8
_WHITE_SPACE = {"whitespace_pattern": "[ ]?"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """The tools of a request and whether they are used."""

    tools: tuple[dict[str, Any], ...]
    """As the request gave them."""
    choice: str
    """`auto`, `required`, or the name of the one that must be called."""
    parallel: bool

    def told_in_words(self) -> str:
        """A system message for checkpoints whose template knows no tools."""
        lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in self.tools)
        return (
            "You can call functions. These exist, one a line:\n"
            f"{lines}\n"
            "To call one, answer with its name and arguments as JSON, in this form:\n"
            f'{OPEN}\n{{"name": "...", "arguments": {{...}}}}\n{CLOSE}'
        )

    def lark(self) -> str:
        """The grammar of an answer."""
        if self.choice == "auto":
            from llguidance import StructTag

            tags = [
                StructTag(
                    trigger=OPEN,
                    begin=f'{OPEN}\n{{"name": {json.dumps(t["function"]["name"])}, "arguments": ',
                    grammar=_schema(t),
                    end=f"}}\n{CLOSE}",
                )
                for t in self.tools
            ]
            return StructTag.to_grammar(tags, assume_special=False)
        called = [t for t in self.tools if self.choice in ("required", t["function"]["name"])]
        more = f' ("\\n" call){{0,{MOST_CALLS - 1}}}' if self.parallel and self.choice == "required" else ""
        rules = [f"start: call{more}", "call: " + " | ".join(f"call_{i}" for i in range(len(called)))]
        for i, tool in enumerate(called):
            begin = json.dumps(f'{OPEN}\n{{"name": {json.dumps(tool["function"]["name"])}, "arguments": ')
            rules.append(f"call_{i}: {begin} arguments_{i} {json.dumps('}' + chr(10) + CLOSE)}")
            rules.append(f"arguments_{i}: %json {json.dumps(_schema(tool))}")
        return "\n".join(rules)


def _schema(tool: dict[str, Any]) -> dict[str, Any]:
    parameters = tool["function"].get("parameters") or {
        "type": "object",
        "properties": {},
        "additionalProperties": False,
    }
    return {**parameters, "x-guidance": _WHITE_SPACE}


def read_tools(
    tools: Sequence[Tool] | None, choice: str | dict[str, Any] | None, parallel: bool | None
) -> ToolUse | None:
    """What a request says about tools; None where none may be called. Raises ApiError 400."""
    if not tools:
        if choice not in (None, "none", "auto") or parallel is not None:
            param = "tool_choice" if choice is not None else "parallel_tool_calls"
            raise ApiError(400, f"{param} has no effect without tools. Give tools, or leave it out.", param=param)
        return None
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ApiError(400, f"tools names {twice!r} twice. Names must differ.", param="tools")
    if isinstance(choice, dict):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if choice.get("type") != "function" or set(choice) != {"type", "function"} or not isinstance(name, str):
            raise ApiError(
                400,
                'tool_choice must be "none", "auto", "required" or {"type": "function", "function": {"name": ...}}.',
                param="tool_choice",
            )
        if name not in names:
            raise ApiError(
                400, f"tool_choice names {name!r}, which tools lacks.{nearest(name, names)}", param="tool_choice"
            )
        choice = name
    elif choice not in (None, "none", "auto", "required"):
        hint = nearest(choice, ["none", "auto", "required"])
        raise ApiError(
            400,
            f'tool_choice must be "none", "auto", "required" or a function; got {choice!r}.{hint}',
            param="tool_choice",
        )
    if choice == "none":
        return None
    plain = tuple(tool.model_dump(exclude_none=True) for tool in tools)
    return ToolUse(tools=plain, choice=choice or "auto", parallel=parallel is not False)


def as_plain_messages(
    messages: Sequence[Message], use: ToolUse | None, template: str | None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Messages as a chat template reads them, and its variables. Calls and results are told in words where it knows no tools."""
    knows_tools = template is not None and "tools" in template
    plain = [_plain(message, place, knows_tools) for place, message in enumerate(messages)]
    if use is None:
        return plain, {}
    if knows_tools:
        return plain, {"tools": list(use.tools)}
    words = use.told_in_words()
    if plain[0]["role"] == "system":
        return [{**plain[0], "content": f"{plain[0]['content']}\n\n{words}"}, *plain[1:]], {}
    return [{"role": "system", "content": words}, *plain], {}


def _plain(message: Message, place: int, knows_tools: bool) -> dict[str, Any]:
    content = message.content
    if isinstance(content, list):
        content = "".join(part.text for part in content)
    calls = message.tool_calls or []
    if content is None and not calls:
        raise ApiError(400, f"messages.{place} has no content.", param=f"messages.{place}.content")
    if calls and message.role != "assistant":
        raise ApiError(400, f"messages.{place}: only an assistant calls tools.", param=f"messages.{place}.tool_calls")
    if message.role == "tool" and message.tool_call_id is None:
        raise ApiError(400, f"messages.{place} has no tool_call_id.", param=f"messages.{place}.tool_call_id")
    role = "system" if message.role == "developer" else message.role
    plain: dict[str, Any] = {"role": role, "content": content or ""}
    if knows_tools:
        if calls:
            plain["tool_calls"] = [
                {
                    "id": c.id,
                    "type": "function",
                    "function": {"name": c.function.name, "arguments": _arguments(c.function.arguments, place)},
                }
                for c in calls
            ]
        for name in ("name", "tool_call_id"):
            if getattr(message, name) is not None:
                plain[name] = getattr(message, name)
        return plain
    if calls:
        told = [
            f"{OPEN}\n"
            + json.dumps(
                {"name": c.function.name, "arguments": _arguments(c.function.arguments, place)}, ensure_ascii=False
            )
            + f"\n{CLOSE}"
            for c in calls
        ]
        plain["content"] = "\n".join([*filter(None, [content]), *told])
    if role == "tool":
        plain = {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    return plain


def _arguments(text: str, place: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        where = f"messages.{place}.tool_calls"
        raise ApiError(400, f"{where}: the arguments of a call are not JSON.", param=where) from None


class ToolCallReader:
    """Takes calls out of a text that arrives in pieces. Text is passed on as soon as no call can begin in it."""

    def __init__(self) -> None:
        self._held = ""
        self.num_calls = 0

    def push(self, piece: str) -> tuple[str, list[dict[str, Any]]]:
        """Text to show, and whole calls, in OpenAI's form."""
        self._held += piece
        text: list[str] = []
        calls: list[dict[str, Any]] = []
        while True:
            start = self._held.find(OPEN)
            if start < 0:
                keep = next((n for n in range(len(OPEN) - 1, 0, -1) if self._held.endswith(OPEN[:n])), 0)
                cut = len(self._held) - keep
                text.append(self._held[:cut])
                self._held = self._held[cut:]
                break
            text.append(self._held[:start])
            end = self._held.find(CLOSE, start)
            if end < 0:
                self._held = self._held[start:]
                break
            inside = self._held[start + len(OPEN) : end]
            self._held = self._held[end + len(CLOSE) :]
            call = self._call(inside)
            if call is None:
                text.append(f"{OPEN}{inside}{CLOSE}")
            else:
                calls.append(call)
        shown = "".join(text)
        # blank lines between calls are no text
        return ("" if self.num_calls and not shown.strip() else shown), calls

    def finish(self) -> str:
        """What was held back: a call that never ended is text."""
        held, self._held = self._held, ""
        return held

    def _call(self, inside: str) -> dict[str, Any] | None:
        try:
            said = json.loads(inside)
            name, arguments = said["name"], said["arguments"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        self.num_calls += 1
        return {
            "index": self.num_calls - 1,
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)},
        }
