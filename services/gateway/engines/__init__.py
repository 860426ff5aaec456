"""The connections to the engines, and the choice of one for each request."""
