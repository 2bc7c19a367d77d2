"""What `--plan` chooses on cards from 8 to 80 GB, as the README's table.

python bench/plans.py            # prints it and writes it into README.md
"""

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script from anywhere

from bench.documents import write
from flux.plan import GIB, SHARE, Job, choose, kinds
from report import markdown

README = Path(__file__).parents[1] / "README.md"
CARDS = (48, 24, 16, 12, 8)  # GiB
JOBS = {
    "stage 1, batch 4": Job("stage1", batch=4, identities=50),
    "stage 2": Job("stage2"),
    "sampling": Job("sample"),
}
AGAIN = {"none": "none", "all": "all", "attention": "all but attention"}


def rows() -> Iterator[list[str]]:
    """Yield a line for each job and card on which it fits."""
    for name, job in JOBS.items():
        total = len(kinds(job.sizes))
        for card in CARDS:
            try:
                way, some, line = choose(job, card)
            except ValueError:
                yield [name, "less", "does not fit", *[""] * 5]
                break
            again = AGAIN.get(way.checkpoint, f"{way.checkpoint} of {total}")
            again = "" if job.kind == "sample" else again
            bits = "8 bits" if way.fp8 else "exact"
            costs = f"{some.peak / GIB:.1f} GiB", f"{some.flops / 1e12:.0f}", f"{some.seconds:.1f} s"
            yield [name, f"{card} GB", bits, again, f"{way.stream} of {total}", *costs]


def table() -> str:
    """Lay out what is chosen."""
    head = ["FLUX.1-dev, 1024x1024", "card", "weights", "run again", "streamed", "peak", "TFLOP a step"]
    return markdown([[*head, f"a step at {SHARE:.0%} of an A6000's peak"], *rows()])


if __name__ == "__main__":
    print(table())
    write(README, {"plans": table})
