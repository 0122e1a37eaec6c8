"""Asking until there is an answer.

The same frame is sent again, each time on a new connection, until a reply comes or patience
ends: the server recognises a request it has performed and answers as it did then. Pauses double
and are drawn at random, so that many clients do not come back together; a server that is busy
says how long to stay away at least.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import trio

from hpkvfs.errors import Misbehaviour
from hpkvfs.net.transport import EXCHANGE_SECONDS, Dialer, NoReply, exchange
from hpkvfs.protocol.errors import Malformed
from hpkvfs.protocol.messages import Reason, Refused, Reply, decode_reply

FIRST_PAUSE: Final = 0.1
LONGEST_PAUSE: Final = 5.0
_NOT_NOW: Final = (Reason.BUSY, Reason.INTERNAL)


@dataclass(frozen=True, slots=True)
class Line:
    """A way to one server, and how long to try: `patience` seconds for each request.

    One try may take a quarter of that, since a slow way to the server (Tor) is also one that
    loses requests; but a server is given EXCHANGE_SECONDS.
    """

    dialer: Dialer
    rng: Callable[[int], bytes]
    patience: float = 20.0

    async def ask(self, frame: bytes) -> Reply:
        """The reply to a request's frame; it is none that says to come again.

        NoReply when patience ends, Misbehaviour for bytes that are no reply.
        """
        end = trio.current_time() + self.patience
        sent, pause = False, FIRST_PAUSE
        while True:
            wait = 0.0
            try:
                reply = await self._once(frame, end - trio.current_time())
                if not isinstance(reply, Refused) or reply.reason not in _NOT_NOW:
                    return reply
                wait = reply.retry_after
                failure = NoReply("the server is too busy to answer", "try again later", sent=True)
            except NoReply as error:
                failure = error
            sent = sent or failure.sent
            pause = min(2 * pause, LONGEST_PAUSE)
            wait += pause * self._fraction()
            if trio.current_time() + wait >= end:
                raise NoReply(failure.message, failure.hint, sent=sent) from failure
            await trio.sleep(wait)

    async def _once(self, frame: bytes, seconds: float) -> Reply:
        longest = max(EXCHANGE_SECONDS, self.patience / 4)
        answer = await exchange(self.dialer, frame, min(max(seconds, 0), longest))
        try:
            return decode_reply(answer)
        except Malformed as error:
            raise Misbehaviour(
                f"the server's answer cannot be read: {error}",
                "nothing is lost; is it a server for hpkvfs?",
            ) from error

    def _fraction(self) -> float:
        """Uniform in [1/2, 1)."""
        return 0.5 + int.from_bytes(self.rng(4), "big") / 2**33
