"""What one request may ask of the server, and how a request that asks for more, or for something else, is answered."""

from dataclasses import dataclass
from typing import Any

BAD_REQUEST, FORBIDDEN, TOO_LARGE, NOT_JSON, BUSY, FAILED = 400, 403, 413, 415, 503, 500


@dataclass(frozen=True)
class Limits:
    """The most that one request, or all requests together, may have."""

    body_bytes: int = 2**20
    texts: int = 256  # of one request, or prompts
    new_tokens: int = 512  # of one answer
    waiting: int = 256  # requests that wait for the model
    seconds: float = 120.0  # from a request's first byte to its last


class Refused(Exception):
    """A request that is answered with an error: its HTTP status, a code for programs, one sentence, and the field."""

    def __init__(self, status: int, code: str, sentence: str, field: str | None = None) -> None:
        super().__init__(sentence)
        self.status, self.code, self.field = status, code, field

    def as_json(self) -> dict[str, Any]:
        """In OpenAI's form, which every endpoint uses."""
        kind = "invalid_request_error" if self.status < FAILED else "server_error"
        message, field = (text and text.encode("utf-8", "replace").decode() for text in (str(self), self.field))
        return {"error": {"message": message, "type": kind, "param": field, "code": self.code}}


def too_late() -> Refused:
    """The answer to a request that was not done in time."""
    return Refused(BUSY, "timeout", "not done in the time that a request has: ask for less, or try again later")
