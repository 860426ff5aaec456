"""``jobs.teach.watch`` with one difference: its lessons have the same priority as other processes.

Beside other tests that keep all cores busy, a lesson of the lowest priority would get hardly any processor time.
"""

import runpy

from jobs.teach import runners

if __name__ == "__main__":
    runners._NICENESS = 0
    runpy.run_module("jobs.teach.watch", run_name="__main__", alter_sys=True)
