"""The command `hpkvd`, also as `python -m hpkvd`.

Until all that it needs at once is imported, an interrupt ends it as it ends any program: Python
would show where among the imports it was.
"""

from __future__ import annotations

import signal


def main() -> None:
    """Run it."""
    caught = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else it is ignored
    if caught:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from hpkvd.cli import main as command

    if caught:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    command(prog_name="hpkvd")


if __name__ == "__main__":
    main()
