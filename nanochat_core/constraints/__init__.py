"""Constraints on a completion's text, and their compilation at a bounded cost. This package does not load torch."""
