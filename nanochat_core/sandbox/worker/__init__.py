"""What runs inside the isolated interpreter.

``main.py`` is executed by path with nothing else of the project importable, so these modules import each other by
bare name there, and only the standard library otherwise.
"""
