"""Entry point of a fork server: ``python -I -S main.py CONTROL_FD``."""

import os
import sys

sys.path.insert(0, os.path.dirname(__file__))
import server

del sys.path[0]

if __name__ == "__main__":
    server.serve(int(sys.argv[1]))
