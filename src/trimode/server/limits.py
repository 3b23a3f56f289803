"""What one server grants at most, to anybody and to one key."""

from dataclasses import dataclass

__all__ = ["ServerLimits"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """Bounds of requests; what the engine holds at a time has limits of its own."""

    max_body_bytes: int = 2 << 20
    """A larger body is refused with 413."""
    max_discarded_bytes: int = 32 << 20
    """Of a body that is refused, so much is read and thrown away, so that the client hears why."""
    max_prompt_tokens: int | None = None
    """Longest prompt; None: the context is the limit."""
    max_answer_tokens: int = 4096
    """Longest answer, and the default of chats as far as the context has room."""
    max_block_length: int = 128
    """Longest block: a forward computes all of it, and everybody else waits for that."""
    max_choices: int = 16
    """Answers to one request: prompts times n."""
    requests_per_key: int | None = None
    """Requests that one key may have running or waiting; None: no limit of its own."""
    request_time_s: float = 600.0
    """From the body's arrival to the last token; then the request ends with an error."""
    body_time_s: float = 20.0
    """For a request line, its headers, or its body to arrive."""
    send_time_s: float = 30.0
    """A client that takes nothing for so long is given up."""
    max_connections: int = 512
    """Open connections; more are closed at once."""
    idle_time_s: float = 75.0
    """A connection without a request is closed."""
    grace_s: float = 30.0
    """After SIGTERM, what runs may go on for so long."""
