"""One vault in use by this process.

    opening.py        builds one from a state directory
    session.py        starts it, keeps it going, answers for it
    footing.py        the generation that what is changed here lies upon: known, found, gone on from
    admission.py      how much may wait to be published, by room and by tokens
    housekeeping.py   collection and checks
    records.py        what the publisher has this machine remember
    options.py        how a vault is used

Whoever uses one needs no more than this.
"""

from hpkvfs.session.footing import TakeOver
from hpkvfs.session.opening import open_session
from hpkvfs.session.options import Options
from hpkvfs.session.session import Session

__all__ = ["Options", "Session", "TakeOver", "open_session"]
