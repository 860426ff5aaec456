"""Traces a request through all services: log lines, headers and exported spans carry its id and its trace's id."""
