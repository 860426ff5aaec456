"""ASGI middleware around every HTTP request. API keys and rate limits will belong here; they do not exist yet."""
