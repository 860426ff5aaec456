"""The error of a store or limiter that does not answer."""


class Away(Exception):
    """The store of the API keys, or the limiter's store, did not answer or could not execute a call.

    A store that did not answer may nevertheless have executed the call.
    """
