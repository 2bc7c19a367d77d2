"""The memory plan that is chosen on cards from 8 to 48 GB, as a table.

python bench/plans.py            # prints it and writes it into docs/memory.md
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script from anywhere

from bench.documents import write
from flux.errors import UserError
from run.costs import FLUX_DEV, GIB, KLEIN_4B, Workload, kinds
from run.plan import choose
from scoring.tables import markdown

DOCUMENT = Path(__file__).parents[1] / "docs" / "memory.md"
# The GiB that a card reports: less than its name says.
CARDS = {"48 GB": 47.4, "24 GB": 23.5, "20 GB": 19.6, "16 GB": 15.6, "12 GB": 11.6, "8 GB": 7.6}
MODELS = {"FLUX.1-dev": FLUX_DEV, "klein-4b": KLEIN_4B}
WORKLOADS = {
    "stage 1, batch 4": Workload("stage1", batch=4, identities=50),
    "stage 2": Workload("stage2"),
    "sampling": Workload("sample", identities=0),
}
RECOMPUTED = {"none": "none", "all": "all", "attention": "all but attention"}


def rows() -> Iterator[list[str]]:
    """Yield a row for each workload and each card on which it fits."""
    for (model, sizes), (what, work) in product(MODELS.items(), WORKLOADS.items()):
        name, work = f"{model}, {what}", replace(work, sizes=sizes)
        total = len(kinds(work.sizes))
        for card, memory in CARDS.items():
            try:
                plan, cost = choose(work, memory)
            except UserError:
                yield [name, f"{card} or less", "does not fit", *[""] * 5]
                break
            recomputed = RECOMPUTED.get(plan.checkpoint, f"{plan.checkpoint} of {total}")
            recomputed = "" if work.kind == "sample" else recomputed
            weights = "8 bits" if plan.fp8 else "exact"
            costs = f"{cost.peak / GIB:.1f} GiB", f"{cost.flops / 1e12:.0f}", f"{cost.seconds:.1f}"
            yield [name, card, weights, recomputed, f"{plan.stream} of {total}", *costs]


def table() -> str:
    """Return the table in Markdown."""
    head = ["1024x1024 pixels", "card", "weights", "blocks recomputed", "blocks streamed", "peak memory"]
    return markdown([[*head, "TFLOP per step", "estimated seconds per step on an A6000"], *rows()])


if __name__ == "__main__":
    print(table())
    write(DOCUMENT, {"plans": table})
