"""The error of a store or limiter that does not answer."""


class Away(Exception):
    """The store of the keys or the counts did not answer. The call may have had its effect nevertheless."""
