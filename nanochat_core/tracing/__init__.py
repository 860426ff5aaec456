"""Follows a request through the services by its id and its trace, in log lines, headers and exported spans."""
