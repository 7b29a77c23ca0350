"""Why a request was refused: one reason, one sentence, and the status that each protocol gives it."""

from __future__ import annotations

from enum import Enum

from missile.errors import MissileError

__all__ = ["Reason", "Refusal"]


class Reason(Enum):
    """(short name for metrics, HTTP status, name of the gRPC status)."""

    INVALID = ("invalid", 400, "INVALID_ARGUMENT")
    UNAUTHENTICATED = ("unauthenticated", 401, "UNAUTHENTICATED")
    FORBIDDEN = ("forbidden", 403, "PERMISSION_DENIED")
    NOT_FOUND = ("not_found", 404, "NOT_FOUND")
    METHOD = ("method", 405, "UNIMPLEMENTED")
    CONFLICT = ("conflict", 409, "ALREADY_EXISTS")
    TOO_LARGE = ("too_large", 413, "RESOURCE_EXHAUSTED")
    CONTENT_TYPE = ("content_type", 415, "INVALID_ARGUMENT")
    RATE = ("rate", 429, "RESOURCE_EXHAUSTED")
    CANCELLED = ("cancelled", 499, "CANCELLED")
    FAILED = ("failed", 500, "INTERNAL")
    UNSUPPORTED = ("unsupported", 501, "UNIMPLEMENTED")
    OVERLOADED = ("overloaded", 503, "UNAVAILABLE")
    NOT_READY = ("not_ready", 503, "UNAVAILABLE")
    ENGINE_LOST = ("engine_lost", 503, "UNAVAILABLE")
    EXPIRED = ("expired", 504, "DEADLINE_EXCEEDED")

    def __init__(self, label: str, http: int, grpc: str) -> None:
        self.label = label
        self.http = http
        self.grpc = grpc


class Refusal(MissileError):
    """A request that gets no result. `str(refusal)` goes to the client: it never holds payload or paths of the server.

    retry_after_s: when asking again makes sense (0.0: not said).
    """

    def __init__(self, reason: Reason, message: str, *, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after_s = retry_after_s
