"""The routes: each reads a request, asks the service, and writes what comes of it."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from importlib.resources import files
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from trimode import __version__
from trimode.engine.request import Generated
from trimode.errors import TrimodeError, nearest
from trimode.server.faults import ApiError, as_api_error
from trimode.server.front import Front, read_body
from trimode.server.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    TokenizeRequest,
    parse_body,
)
from trimode.server.service import Asked, Call, Service
from trimode.server.stream import DONE, HEARTBEAT, ClientGone, EventStream, gone, sse
from trimode.server.wire import ChatWire, CompletionWire

__all__ = ["create_app"]

INLINE_BYTES = 16_384
"""A larger body is read and encoded beside the event loop, so that streams do not wait for it."""
PATHS = (
    "/",
    "/v1/models",
    "/v1/chat/completions",
    "/v1/completions",
    "/tokenize",
    "/detokenize",
    "/health",
    "/ready",
    "/metrics",
)
# The page needs its own inline script and style, and nobody else's.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

Result = TypeVar("Result")
Wire = ChatWire | CompletionWire


def create_app(service: Service) -> FastAPI:
    """The HTTP face of a service. Its lifespan starts and stops the engine."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.stop)

    # no docs pages: those of FastAPI load their scripts from foreign hosts
    app = FastAPI(title="trimode", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(Front, metrics=service.metrics, paths=PATHS)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    _add_model_routes(app, service)
    _add_text_routes(app, service)
    _add_operator_routes(app, service)
    return app


def _add_model_routes(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", openapi_extra=_takes(ChatRequest))
    async def chat(request: Request) -> Response:
        client = _client(service, request)
        body, asked = await _opened(service, request, ChatRequest, service.open_chat)
        return await _answered(service, request, client, body, asked, ChatWire)

    @app.post("/v1/completions", openapi_extra=_takes(CompletionRequest))
    async def complete(request: Request) -> Response:
        client = _client(service, request)
        body, asked = await _opened(service, request, CompletionRequest, service.open_completion)
        return await _answered(service, request, client, body, asked, CompletionWire)

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        _client(service, request)
        return JSONResponse({"object": "list", "data": [_model_card(service)]})

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> Response:
        _client(service, request)
        service.check_model(name)
        return JSONResponse(_model_card(service))


def _add_text_routes(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize", openapi_extra=_takes(TokenizeRequest))
    async def tokenize(request: Request) -> Response:
        _client(service, request)
        _, ids = await _opened(service, request, TokenizeRequest, partial(_tokenized, service))
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": service.model.config.max_positions})

    @app.post("/detokenize", openapi_extra=_takes(DetokenizeRequest))
    async def detokenize(request: Request) -> Response:
        _client(service, request)
        _, text = await _opened(service, request, DetokenizeRequest, partial(_detokenized, service))
        return JSONResponse({"prompt": text})


def _add_operator_routes(app: FastAPI, service: Service) -> None:
    page = files("trimode.server").joinpath("static/index.html").read_text(encoding="utf-8")

    @app.get("/")
    async def index() -> Response:
        return HTMLResponse(page, headers={"content-security-policy": _PAGE_POLICY})

    @app.get("/health")
    async def health() -> Response:
        alive = service.worker.is_alive
        return JSONResponse({"status": "ok" if alive else "the engine has stopped"}, 200 if alive else 503)

    @app.get("/ready")
    async def ready() -> Response:
        said = "ready" if service.is_ready else "stopping" if service.is_draining else "starting"
        return JSONResponse({"status": said}, 200 if service.is_ready else 503)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        _client(service, request)
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


# ---- requests -------------------------------------------------------------------------------------------------------------


def _client(service: Service, request: Request) -> str:
    client = service.keys.client_of(request.headers.get("authorization"))
    request.state.facts["client"] = client
    return client


Body = TypeVar("Body", bound=BaseModel)


async def _opened(
    service: Service, request: Request, kind: type[Body], use: Callable[[Body], Result]
) -> tuple[Body, Result]:
    """The body, and what the service makes of it."""
    raw = await read_body(request, service.limits)

    def both() -> tuple[Body, Result]:
        body = parse_body(raw, kind)
        return body, use(body)

    # compiling a grammar may take a while, however short it is
    slow = len(raw) > INLINE_BYTES or b"response_format" in raw or b'"tools"' in raw
    return await asyncio.to_thread(both) if slow else both()


def _tokenized(service: Service, body: TokenizeRequest) -> list[int]:
    service.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "Give either prompt or messages.", param="prompt")
    try:
        if body.messages is not None:
            return service.encode_chat(body.messages)
        return service.encode_text(
            body.prompt or "", add_special_tokens=body.add_special_tokens, parse_special=body.parse_special
        )
    except TrimodeError as error:
        raise as_api_error(error, ("prompt", "messages")) from None


def _detokenized(service: Service, body: DetokenizeRequest) -> str:
    service.check_model(body.model)
    model = service.model
    if model.tokenizer is None:
        raise ApiError(400, f"{service.name} has no tokenizer.", param="tokens")
    try:
        ids = model.encode(body.tokens) if body.tokens else []
    except TrimodeError as error:
        raise as_api_error(error, ("tokens",)) from None
    return model.tokenizer.decode(ids, skip_special_tokens=False)


# ---- replies --------------------------------------------------------------------------------------------------------------


async def _answered(
    service: Service, request: Request, client: str, body: GenerationRequest, asked: Asked, kind: type[Wire]
) -> Response:
    call = service.admit(asked, client)
    wire = kind(service.model, service.name, body, asked, call)
    if body.stream:
        return EventStream(
            _pieces(service, asked, call, wire),
            send_time_s=service.limits.send_time_s,
            on_end=partial(_over, service, request, client, call),
            headers={},
        )
    whole = False
    try:
        reply = await _unless_gone(request, _collected(service, asked, call, wire))
        whole = True
        return _json(reply)
    finally:
        _over(service, request, client, call, whole)


def _over(service: Service, request: Request, client: str, call: Call, whole: bool) -> None:
    service.release(call, client)
    stats = [entry.answer.stats() for entry in call.entries]
    request.state.facts.update(
        mode=stats[0].mode,
        prompt_tokens=stats[0].prompt_tokens,
        completion_tokens=sum(s.tokens for s in stats),
        first_token_s=_rounded(call.entries[0].answer.first_token_s),
        finish=call.entries[0].generation.finish_reason if whole else "client gone",
    )


async def _pieces(service: Service, asked: Asked, call: Call, wire: Wire) -> AsyncIterator[bytes]:
    outputs: dict[int, Generated] = {}
    try:
        for chunk in wire.opening():
            yield sse(chunk)
        async for told in service.events(call):
            if told is None:
                yield HEARTBEAT
                continue
            index, event = told
            if asked.spans is not None:
                if event.kind != "finish":
                    continue
                event = service.filled(asked, call, index, event)
            if event.output is not None:
                outputs[index] = event.output
            chunks = wire.chunks(index, event)
            if chunks:
                yield b"".join(map(sse, chunks))
        usage = wire.usage_chunk([outputs[i] for i in range(len(outputs))])
        if usage is not None:
            yield sse(usage)
    except ApiError as error:
        yield sse(error.body())
    yield DONE


async def _collected(service: Service, asked: Asked, call: Call, wire: Wire) -> dict[str, Any]:
    outputs: dict[int, Generated] = {}
    async for told in service.events(call):
        if told is not None and told[1].output is not None:
            index, event = told
            if asked.spans is not None:
                event = service.filled(asked, call, index, event)
            assert event.output is not None
            outputs[index] = event.output
    return wire.whole([outputs[i] for i in range(len(outputs))])


async def _unless_gone(request: Request, work: Any) -> Any:
    """The work's result. Raises ClientGone, and gives the work up, when nobody waits for it any more."""
    working = asyncio.ensure_future(work)
    watching = asyncio.create_task(gone(request.receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        working.cancel()
        watching.cancel()


def _json(reply: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    body = json.dumps(reply, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    return Response(body, status, headers, media_type="application/json")


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path[:200]
    if error.status_code == 404:
        fault = ApiError(404, f"There is nothing at {path!r}.{nearest(path, PATHS)}", code="not_found")
    elif error.status_code == 405:
        fault = ApiError(405, f"{path} does not take {request.method}.", headers=dict(error.headers or {}))
    else:
        fault = ApiError(error.status_code, str(error.detail))
    return JSONResponse(fault.body(), fault.status, fault.headers)


def _model_card(service: Service) -> dict[str, Any]:
    config = service.model.config
    modes = ["auto", "ar", *([] if config.mask_token_id is None else ["diffusion", "self_spec"])]
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "trimode",
        "max_model_len": config.max_positions,
        "modes": modes,
        "block_length": config.block_length,
        "max_answer_tokens": service.limits.max_answer_tokens,
    }


def _takes(kind: type[BaseModel]) -> dict[str, Any]:
    return {"requestBody": {"content": {"application/json": {"schema": kind.model_json_schema()}}, "required": True}}


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)
