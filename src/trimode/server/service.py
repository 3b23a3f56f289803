"""From a checked request to answers that run: the one place that knows both OpenAI's words and the engine's.

The engine has a thread of its own and tells its events to the event loop; what a slow client has not read yet waits in its call's
queue, which the longest answer bounds.
"""

import asyncio
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from trimode.decoding.settings import MOST_LOGPROBS
from trimode.engine.answer import Answer
from trimode.engine.engine import Engine, EngineLimits, Entry
from trimode.engine.language_model import LanguageModel
from trimode.engine.request import StreamEvent
from trimode.engine.worker import Worker
from trimode.errors import SettingError, TrimodeError, nearest
from trimode.server.faults import ApiError, as_api_error
from trimode.server.keys import ApiKeys
from trimode.server.limits import ServerLimits
from trimode.server.metrics import Metrics
from trimode.server.schema import KNOBS, ChatRequest, CompletionRequest, GenerationRequest, Message
from trimode.server.tools import ToolUse, as_plain_messages, read_tools
from trimode.text.grammar import Grammar

__all__ = ["Asked", "Call", "Service"]

COMPLETION_TOKENS = 16
"""OpenAI's default for completions."""
MOST_STOPS = 16
SCRATCH = 128
"""Positions left free for blocks when the answer's length is up to the server."""
HEARTBEAT_S = 15.0
"""A stream that has nothing to tell for so long says that it lives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request whose answers are ready to run."""

    answers: list[Answer]
    num_choices: int
    """Answers to each prompt."""
    wants_canvas: bool = False
    spans: list[list[range]] | None = None
    """Of a text to fill in: the places that are missing."""
    tools: ToolUse | None = None
    echo: list[str] | None = None
    """Texts to repeat before the answers."""


@dataclass(slots=True, eq=False)
class Call:
    """A request that was let in."""

    entries: list[Entry]
    deadline: float
    """By the monotonic clock."""
    cause: ApiError | None = None
    """Why it was stopped, if it was."""
    events: asyncio.Queue[tuple[int, StreamEvent]] = field(default_factory=asyncio.Queue)

    def cancel(self, worker: Worker, cause: ApiError | None = None) -> None:
        """Stop all answers before the next forward."""
        if cause is not None:
            self.cause = cause
        for entry in self.entries:
            worker.cancel(entry)


class Service:
    """One model, its engine, and the requests on their way."""

    def __init__(
        self,
        model: LanguageModel,
        *,
        name: str | None = None,
        engine_limits: EngineLimits | None = None,
        limits: ServerLimits | None = None,
        keys: ApiKeys | None = None,
    ) -> None:
        self.model = model
        self.name = name or model.name
        self.limits = limits or ServerLimits()
        self.keys = keys or ApiKeys([])
        self.created = int(time.time())
        self.worker = Worker(Engine(model, engine_limits))
        self.metrics = Metrics(lambda: self.worker.snapshot)
        self.is_draining = False
        self._calls: set[Call] = set()
        self._calls_of: Counter[str] = Counter()
        self._usual_s = 1.0

    # ---- its life ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to serve; what forwards cost is measured first, if `auto` needs it, so that no client waits for that."""
        self.model.measure()
        self.worker.start()

    def stop(self) -> None:
        """End the engine's thread."""
        self.worker.stop()

    @property
    def is_ready(self) -> bool:
        """Requests are taken."""
        return self.worker.is_alive and not self.is_draining

    @property
    def num_calls(self) -> int:
        """Requests on their way."""
        return len(self._calls)

    def cancel_all(self) -> None:
        """Stop what still runs, telling each client why."""
        for call in self._calls:
            call.cancel(self.worker, ApiError(503, "The server is stopping.", code="server_stopping"))

    # ---- requests to answers ----------------------------------------------------------------------------------------------

    def check_model(self, name: str | None) -> None:
        """Refuses another model's name."""
        if name is not None and name != self.name:
            hint = nearest(name, [self.name])
            raise ApiError(
                404,
                f"The model {name!r} is not served here.{hint} This server has {self.name!r}.",
                param="model",
                code="model_not_found",
            )

    def open_chat(self, body: ChatRequest) -> Asked:
        """The answers that a chat asks for. Raises ApiError."""
        self.check_model(body.model)
        knobs = self._knobs(body)
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(
                400, "top_logprobs has no effect without logprobs. Set logprobs to true.", param="top_logprobs"
            )
        if body.logprobs:
            knobs["logprobs"] = _num_logprobs(body.top_logprobs or 0, "top_logprobs")
        use = read_tools(body.tools, body.tool_choice, body.parallel_tool_calls)
        with _told(body):
            grammar = self._grammar(body.response_format, use)
            ids = self.encode_chat(body.messages, use, body.chat_template_kwargs)
            limit = _one_of(body, "max_tokens", "max_completion_tokens")
            answers = self._open([ids], body.n, limit, knobs, grammar, default=self.limits.max_answer_tokens)
        return Asked(answers=answers, num_choices=body.n or 1, wants_canvas=_wants_canvas(body), tools=use)

    def open_completion(self, body: CompletionRequest) -> Asked:
        """The answers that a completion asks for. Raises ApiError."""
        self.check_model(body.model)
        knobs = self._knobs(body)
        if body.logprobs is not None:
            knobs["logprobs"] = _num_logprobs(body.logprobs, "logprobs")
        if body.suffix is not None:
            return self._open_infill(body, knobs)
        with _told(body):
            grammar = self._grammar(body.response_format, None)
            prompts = self._raw_prompts(body)
            answers = self._open(prompts, body.n, body.max_tokens, knobs, grammar, default=COMPLETION_TOKENS)
        echo = [self._echoed(body, i, ids) for i, ids in enumerate(prompts)] if body.echo else None
        if body.echo and body.logprobs is not None:
            raise ApiError(
                400, "echo gives no log-probabilities of the prompt. Leave out echo or logprobs.", param="echo"
            )
        return Asked(answers=answers, num_choices=body.n or 1, wants_canvas=_wants_canvas(body), echo=echo)

    def encode_chat(
        self, messages: Sequence[Message], use: ToolUse | None = None, variables: Mapping[str, Any] | None = None
    ) -> list[int]:
        """The ids of a chat. Raises TrimodeError."""
        template = self.model.tokenizer.chat_template if self.model.tokenizer is not None else None
        plain, tool_variables = as_plain_messages(messages, use, template)
        return self.model.encode(plain, template={**(variables or {}), **tool_variables})

    def encode_text(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False) -> list[int]:
        """The ids of a text as it stands."""
        if self.model.tokenizer is None:
            raise ApiError(400, f"{self.name} has no tokenizer. Give the prompt as token ids.", param="prompt")
        return self.model.tokenizer.encode(text, add_special_tokens=add_special_tokens, literally=not parse_special)

    def _raw_prompts(self, body: CompletionRequest) -> list[list[int]]:
        prompt = body.prompt
        if isinstance(prompt, str):
            prompt = [prompt]
        elif prompt and isinstance(prompt[0], int):
            prompt = [prompt]  # pyright: ignore[reportAssignmentType]
        prompts: list[list[int]] = []
        for i, one in enumerate(prompt):
            if isinstance(one, str):
                one = self.encode_text(one, parse_special=bool(body.parse_special))
            if not one:
                raise ApiError(400, f"prompt {i} is empty. Give it at least one token.", param="prompt")
            prompts.append(self.model.encode(one))
        if not prompts:
            raise ApiError(400, "prompt is empty. Give it at least one token.", param="prompt")
        return prompts

    def _echoed(self, body: CompletionRequest, i: int, ids: list[int]) -> str:
        if isinstance(body.prompt, str):
            return body.prompt
        one = body.prompt[i] if not isinstance(body.prompt[0], int) else ids
        if isinstance(one, str):
            return one
        return "" if self.model.tokenizer is None else self.model.tokenizer.decode(ids)

    def _knobs(self, body: GenerationRequest) -> dict[str, Any]:
        knobs = {name: getattr(body, name) for name in KNOBS if getattr(body, name) is not None}
        if body.logit_bias:
            try:
                knobs["logit_bias"] = {int(token): bias for token, bias in body.logit_bias.items()}
            except ValueError:
                raise ApiError(
                    400, 'logit_bias maps token ids, such as "42", to numbers.', param="logit_bias"
                ) from None
        if isinstance(body.stop, list) and len(body.stop) > MOST_STOPS:
            raise ApiError(400, f"stop takes at most {MOST_STOPS} strings; got {len(body.stop)}.", param="stop")
        if body.stream_options is not None and not body.stream:
            raise ApiError(400, "stream_options has no effect without stream. Leave it out.", param="stream_options")
        if body.stream_canvas and not body.stream:
            raise ApiError(400, "stream_canvas has no effect without stream. Leave it out.", param="stream_canvas")
        return knobs

    def _grammar(self, wanted: dict[str, Any] | None, use: ToolUse | None) -> Grammar | None:
        kind = "text" if wanted is None else wanted.get("type")
        sources = {"text": None, "json_object": None, "json_schema": "json_schema", "regex": "regex", "lark": "lark"}
        if kind not in sources:
            hint = nearest(kind, sources) if isinstance(kind, str) else ""
            raise SettingError(f"response_format must have a type, one of {', '.join(sources)}; got {kind!r}.{hint}")
        field_name = sources[kind]
        for name in wanted or {}:
            if name not in ("type", field_name):
                raise SettingError(f"response_format of type {kind!r} has no field {name!r}. Leave it out.")
        if use is not None:
            if kind != "text":
                raise SettingError('response_format contradicts tools that may be called. Set tool_choice to "none".')
            return self.model.grammar("lark", use.lark())
        if wanted is None or kind == "text":
            return None
        source = wanted.get(field_name) if field_name else None
        if kind == "json_schema":
            known = ("name", "description", "schema", "strict")
            if not isinstance(source, dict) or "schema" not in source:
                raise SettingError("response_format.json_schema must be an object with name and schema.")
            for name in source:
                if name not in known:
                    raise SettingError(f"response_format.json_schema has no field {name!r}.{nearest(name, known)}")
            source = source["schema"]
        return self.model.grammar(kind, source)  # pyright: ignore[reportArgumentType]

    def _open(
        self,
        prompts: list[list[int]],
        n: int | None,
        limit: int | None,
        knobs: dict[str, Any],
        grammar: Grammar | None,
        *,
        default: int,
    ) -> list[Answer]:
        num = self._num_choices(n, len(prompts))
        answers = []
        for ids in prompts:
            most = self.limits.max_prompt_tokens
            if most is not None and len(ids) > most:
                raise ApiError(
                    400,
                    f"The prompt has {len(ids):,} tokens; at most {most:,} are taken.",
                    code="context_length_exceeded",
                )
            if limit is None:
                room = min(self.model.config.max_positions, self.worker.snapshot.positions - SCRATCH) - len(ids)
                length = max(1, min(default, self.limits.max_answer_tokens, room))
            else:
                length = self._checked_length(limit)
            for i in range(num):
                own = {**knobs, "max_new_tokens": length}
                if i and isinstance(knobs.get("seed"), int):
                    own["seed"] = knobs["seed"] + i
                answers.append(self.model.open_answer(ids, own, grammar=grammar))
        block = answers[0].generation.settings.block_length
        if block is not None and block > self.limits.max_block_length:
            raise ApiError(
                400,
                f"block_length must be at most {self.limits.max_block_length} here; got {block:,}.",
                param="block_length",
            )
        return answers

    def _num_choices(self, n: int | None, num_prompts: int) -> int:
        num = 1 if n is None else n
        most = min(self.limits.max_choices, self.worker.engine.limits.max_waiting)
        if num < 1 or num * num_prompts > most:
            raise ApiError(
                400,
                f"n must be at least 1, and prompts times n at most {most}; got {num_prompts} times {num}.",
                param="n",
            )
        return num

    def _checked_length(self, limit: int) -> int:
        if not 1 <= limit <= self.limits.max_answer_tokens:
            raise ApiError(
                400, f"max_tokens must be from 1 to {self.limits.max_answer_tokens:,}; got {limit}.", param="max_tokens"
            )
        return limit

    def _open_infill(self, body: CompletionRequest, knobs: dict[str, Any]) -> Asked:
        mode = knobs.pop("mode", "diffusion")
        if mode not in ("auto", "diffusion", "dlm"):
            raise ApiError(
                400, f"suffix fills a gap by diffusion; mode {mode!r} cannot. Leave one of them out.", param="mode"
            )
        for name, given in (("response_format", body.response_format), ("echo", body.echo)):
            if given:
                raise ApiError(400, f"{name} does not go with suffix. Leave one of them out.", param=name)
        if not isinstance(body.prompt, str):
            raise ApiError(400, "With suffix, prompt must be one string.", param="prompt")
        length = self._checked_length(COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens)
        special = bool(body.parse_special)
        before = self.encode_text(body.prompt, add_special_tokens=False, parse_special=special)
        behind = self.encode_text(body.suffix or "", add_special_tokens=False, parse_special=special)
        answers, spans = [], []
        with _told(body):
            for i in range(self._num_choices(body.n, 1)):
                own = dict(knobs)
                if i and isinstance(knobs.get("seed"), int):
                    own["seed"] = knobs["seed"] + i
                answer, places = self.model.open_infill([*before, *[None] * length, *behind], **own)
                answers.append(answer)
                spans.append(places)
        return Asked(answers=answers, num_choices=body.n or 1, spans=spans)

    # ---- answers on their way ---------------------------------------------------------------------------------------------

    def admit(self, asked: Asked, client: str) -> Call:
        """Let a request in. Raises ApiError: 429 when there is no room, 503 when the server stops."""
        if not self.is_ready:
            raise ApiError(503, "The server is stopping.", code="server_stopping", headers={"Retry-After": "5"})
        most = self.limits.requests_per_key
        if most is not None and self._calls_of[client] >= most:
            raise ApiError(
                429,
                f"{self._calls_of[client]} requests of this key are on their way, as many as may.",
                code="too_many_requests",
                headers={"Retry-After": str(self.retry_after_s)},
            )
        loop = asyncio.get_running_loop()
        call = Call(entries=[], deadline=time.monotonic() + self.limits.request_time_s)

        def listener(index: int) -> Callable[[StreamEvent], None]:
            def tell(event: StreamEvent) -> None:
                # a loop that has been closed has nobody left who waits
                if not loop.is_closed():
                    loop.call_soon_threadsafe(call.events.put_nowait, (index, event))

            return tell

        call.entries = [
            Entry(answer, listener(i), client=client, wants_canvas=asked.wants_canvas)
            for i, answer in enumerate(asked.answers)
        ]
        try:
            self.worker.submit(*call.entries)
        except TrimodeError as error:
            raise as_api_error(error, retry_after_s=self.retry_after_s) from None
        self._calls.add(call)
        self._calls_of[client] += 1
        return call

    def release(self, call: Call, client: str) -> None:
        """The request is over, however it ended."""
        call.cancel(self.worker)
        if call in self._calls:
            self._calls.remove(call)
            self._calls_of[client] -= 1
            if not self._calls_of[client]:
                del self._calls_of[client]

    async def events(self, call: Call) -> AsyncIterator[tuple[int, StreamEvent] | None]:
        """What happens to a call's answers, until all have ended; None now and then while nothing does.

        Raises ApiError when they cannot be finished.
        """
        num_left = len(call.entries)
        while num_left:
            left = call.deadline - time.monotonic()
            try:
                # not wait_for: in Python 3.11 it forgets that it was cancelled if an event comes at the same moment
                async with asyncio.timeout(max(0.0, min(left, HEARTBEAT_S))):
                    index, event = await call.events.get()
            except TimeoutError:
                if left <= HEARTBEAT_S:
                    limit = f"{self.limits.request_time_s:g}"
                    cause = ApiError(408, f"The request took longer than {limit} seconds.", code="timeout")
                    call.cancel(self.worker, cause)
                    raise cause from None
                yield None
                continue
            if event.kind == "finish":
                num_left -= 1
                self._note_end(call, index, event)
            yield index, event

    def _note_end(self, call: Call, index: int, event: StreamEvent) -> None:
        assert event.output is not None
        output = event.output
        self.metrics.note_answer(output.stats, call.entries[index].generation.tally.forwards, output.finish_reason)
        self._usual_s = 0.9 * self._usual_s + 0.1 * output.stats.seconds
        if output.finish_reason == "error":
            raise ApiError(500, "The answer could not be finished: an error of the server's own.")
        if output.finish_reason == "cancelled":
            raise call.cause or ApiError(503, "The answer was stopped.", code="stopped")

    @property
    def retry_after_s(self) -> int:
        """Seconds until there may be room, roughly."""
        s = self.worker.snapshot
        rounds = (s.waiting + 1) / max(1, self.worker.engine.limits.max_running)
        return max(1, min(60, math.ceil(rounds * self._usual_s)))

    def filled(self, asked: Asked, call: Call, index: int, event: StreamEvent) -> StreamEvent:
        """With a text that was filled in: the last event, with the missing part as its text."""
        assert asked.spans is not None
        assert event.output is not None
        infilled = self.model.infilled(call.entries[index].answer, asked.spans[index])
        ids = [infilled.token_ids[i] for span in asked.spans[index] for i in span]
        output = replace(event.output, text="".join(infilled.spans), token_ids=ids, stats=infilled.stats)
        return StreamEvent(kind="finish", text=output.text, token_ids=tuple(ids), output=output)


class _told:  # noqa: N801 - read as a word: with _told(body)
    """Library errors become replies that name the request's field."""

    def __init__(self, body: GenerationRequest) -> None:
        # only what was given can be at fault
        self._fields = set(body.model_fields_set)

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, TrimodeError):
            raise as_api_error(error, self._fields) from None


def _num_logprobs(asked: int, name: str) -> int:
    if not 0 <= asked <= MOST_LOGPROBS:
        raise ApiError(400, f"{name} must be from 0 to {MOST_LOGPROBS}; got {asked}.", param=name)
    return asked


def _one_of(body: ChatRequest, old: str, new: str) -> int | None:
    first, second = getattr(body, old), getattr(body, new)
    if first is not None and second is not None and first != second:
        raise ApiError(400, f"{old} is {first} and {new} is {second}. Give one of them.", param=old)
    return second if first is None else first


def _wants_canvas(body: GenerationRequest) -> bool:
    return bool(body.stream and body.stream_canvas)
