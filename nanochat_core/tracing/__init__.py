"""Traces a request through all services.

Log lines, headers and exported spans carry the request's id and the id of its trace.
"""
