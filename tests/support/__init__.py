"""Helpers that several test modules share: small models, scripted services, processes and data."""
