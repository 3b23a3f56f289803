"""Who may ask: API keys, from a file or the environment, compared in constant time."""

import hashlib
import hmac
import os
from pathlib import Path

from trimode.errors import SettingError
from trimode.server.faults import ApiError

__all__ = ["ANYBODY", "KEYS_VARIABLE", "ApiKeys"]

KEYS_VARIABLE = "TRIMODE_API_KEYS"
"""Keys, with commas between them, for those who would rather not write a file."""
ANYBODY = "anybody"
"""The client where no keys are asked for."""


class ApiKeys:
    """The keys of a server; none at all lets everybody in."""

    def __init__(self, keys: list[str]) -> None:
        for key in keys:
            if not key.isascii() or not key.isprintable() or " " in key:
                raise SettingError("An API key must be printable ASCII without blanks; one of those given is not.")
        # digests: of equal length, so that comparing tells nothing about how long a key is
        self._digests = {f"key-{i + 1}": _digest(key) for i, key in enumerate(dict.fromkeys(keys))}

    @classmethod
    def read(cls, file: Path | None) -> "ApiKeys":
        """From a file, one key a line (blank lines and those that begin with # are skipped), and from the environment."""
        keys = [key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",") if key.strip()]
        if file is not None:
            try:
                lines = file.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                reason = getattr(error, "strerror", None) or "not UTF-8 text"
                raise SettingError(f"The file of API keys {file} cannot be read: {reason}.") from None
            found = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
            if not found:
                raise SettingError(f"The file of API keys {file} holds none. Write one key a line.")
            keys += found
        return cls(keys)

    def __len__(self) -> int:
        return len(self._digests)

    def client_of(self, authorization: str | None) -> str:
        """The name of the key in an Authorization header. Raises ApiError 401."""
        if not self._digests:
            return ANYBODY
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise _refused("No API key was given. Send it as 'Authorization: Bearer KEY'.")
        given = _digest(key.strip())
        # all of them, always: the time taken tells nothing
        matches = [name for name, digest in self._digests.items() if hmac.compare_digest(digest, given)]
        if not matches:
            raise _refused("The API key is not one of this server's.")
        return matches[0]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _refused(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
