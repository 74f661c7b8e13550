"""The server's log: one record, one line, and no secret in it, whatever a request says."""

from __future__ import annotations

import logging
import re

FORMAT = "%(levelname)s:     %(name)s: %(message)s"
# What ends a line or moves the cursor of a terminal; a tab may stay.
_CONTROLS = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029]")
_SECRETS = re.compile(r"(lk_)[A-Za-z0-9_-]{8,}|(\b[Bb]earer\s+)[^\s,'\"]+|(\bhf_)[A-Za-z0-9]{8,}")


class LineFormatter(logging.Formatter):
    """Control characters are escaped and the lines of a traceback indented, so that no text of a request can pass for
    a record of its own. Keys are cut: nothing logs them on purpose, but an exception may quote one."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = _CONTROLS.sub(lambda found: repr(found[0])[1:-1], record.message)
        return super().formatMessage(record)

    def formatException(self, ei: object) -> str:
        text: str = super().formatException(ei)  # type: ignore[arg-type]
        return "\n".join("    " + _CONTROLS.sub("?", line) for line in text.splitlines())

    def format(self, record: logging.LogRecord) -> str:
        return _SECRETS.sub(lambda found: (found[1] or found[2] or found[3]) + "...", super().format(record))


def start_logging(level: int = logging.INFO) -> None:
    """Send the log to stderr, unless whoever embeds the server has set up one of their own."""
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter(FORMAT))
    logging.basicConfig(level=level, handlers=[handler])
