"""Examines a function: tests call it, and the function and its tests run in two sandboxes that exchange only data.

:mod:`~nanochat_core.sandbox.examination.programs` makes the programs of both sandboxes, and ``exchange.py`` is the part
that both programs contain.
"""
