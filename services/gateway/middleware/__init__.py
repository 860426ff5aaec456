"""Layers around every HTTP request. API keys and rate limits would be two more files here."""
