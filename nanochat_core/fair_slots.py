"""A bounded number of slots for which callers take turns."""

import asyncio
import collections


class FairSlots:
    """Lets at most ``slots`` calls run at once. The callers of waiting calls take turns; a call's key names its caller.

    The calls of one caller are served in the order of their arrival. A caller with many calls therefore delays the next
    call of another caller only by the calls that run already and by one waiting call.
    """

    def __init__(self, slots: int) -> None:
        self._free = slots
        self._waiting: collections.OrderedDict[str, collections.deque[asyncio.Future[None]]] = collections.OrderedDict()
        self.queued = 0

    @property
    def full(self) -> bool:
        return self._free == 0

    async def acquire(self, key: str) -> None:
        """Wait for a slot for a call of the caller ``key``. When the call has ended, call :meth:`release`."""
        if self._free:
            self._free -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, collections.deque()).append(turn)
        self.queued += 1
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.release()
            else:
                self._forget(key, turn)
            raise

    def release(self) -> None:
        """Pass the slot on to the next waiting call. If no call waits, the slot becomes free."""
        while self._waiting:
            key, turns = self._waiting.popitem(last=False)
            turn = turns.popleft()
            if turns:
                self._waiting[key] = turns  # the key moves to the end, so the other keys come first
            self.queued -= 1
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1

    def _forget(self, key: str, turn: asyncio.Future[None]) -> None:
        turns = self._waiting.get(key)
        if turns is not None and turn in turns:
            turns.remove(turn)
            self.queued -= 1
            if not turns:
                del self._waiting[key]
