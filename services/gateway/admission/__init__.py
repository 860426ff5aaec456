"""Who may enter, and how much each caller may do: API keys, scopes, limits and usage.

``KeyStore`` keeps keys and usage: in memory, in a file or in Redis. ``Limiter`` counts what callers do: in this process
or in Redis. ``Admission`` combines both for the middleware.
"""
