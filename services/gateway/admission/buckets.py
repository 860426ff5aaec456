"""The arithmetic of the limits per minute: a bucket that leaks at a constant rate.

A limit of L per minute is a bucket that holds L and leaks L per minute. A request with cost c may pass if the bucket
has room for c. So at most L can pass at the same time, and at most L + L*t/60 within any t seconds. (This is the
generic cell rate algorithm of ITU-T I.371, with costs.)

All numbers are whole, so that Redis and Python compute the same results and no fraction is lost. Time is in
microseconds. One request or token is 60,000,000 units, because a bucket with the limit L then leaks exactly L units in
a microsecond. Redis computes in Lua, whose whole numbers are exact up to 2^53. That is 15 times the size of the largest
bucket, which has the limit ``MAX_LIMIT``.
"""

import dataclasses

# Units of one request or one token. This is the number of microseconds in a minute, as the module's docstring explains.
UNITS = 60_000_000


@dataclasses.dataclass(frozen=True)
class Bucket:
    """The amount that a caller has spent and that the bucket has not leaked yet.

    Attributes:
        spent: this amount in units (:data:`UNITS` for each request or token). It exceeds the size of the bucket while
            the caller is in debt.
        at: time of the last change in microseconds.
    """

    spent: int = 0
    at: int = 0

    def leaked(self, limit: int, now: int) -> "Bucket":
        """Returns the bucket at the time ``now`` in microseconds. If ``limit`` is 0 (no limit), the bucket is empty.

        If the clock went back, the time counts as unchanged.
        """
        spent = max(0, self.spent - limit * max(0, now - self.at)) if limit else 0
        return Bucket(spent, max(self.at, now))

    def plus(self, limit: int, cost: int) -> "Bucket":
        """Returns the bucket after ``cost`` further requests or tokens. A negative ``cost`` gives unused units back."""
        return Bucket(max(0, self.spent + cost * UNITS), self.at) if limit else self

    def has_room(self, limit: int, cost: int) -> bool:
        """Whether ``cost`` requests or tokens may pass."""
        return not limit or self.spent + cost * UNITS <= limit * UNITS

    def remaining(self, limit: int) -> int:
        """Returns how many requests or tokens may pass now; 0 if ``limit`` is 0 (no limit)."""
        return max(0, limit * UNITS - self.spent) // UNITS

    def empty_in(self, limit: int) -> int:
        """Returns the microseconds until the bucket is empty; 0 if ``limit`` is 0 (no limit)."""
        return -(-self.spent // limit) if limit else 0

    def room_in(self, limit: int, cost: int) -> int:
        """Returns the microseconds until ``cost`` requests or tokens may pass.

        ``limit`` must not be 0, and ``cost`` must not exceed ``limit``.
        """
        return max(0, -(-(self.spent + cost * UNITS - limit * UNITS) // limit))
