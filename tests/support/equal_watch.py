"""``jobs.teach.watch`` with one difference: its lessons have the same priority as other processes.

Beside other tests that keep all cores busy, a lesson that gives way to them would get hardly any processor time.
"""

import runpy

from jobs.teach import runners

if __name__ == "__main__":
    runners.give_way = lambda process: None
    runpy.run_module("jobs.teach.watch", run_name="__main__", alter_sys=True)
