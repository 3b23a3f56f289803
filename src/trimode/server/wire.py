"""Answers in OpenAI's words: whole replies and chunks of a stream, with what they cost beside the usage."""

import secrets
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from trimode.decoding.interface import TokenLogprob
from trimode.decoding.self_speculation import drafts_adapt
from trimode.engine.language_model import LanguageModel
from trimode.engine.request import Generated, Stats, StreamEvent
from trimode.server.schema import ChatRequest, GenerationRequest
from trimode.server.service import Asked, Call
from trimode.server.tools import ToolCallReader

__all__ = ["ChatWire", "CompletionWire", "usage_of"]


class _Wire:
    """One request's reply."""

    kind = ""
    chunk_kind = ""

    def __init__(self, model: LanguageModel, name: str, body: GenerationRequest, asked: Asked, call: Call) -> None:
        self.model = model
        self.body = body
        self.asked = asked
        self.call = call
        prefix = "chatcmpl" if isinstance(body, ChatRequest) else "cmpl"
        self._head = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": name}
        self._num = len(asked.answers)
        self._readers = [ToolCallReader() for _ in asked.answers] if asked.tools is not None else None
        self._told_usage = bool(body.stream_options and body.stream_options.include_usage)

    # ---- a stream

    def opening(self) -> list[dict[str, Any]]:
        """Chunks before the first event."""
        return []

    def chunks(self, index: int, event: StreamEvent) -> list[dict[str, Any]]:
        """What a client is told of an event."""
        if event.kind == "canvas":
            chunk = self._chunk(index, "")
            return [{**chunk, "canvas": {"index": index, "tokens": event.canvas}}]
        text, calls = event.text, []
        if self._readers is not None:
            text, calls = self._readers[index].push(text)
            if event.kind == "finish":
                text += self._readers[index].finish()
        chunks = []
        if (
            text
            or calls
            or event.logprobs
            or (event.token_ids and (self.body.return_token_ids or self.body.stream_canvas))
        ):
            chunks.append(self._chunk(index, text, event, calls=calls))
        if event.kind == "finish":
            assert event.output is not None
            chunks.append(self._chunk(index, "", finish_reason=self._reason(event.output, index)))
        return chunks

    def usage_chunk(self, outputs: Sequence[Generated]) -> dict[str, Any] | None:
        """The last chunk, for those who asked for the usage."""
        if not self._told_usage:
            return None
        usage = usage_of(outputs, self.call, self.asked.num_choices)
        return {**self._head, "object": self.chunk_kind, "choices": [], "usage": usage}

    def _chunk(
        self,
        index: int,
        text: str,
        event: StreamEvent | None = None,
        *,
        calls: Sequence[dict[str, Any]] = (),
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        choice = {"index": index, **self._piece(text, calls), "finish_reason": finish_reason}
        if event is not None:
            told = event.logprobs
            choice["logprobs"] = self._logprobs(told) if self._wants_logprobs else None
            if self.body.return_token_ids:
                choice["token_ids"] = list(event.token_ids)
        chunk = {**self._head, "object": self.chunk_kind, "choices": [choice]}
        if event is not None and self.body.stream_canvas:
            chunk["committed"] = [self.model.token_text(token) for token in event.token_ids]
        if self._told_usage:
            chunk["usage"] = None
        return chunk

    # ---- a whole reply

    def whole(self, outputs: Sequence[Generated]) -> dict[str, Any]:
        """The reply without streaming."""
        choices = []
        for i, output in enumerate(outputs):
            text, calls = output.text, []
            if self._readers is not None:
                text, calls = self._readers[i].push(text)
                text += self._readers[i].finish()
            choice = {
                "index": i,
                **self._all(i, text, calls),
                "logprobs": self._logprobs(output.logprobs or []) if self._wants_logprobs else None,
                "finish_reason": self._reason(output, i),
            }
            if self.body.return_token_ids:
                choice["token_ids"] = output.token_ids
            choices.append(choice)
        usage = usage_of(outputs, self.call, self.asked.num_choices)
        return {**self._head, "object": self.kind, "choices": choices, "usage": usage}

    def _reason(self, output: Generated, index: int) -> str:
        if self._readers is not None and self._readers[index].num_calls and output.finish_reason == "stop":
            return "tool_calls"
        return output.finish_reason

    # ---- log-probabilities

    @property
    def _wants_logprobs(self) -> bool:
        return self.asked.answers[0].generation.settings.logprobs is not None

    @property
    def _logprobs_kind(self) -> str:
        # in `ar` and `self_spec` the causal view's own; in `diffusion` what the pass that filled a place thought
        return "at_commit" if self.asked.answers[0].mode == "diffusion" else "autoregressive"

    def _text_tokens(self, told: Sequence[TokenLogprob]) -> list[TokenLogprob]:
        return [t for t in told if t.token not in self.model.config.eos_token_ids]

    def _token(self, token: int) -> str:
        tokenizer = self.model.tokenizer
        return str(token) if tokenizer is None else tokenizer.decode([token], skip_special_tokens=False)

    def _bytes(self, token: int) -> list[int]:
        tokenizer = self.model.tokenizer
        known = None if tokenizer is None else tokenizer.token_bytes(token)
        return list(known if known is not None else self._token(token).encode())

    # ---- where chats and completions differ

    def _piece(self, text: str, calls: Sequence[dict[str, Any]]) -> dict[str, Any]:
        raise NotImplementedError

    def _all(self, index: int, text: str, calls: Sequence[dict[str, Any]]) -> dict[str, Any]:
        raise NotImplementedError

    def _logprobs(self, told: Sequence[TokenLogprob]) -> dict[str, Any]:
        raise NotImplementedError


class ChatWire(_Wire):
    """/v1/chat/completions"""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def opening(self) -> list[dict[str, Any]]:
        chunks = [self._chunk(i, "") for i in range(self._num)]
        for chunk in chunks:
            chunk["choices"][0]["delta"] = {"role": "assistant", "content": ""}
        return chunks

    def _piece(self, text: str, calls: Sequence[dict[str, Any]]) -> dict[str, Any]:
        delta: dict[str, Any] = {}
        if text:
            delta["content"] = text
        if calls:
            delta["tool_calls"] = list(calls)
        return {"delta": delta}

    def _all(self, index: int, text: str, calls: Sequence[dict[str, Any]]) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message["content"] = text if text.strip() else None
            message["tool_calls"] = [{k: v for k, v in call.items() if k != "index"} for call in calls]
        return {"message": message}

    def _logprobs(self, told: Sequence[TokenLogprob]) -> dict[str, Any]:
        content = [
            {
                **self._one(t.token, t.logprob),
                "top_logprobs": [self._one(token, logprob) for token, logprob in t.best],
            }
            for t in self._text_tokens(told)
        ]
        return {"content": content, "refusal": None, "kind": self._logprobs_kind}

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self._token(token), "logprob": _finite(logprob), "bytes": self._bytes(token)}


class CompletionWire(_Wire):
    """/v1/completions"""

    kind = "text_completion"
    chunk_kind = "text_completion"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._offsets = 0

    def opening(self) -> list[dict[str, Any]]:
        return [self._chunk(i, self._echo(i)) for i in range(self._num)] if self.asked.echo is not None else []

    def _echo(self, index: int) -> str:
        return "" if self.asked.echo is None else self.asked.echo[index // self.asked.num_choices]

    def _piece(self, text: str, calls: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {"text": text, "logprobs": None}

    def _all(self, index: int, text: str, calls: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {"text": self._echo(index) + text}

    def _logprobs(self, told: Sequence[TokenLogprob]) -> dict[str, Any]:
        told = self._text_tokens(told)
        tokens = [self._token(t.token) for t in told]
        offsets, at = [], self._offsets
        for token in tokens:
            offsets.append(at)
            at += len(token)
        self._offsets = at if self.body.stream and self._num == 1 else 0
        return {
            "tokens": tokens,
            "token_logprobs": [_finite(t.logprob) for t in told],
            "top_logprobs": [{self._token(token): _finite(logprob) for token, logprob in t.best} for t in told],
            "text_offset": offsets,
            "kind": self._logprobs_kind,
        }


def usage_of(outputs: Sequence[Generated], call: Call, num_choices: int) -> dict[str, Any]:
    """Tokens as OpenAI counts them, the mode that ran, and what it took."""
    stats = [output.stats for output in outputs]
    # a prompt is read once for each answer, but it is one prompt
    prompt_tokens = sum(s.prompt_tokens for s in stats[::num_choices])
    tokens = sum(s.tokens for s in stats)
    cached = sum(entry.num_reused for entry in call.entries[::num_choices])
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": prompt_tokens + tokens,
        "prompt_tokens_details": {"cached_tokens": cached},
        "mode": stats[0].mode,
        "cost": _cost(stats, call),
    }


def _cost(stats: Sequence[Stats], call: Call) -> dict[str, Any]:
    tokens = sum(s.tokens for s in stats)
    prefill, decode = sum(s.nfe_prefill for s in stats), sum(s.nfe_decode for s in stats)
    tallies = [entry.generation.tally for entry in call.entries]
    rounds, round_tokens = sum(t.rounds for t in tallies), sum(t.round_tokens for t in tallies)
    seconds = max(s.seconds for s in stats)
    first = call.entries[0].generation
    choices = sum((Counter(entry.generation.choices) for entry in call.entries), Counter())
    # the rounds of `auto` had blocks of several lengths, which `choices` tells; so have linear drafts that adapt
    adapting = stats[0].self_spec_kind == "linear" and drafts_adapt(first)
    blocks = stats[0].mode in ("diffusion", "self_spec") and not choices and not adapting
    return {
        "nfe_prefill": prefill,
        "nfe_decode": decode,
        "decode_tpf": tokens / max(decode, 1),
        "e2e_tpf": tokens / max(prefill + decode, 1),
        "acceptance_length": round_tokens / rounds if rounds else None,
        "block_length": (first.settings.block_length or first.traits.block_length) if blocks else None,
        "self_spec_kind": stats[0].self_spec_kind,
        "choices": dict(choices) or None,
        "revised": sum(s.revised for s in stats),
        "seconds": seconds,
        "first_token_seconds": min(s.first_token_seconds for s in stats),
        "tokens_per_second": tokens / seconds if seconds > 0 else 0.0,
        "notice": stats[0].notice,
    }


def _finite(logprob: float) -> float:
    # JSON has no minus infinity; OpenAI writes this number for what is practically impossible
    return max(logprob, -9999.0)
