"""The error of a store or limiter that does not answer."""


class Away(Exception):
    """The store of the keys or of the counts did not answer. It may have executed the call nevertheless."""
