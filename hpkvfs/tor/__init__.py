"""A tor, found or started, kept up, and the onion services that it publishes. A leaf.

    keeper.py     keeps one up, from its start to its end; publishes services again
    process.py    one that is ours: starts it, ends it
    services.py   what tor is told of an onion service, and of what bounds who comes
    control.py    the control connection; the only importer of stem

net/circuits.py uses it for the client, and hpkvd for the server. Sources: tor's control-spec,
rend-spec-v3; tor(1).
"""

from hpkvfs.tor.control import Endpoint, TorError
from hpkvfs.tor.keeper import AUTO, OWN, Tor, parse_where, running
from hpkvfs.tor.process import TORRC, further_settings
from hpkvfs.tor.services import Limits, Onion, Throttle

__all__ = [
    "AUTO",
    "OWN",
    "TORRC",
    "Endpoint",
    "Limits",
    "Onion",
    "Throttle",
    "Tor",
    "TorError",
    "further_settings",
    "parse_where",
    "running",
]
