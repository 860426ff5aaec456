"""The program that runs inside the isolated interpreter.

A worker executes ``main.py`` by its path and cannot import the rest of the project. Therefore the modules of this
folder import only the standard library and each other, without a package name.
"""
