"""What `--plan` chooses on cards from 8 to 80 GB, as the README's table.

python bench/plans.py            # prints it and writes it into README.md
"""

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script from anywhere

from bench.documents import write
from run.plan import GIB, SHARE, Workload, choose, kinds
from scoring.tables import markdown

README = Path(__file__).parents[1] / "README.md"
# What cards of these names report in GiB: less than it says on the box.
CARDS = {"48 GB": 47.4, "24 GB": 23.5, "20 GB": 19.6, "16 GB": 15.6, "12 GB": 11.6, "8 GB": 7.6}
JOBS = {
    "stage 1, batch 4": Workload("stage1", batch=4, identities=50),
    "stage 2": Workload("stage2"),
    "sampling": Workload("sample", identities=0),
}
AGAIN = {"none": "none", "all": "all", "attention": "all but attention"}


def rows() -> Iterator[list[str]]:
    """Yield a line for each job and card on which it fits."""
    for name, job in JOBS.items():
        total = len(kinds(job.sizes))
        for card, memory in CARDS.items():
            try:
                way, some, _ = choose(job, memory)
            except ValueError:
                yield [name, f"{card} or less", "does not fit", *[""] * 5]
                break
            again = AGAIN.get(way.checkpoint, f"{way.checkpoint} of {total}")
            again = "" if job.kind == "sample" else again
            bits = "8 bits" if way.fp8 else "exact"
            costs = f"{some.peak / GIB:.1f} GiB", f"{some.flops / 1e12:.0f}", f"{some.seconds:.1f} s"
            yield [name, card, bits, again, f"{way.stream} of {total}", *costs]


def table() -> str:
    """Lay out what is chosen."""
    head = ["FLUX.1-dev, 1024x1024", "card", "weights", "run again", "streamed", "peak", "TFLOP a step"]
    return markdown([[*head, f"a step at {SHARE:.0%} of an A6000's peak"], *rows()])


if __name__ == "__main__":
    print(table())
    write(README, {"plans": table})
