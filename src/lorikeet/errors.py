"""One hierarchy of errors: a code, an HTTP status, a hint, and whether trying again can help."""

from __future__ import annotations

import errno
from pathlib import Path

from lorikeet.types import ErrorInfo


class LorikeetError(Exception):
    """Base of every error a user can meet.

    `code` is stable and machine-readable, `param` names the field at fault, `hint` says what to do next.
    """

    code = "internal_error"
    status = 500
    retryable = False

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.param = param
        self.retry_after = retry_after
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message

    def info(self) -> ErrorInfo:
        return ErrorInfo(
            code=self.code,
            message=self.message,
            status=self.status,
            hint=self.hint,
            retryable=self.retryable,
            retry_after=self.retry_after,
            param=self.param,
        )

    def without(self, folder: Path) -> LorikeetError:
        """The same error, which tells nothing of where on this machine the folder is; files in it keep their names."""

        def cut(text: str | None) -> str | None:
            return text and text.replace(f"{folder}/", "").replace(str(folder), "what was sent")

        self.message, self.hint, self.param = cut(self.message) or "", cut(self.hint), cut(self.param)
        self.args = (self.message,)
        return self

    @staticmethod
    def from_info(info: ErrorInfo) -> LorikeetError:
        error = LorikeetError(
            info.message, hint=info.hint, param=info.param, code=info.code, retry_after=info.retry_after
        )
        error.status = info.status
        error.retryable = info.retryable
        return error


class ConfigError(LorikeetError):
    """A recipe, flag or setting that cannot be used."""

    code = "invalid_config"
    status = 400


class DataError(LorikeetError):
    """Rows that cannot be read, cannot teach, or contradict the recipe."""

    code = "invalid_data"
    status = 422


class InvalidRequestError(LorikeetError):
    """A request whose values make no sense (too long, negative, contradictory)."""

    code = "invalid_request"
    status = 400


class UnsupportedFieldError(LorikeetError):
    """An unknown field, or a known one whose value is not supported. `param` names it."""

    code = "unsupported_field"
    status = 422


class ForbiddenError(LorikeetError):
    """Whoever asks is known, but may not do this."""

    code = "forbidden"
    status = 403


class NotFoundError(LorikeetError):
    """An unknown model or adapter."""

    code = "model_not_found"
    status = 404


class AdapterError(LorikeetError):
    """An adapter that cannot be served on this base: the file, the tensor, expected and found."""

    code = "invalid_adapter"
    status = 422


class AdapterInUseError(LorikeetError):
    """The adapter cannot be brought in or taken out now."""

    code = "adapter_in_use"
    status = 409


class LockMismatchError(LorikeetError):
    """The adapter was trained for another base, tokenizer or stop ids than the one served."""

    code = "lock_mismatch"
    status = 409


class ConflictError(LorikeetError):
    """What is asked for contradicts what is there."""

    code = "conflict"
    status = 409


class LeaseLostError(ConflictError):
    """Somebody else runs the job now, or nobody."""

    code = "lease_lost"


class ModelError(LorikeetError):
    """A base checkpoint that cannot be loaded: unsupported field, missing or misshapen tensor."""

    code = "invalid_model"
    status = 422


class SourceRefusedError(InvalidRequestError):
    """A reference to an adapter that this server does not follow: its scheme, its address, its form."""

    code = "source_refused"


class SourceError(LorikeetError):
    """Where an adapter comes from fails, or sends something else than it announced."""

    code = "source_failed"
    status = 502
    retryable = True


class DiskFullError(LorikeetError):
    """There is no room for a download, or for a compiled adapter."""

    code = "disk_full"
    status = 507
    retryable = True


class OverloadedError(LorikeetError):
    """The queue is full."""

    code = "overloaded"
    status = 429
    retryable = True


class UnavailableError(LorikeetError):
    """The engine is restarting or draining."""

    code = "unavailable"
    status = 503
    retryable = True


class AdapterLostError(UnavailableError):
    """The compiled file of an adapter is gone or damaged: the adapter has to be compiled again."""

    code = "adapter_lost"


class DeadlineError(LorikeetError):
    """The request's own deadline passed."""

    code = "deadline_exceeded"
    status = 504
    retryable = True


def disk_error(error: OSError, folder: Path) -> DiskFullError | UnavailableError:
    """What a failed write below `folder` means to whoever asked for it."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFullError(f"the disk of {folder} is full", hint="free some space, or set LORIKEET_CACHE elsewhere")
    return UnavailableError(f"{folder} cannot be written: {error.strerror or error}", hint="look at its permissions")
