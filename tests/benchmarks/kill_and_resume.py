"""Kill and restart a training run at random moments, and compare its result with an uninterrupted run.

Run the program from the project's root: ``python -m tests.benchmarks.kill_and_resume --kills 20 --steps 200``. It tests
pretraining and fine-tuning of a tiny model. The digest of the weights and every loss must be equal to the bit.
"""

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.support.tiny_training import PRETRAIN, SFT, Jobs, Result, fill


def killed_run(jobs: Jobs, module: str, flags: dict[str, object], kills: int, rng: random.Random) -> list[str]:
    """Interrupt a run up to ``kills`` times with SIGKILL or SIGTERM, then let it finish.

    Returns:
        For each interruption: the signal, the exit code, and the step of the newest checkpoint.
    """
    found = []
    stage = "sft" if module.endswith("sft") else "base"
    for number in range(kills):
        job = jobs.start(module, flags)
        # The signal arrives at some moment between the job's first event and several checkpoints later.
        before = len(job.events)
        job.wait_until(lambda job=job, before=before: len(job.events) > before)  # type: ignore[misc]
        time.sleep(rng.uniform(0, 1.2))
        sent = signal.SIGTERM if number % 5 == 4 else signal.SIGKILL
        job.signal(sent)
        code = job.wait()
        found.append(f"{sent.name} -> {code} at step {max(jobs.steps(stage), default=0)}")
        if code == 0:
            break
    jobs.run(module, flags)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    equal = True
    with tempfile.TemporaryDirectory() as folder:
        homes = {name: Path(folder) / name for name in ("whole", "killed")}
        fill(homes["whole"])
        (Path(folder) / "logs").mkdir()
        jobs = {name: Jobs(home, Path(folder) / "logs") for name, home in homes.items()}
        shutil.copytree(homes["whole"], homes["killed"])
        for stage, module, given in (("base", "jobs.train.pretrain", PRETRAIN), ("sft", "jobs.train.sft", SFT)):
            flags = given | {"steps": options.steps, "save-every": 5}
            jobs["whole"].run(module, flags)
            found = killed_run(jobs["killed"], module, flags, options.kills, rng)
            results: list[Result] = [jobs[name].result(stage, options.steps) for name in ("whole", "killed")]
            same = results[0] == results[1]
            equal &= same
            print(f"{stage}: {len(found)} interruptions: {'; '.join(found)}")
            print(f"{stage}: weights and {len(results[1].history)} losses {'equal to the bit' if same else 'DIFFER'}")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
