"""A request's way through the services: its id and its trace, in log lines, in headers and, if wanted, exported."""
