"""The program that runs inside the isolated interpreter.

A worker executes ``main.py`` by its path and cannot import the rest of the project. Therefore these modules import only
the standard library and each other, without a package name.
"""
