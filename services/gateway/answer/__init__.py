"""Turns an engine's chunks into the response that the client sees."""
