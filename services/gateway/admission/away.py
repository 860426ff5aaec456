"""The error of a store or limiter that does not answer."""


class Away(Exception):
    """The store of the API keys, or the limiter's store, did not answer or could not execute a call.

    If it did not answer, it may have executed the call nevertheless.
    """
