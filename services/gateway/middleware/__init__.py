"""ASGI middleware around every HTTP request."""
