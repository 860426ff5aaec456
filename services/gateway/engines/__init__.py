"""Connects to the engines, and chooses one engine for each request."""
