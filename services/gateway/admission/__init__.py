"""Decides which requests the gateway accepts: API keys, scopes (permissions of a key), limits and usage.

``KeyStore`` keeps keys and usage: in memory, in a file or in Redis. ``Limiter`` counts the requests, tokens and answers
of each caller: in this process or in Redis. ``Admission`` combines both for the middleware.
"""
