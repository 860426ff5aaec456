"""Compare bits per byte with karpathy/nanochat (the peer) after equally many steps and after equal time.

Run the program from the project's root:
``python -m tests.benchmarks.compare_quality_peer --peer PATH --data FOLDER --steps 300``.

Both sides train on the same rows with the same learning rates and schedule, and both are evaluated on the same held-out
rows. With ``--init shared`` both sides start from the peer's initial weights. With ``--init own`` each side draws its
own initial weights with the same seed. The time excludes the first steps, because both sides compile in these steps.
"""

import tempfile
from pathlib import Path

import numpy as np

from nanochat_core.errors import run_main
from tests.benchmarks.peer import WARMUP_STEPS, Comparison, Result, arguments


def elapsed(result: Result) -> list[float]:
    """Return the training time before each evaluation in seconds. The time excludes the warm-up steps."""
    return [sum(result.seconds[WARMUP_STEPS:step]) for step, _ in result.evaluations]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--evaluate-every", type=int, default=50)
    parser.add_argument("--validation-rows", type=int, default=512)
    parser.add_argument("--init", choices=("shared", "own"), default="shared")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        comparison = Comparison.prepare(
            options, Path(folder), batches=options.steps, validation_rows=options.validation_rows
        )
        initial = f"{folder}/initial"
        peer = comparison.train("peer", options.steps, evaluate_every=options.evaluate_every, initial=initial)
        ours = comparison.train(
            "ours",
            options.steps,
            evaluate_every=options.evaluate_every,
            initial=initial if options.init == "shared" else None,
        )
    peer_seconds, our_seconds = elapsed(peer), elapsed(ours)
    peer_bpb = [bpb for _, bpb in peer.evaluations]
    print(f"{options.dtype}, initial weights {options.init}, seed {options.seed}")
    print("| step | peer bpb | our bpb | difference | peer s | our s | peer bpb at our time |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for (step, theirs), (_, own), their_time, our_time in zip(
        peer.evaluations, ours.evaluations, peer_seconds, our_seconds, strict=True
    ):
        # The peer's curve is unknown before its first evaluation.
        then = f"{np.interp(our_time, peer_seconds, peer_bpb):.4f}" if our_time >= peer_seconds[0] else "-"
        print(
            f"| {step} | {theirs:.4f} | {own:.4f} | {own / theirs - 1:+.2%} | {their_time:.1f} | {our_time:.1f} "
            f"| {then} |"
        )


if __name__ == "__main__":
    run_main(main, "compare_quality_peer.py")
