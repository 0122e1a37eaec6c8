"""How the commands start. A leaf, and quick to import."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Meanwhile an interrupt ends the process as it ends any program: Python would show where among
    the imports it was. One that is ignored stays so."""
    caught = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if caught:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    yield
    if caught:
        signal.signal(signal.SIGINT, signal.default_int_handler)
