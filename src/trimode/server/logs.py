"""One JSON object a line on standard error. What people wrote, and what they were answered, is never in it."""

import json
import logging
import sys
import time
from typing import Any

__all__ = ["log", "set_up_logging"]

_LOGGER = logging.getLogger("trimode.server")


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            # where it happened, without the values: a message may hold what somebody wrote
            line["error"] = type(record.exc_info[1]).__name__
            line["traceback"] = _places(record.exc_info[2])
        return json.dumps(line, ensure_ascii=False, default=str)


def _places(trace: Any) -> list[str]:
    places = []
    while trace is not None:
        code = trace.tb_frame.f_code
        places.append(f"{code.co_filename}:{trace.tb_lineno} {code.co_name}")
        trace = trace.tb_next
    return places


def log(event: str, *, level: int = logging.INFO, error: BaseException | None = None, **facts: Any) -> None:
    """One line; facts that are None are left out."""
    known = {key: value for key, value in facts.items() if value is not None}
    _LOGGER.log(level, event, extra={"facts": known}, exc_info=error)


def set_up_logging(level: str) -> None:
    """Send the logs of the server, the engine and uvicorn to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines())
    for name in ("trimode", "uvicorn", "asyncio"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(level.upper() if name == "trimode" else "WARNING")
