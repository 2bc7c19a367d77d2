"""People per hour on the toy model, one after the other and 16 side by side.

    OMP_NUM_THREADS=2 python bench/family.py     # some minutes on two cores

Synthetic people, a photo each, as `python -m family` learns them by default: crops, 375 steps of Meta-LoRA. A
round trains everybody for a few steps; rounds of both kinds take turns, since only the ratio counts. Loading
and encoding, which is as much for both, is left out.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script from anywhere

from family.__main__ import Family, parse_arguments
from personalize import STEPS
from scoring.tables import markdown
from tiny.people import write_people


def seconds(family: Family) -> float:
    """Return the seconds in which a family is learned, from its encoded photos to its files."""
    began = time.perf_counter()
    for group in family.groups():
        family.learn(group)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--people", type=int, default=16)
    parser.add_argument("--steps", type=int, default=25, help="of a round")
    parser.add_argument("--rounds", type=int, default=5, help="times that both are timed, after a first one")
    args = parser.parse_args()
    counts, taken = (1, args.people), {1: [], args.people: []}
    with TemporaryDirectory() as folder:
        write_people(Path(folder, "ids"), people=args.people, photos=1, seed=0)
        photos = map(str, sorted(Path(folder, "ids").glob("*/000.png")))
        words = [*photos, "--model", "tiny", "--steps", str(args.steps), "--samples", "0"]
        for number in range(args.rounds + 1):
            for count in counts:
                out = Path(folder, f"{number}_{count}")
                out.mkdir()
                options = ["--at-once", str(count), "--out", str(out)]
                family = Family(parse_arguments([*words, *options]))
                family.predict()
                family.encode()
                family.load()
                if number:
                    taken[count].append(seconds(family))
                else:
                    seconds(family)
    lines = [["side by side", "people per hour"]]
    for count, rounds in taken.items():
        hours = median(rounds) * STEPS["meta-lora"] / args.steps / 3600
        lines.append([f"{count}", f"{args.people / hours:.0f}"])
    ratios = [one / many for one, many in zip(*taken.values())]
    print(f"python {' '.join(sys.argv)}\n\n{markdown(lines)}\n")
    print(
        f"{median(ratios):.2f} times as many ({min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} rounds)"
    )


if __name__ == "__main__":
    main()
