"""The tables that came after a ledger's first schema, in the order in which they came.

Both engines have them, and a ledger of an older schema gets those that it lacks when it is opened.
"""

from __future__ import annotations

from hpkvd.ledger import newest, sweep, till


def tables(octets: str) -> tuple[str, ...]:
    """What makes them, a text for each schema version; `octets` is the engine's word for bytes."""
    return sweep.SCHEMA, till.schema(octets), newest.SCHEMA
