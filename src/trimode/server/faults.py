"""Every refusal in OpenAI's error shape, with the status that its clients expect."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from trimode.errors import ContextLengthError, EngineContractError, GrammarError, QueueFullError, TrimodeError

__all__ = ["ApiError", "as_api_error"]

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class ApiError(Exception):
    """A request that is refused, or could not be finished."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The reply."""
        return {
            "error": {
                "message": str(self),
                "type": _TYPES.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }


def as_api_error(error: TrimodeError, fields: Collection[str] = (), *, retry_after_s: int = 1) -> ApiError:
    """The same fault as a reply. `fields`: what the request gave, to name the one that is at fault."""
    message = " ".join(str(error).split())
    if isinstance(error, QueueFullError):
        return ApiError(429, message, code="queue_full", headers={"Retry-After": str(retry_after_s)})
    if isinstance(error, EngineContractError):
        return ApiError(500, "The request could not be finished: an error of the server's own.")
    if isinstance(error, GrammarError):
        return ApiError(400, message, param=next((f for f in ("response_format", "tools") if f in fields), None))
    words = re.findall(r"\w+", message)
    param = next((word for word in words if word in fields), None)
    code = "context_length_exceeded" if isinstance(error, ContextLengthError) else None
    return ApiError(400, message, param=param, code=code)
