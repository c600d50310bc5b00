"""One error root, families by who must act, and OpenAI's envelope.

An error has a stable ``code``, a message that says what to do next, the HTTP status that the API answers with, and the
name of the field at fault if there is one. Messages never hold prompts, results, locations or keys.
"""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec


class MotorpoolError(Exception):
    """The root of every error that Motorpool raises on purpose."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.param = param

    def envelope(self) -> dict[str, Any]:
        """OpenAI's error body; all four keys are always present."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class CallerError(MotorpoolError):
    """The request is at fault: whoever sent it must change it."""

    status = 400
    type = "invalid_request_error"
    default_code = "invalid_request"


class AuthenticationError(CallerError):
    """No key, or one that is unknown or revoked."""

    status = 401
    default_code = "invalid_api_key"


class PermissionDeniedError(CallerError):
    """The key is known but may not do this."""

    status = 403
    default_code = "permission_denied"


class NotFoundError(CallerError):
    """There is no such object, or it belongs to somebody else."""

    status = 404
    default_code = "not_found"


class ConflictError(CallerError):
    """The object is in a state that does not allow this."""

    status = 409
    default_code = "conflict"


class TooLargeError(CallerError):
    """A body or file is over a named bound."""

    status = 413
    default_code = "body_too_large"


class CapacityError(MotorpoolError):
    """Nothing is wrong with the request, but nothing can serve it now; ``retry_after_ms`` says when to try again."""

    status = 503
    type = "service_unavailable_error"
    default_code = "no_vehicle_available"

    def __init__(
        self, message: str, *, code: str | None = None, param: str | None = None, retry_after_ms: int = 2000
    ) -> None:
        super().__init__(message, code=code, param=param)
        self.retry_after_ms = retry_after_ms


class RateLimitError(CapacityError):
    """Too many requests from one place; ``retry_after_ms`` says when to go on."""

    status = 429
    type = "rate_limit_error"
    default_code = "rate_limit_exceeded"


class StorageFullError(MotorpoolError):
    """The disk, or the space set aside for Motorpool, is full."""

    status = 507
    type = "server_error"
    default_code = "storage_full"


class StoreError(MotorpoolError):
    """The database or the object store failed."""

    default_code = "store_error"


class VehicleError(MotorpoolError):
    """A vehicle or its engine failed."""

    status = 502
    default_code = "vehicle_error"


class EngineError(VehicleError):
    """The engine could not be started or answered nonsense."""

    default_code = "engine_error"


class TrustError(MotorpoolError):
    """A credential, consent, signature or hash does not hold."""

    status = 403
    type = "invalid_request_error"
    default_code = "trust_error"


class ModelFileError(TrustError):
    """A model file is missing, or is not the file that the catalogue names."""

    default_code = "model_file_mismatch"


class SetupError(MotorpoolError):
    """The machine or the command line is at fault: a port in use, a missing program, a bad option."""

    default_code = "setup_error"


class ErrorBody(msgspec.Struct, frozen=True):
    """The inner object of OpenAI's envelope."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(msgspec.Struct, frozen=True):
    """OpenAI's error envelope, for decoding."""

    error: ErrorBody
