"""An hour (--minutes) of random system calls on a real mount, with a death each minute.

tests/mounted/soak.py says what is done and what must hold. HPKV_SEED chooses another program;
HPKV_SOAK_LIFE other lives (60 seconds).

    failures     must be 0; the run ends with the first
    lives, server_kills, steps, ...   what happened
    peak_mib     the most memory that the mounting process had
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Final

from tests.mounted.soak import Soak

SEED: Final = int(os.environ.get("HPKV_SEED", "1"))
LIFE: Final = float(os.environ.get("HPKV_SOAK_LIFE", "60"))


def run(as_json: bool, minutes: float = 60.0) -> dict[str, object]:
    """Figures as above."""

    def tell(message: str) -> None:
        if not as_json:
            print(time.strftime("%H:%M:%S"), message, file=sys.stderr)

    start = time.monotonic()

    def lives() -> Iterator[int]:
        for number in count():
            if number and time.monotonic() - start > 60 * minutes:
                return
            yield number

    failure = ""
    with tempfile.TemporaryDirectory(prefix="hpkvfs-soak-") as base:
        soak = Soak(Path(base), SEED, LIFE, tell)
        try:
            soak.run(lives())
        except AssertionError as error:
            failure = str(error) or repr(error)
        finally:
            soak.discard()
    counts = {name.replace(" ", "_"): number for name, number in soak.counts.items()}
    return {
        "failures": int(bool(failure)),
        "minutes": round((time.monotonic() - start) / 60, 1),
        **counts,
        "peak_mib": round(soak.peak_mib, 1),
        "seed": SEED,
        "failure": failure,
    }
