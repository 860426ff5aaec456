"""Entry point of a worker: ``python -I -S main.py RESULT_FD``."""

import os
import sys

sys.path.insert(0, os.path.dirname(__file__))
import runner

del sys.path[0]

if __name__ == "__main__":
    runner.serve(int(sys.argv[1]))
