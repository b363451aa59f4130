"""Storage that is full, slow or away: told in one line, and never the end of training."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# How it shows in the messages of Orbax, tensorstore and TensorFlow, which raise no OSError.
_SIGNS = re.compile(
    r"OS error|errno|no space|input/output|RESOURCE_EXHAUSTED|UNAVAILABLE|DEADLINE|quota", re.I
)


def is_storage_failure(error: BaseException) -> bool:
    """Whether an error is the storage's, and not a mistake in a program."""
    return isinstance(error, OSError) or bool(_SIGNS.search(str(error)))


def reason(error: BaseException) -> str:
    """What happened, out of an error's message, in a short line."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if found := re.search(r"(?:: )([^:\[]+) \[os_error_code", text):
        return found.group(1)  # tensorstore's
    return text if len(text) < 160 else text[:160] + " ..."


@contextmanager
def tolerated(what: str) -> Iterator[None]:
    """Turns a failure of the storage into a warning that `what` could not be written."""
    try:
        yield
    except Exception as error:
        if not is_storage_failure(error):
            raise
        warn(f"{what} could not be written, training goes on: {reason(error)}")


def warn(line: str) -> None:
    """One line on standard error."""
    print("warning: " + line, file=sys.stderr, flush=True)


def quiet_orbax() -> None:
    """Keeps Orbax from logging tracebacks of a failed save, which we tell in a line."""
    logger = logging.getLogger("absl")
    if not any(isinstance(each, _NoTraceback) for each in logger.filters):
        logger.addFilter(_NoTraceback())


class _NoTraceback(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and "/orbax/" in record.pathname)
