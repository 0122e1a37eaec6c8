"""What the server tells its operator: counts and kinds of trouble, on standard error.

Never a key, serial, voucher, address, size or anything else that links requests.
"""

from __future__ import annotations

import json
import logging
import time
from typing import Final

QUIET_SECONDS: Final = 60.0

_log = logging.getLogger("hpkvd")


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """One object a line. Without a time: whoever keeps it adds one, if it is wanted."""
        return json.dumps({"level": record.levelname.lower(), "message": record.getMessage()})


def start(*, as_json: bool = False) -> None:
    """Send what is told to standard error, one line each: text, or objects of JSON.

    Only what is told here. Libraries have logs of their own, and know nothing of the rule above:
    httpx names each URL, and in a node's or a mint's URLs are payment hashes and quotes.
    """
    handler = logging.StreamHandler()
    handler.addFilter(logging.Filter(_log.name))
    handler.setFormatter(_Json() if as_json else logging.Formatter("hpkvd: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.INFO)


def tell(message: str) -> None:
    """One line about the server's life."""
    _log.info(message)


class Complaints:
    """Errors, each kind at most once a minute: a full disk must not fill a log as well."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}

    def complain(self, message: str) -> None:
        """Tell of an error, unless the same was told less than QUIET_SECONDS ago."""
        now = time.monotonic()
        if now - self._last.get(message, -QUIET_SECONDS) >= QUIET_SECONDS:
            self._last[message] = now
            _log.error(message)
