"""Finds the engines, chooses one for each request, and moves running answers to another engine if necessary."""
