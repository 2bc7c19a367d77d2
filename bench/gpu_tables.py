"""What bench/gpu.py found, as tables in docs/gpu.md.

python bench/gpu_tables.py            # writes the tables of docs/gpu/*.json
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script from anywhere

from bench.documents import write
from scoring.tables import markdown

DOCUMENT = Path(__file__).parents[1] / "docs" / "gpu.md"
RESULTS = DOCUMENT.with_suffix("")  # the folder of the JSON files
NONE = "No GPU has been used so far: there is no result yet."
# What is measured; the case, or two for the ratio of their seconds; the aim.
AIMS = [
    ("stage 2, batch 1, nothing recomputed", ["stage2 1024 none"], 0.46),
    ("the same, compiled", ["compiled stage2 1024"], 0.35),
    ("stage 1, batch 4", ["stage1 1024"], 1.6),
    ("stage 2 relative to diffusers + peft, rank 1, checkpointed", ["stage2 1024 none", "peft 1024"], 0.75),
    ("the same, all blocks recomputed as theirs are", ["stage2 1024 all", "peft 1024"], None),
    ("a whole personalization of 375 steps", ["personalize"], 150),
    ("stage 2 within 24 GB relative to resident", ["budget 24 GB", "stage2 1024 attention"], 1.15),
    ("sampling, 30 steps", ["sampling 1024"], None),
    ("the same relative to diffusers", ["sampling 1024", "diffusers 1024"], 1.0),
]
COLUMNS = ["a step", "s", "TFLOP/s", "GiB allocated", "planned", "off", "GiB in all", "budget", "up off"]


def table(result: dict) -> str:
    """Return what one run found, all of it on one card, as Markdown."""
    cases = result["cases"]
    about = ", ".join(f"{name} {value}" for name, value in result["about"].items() if name != "card")
    parts = (lines(cases) for lines in (aims, steps, figures))
    parts = (markdown(part) for part in parts if part[1:])
    return "\n\n".join([f"### {result['about']['card']}", about, *parts])


def aims(cases: dict[str, dict]) -> list[list[str]]:
    """Return the lines of a table: whether the numbers are right, and the times that there is an aim for.

    A case that is not in the file has no line: `--only` left it out, or the run ended before it.
    """
    lines = [["FLUX.1-dev, 1024x1024", "measured", "aim on an H100"]]
    for name in ("parity plans", "parity encoders", "compiled parity", "scripts"):
        if name in cases:
            lines.append([name, missing(cases, name) or "; ".join(cases[name]["wrong"]) or "right", "right"])
    for title, names, aim in AIMS:
        if not cases.keys() >= {*names}:
            continue
        unit = "" if names[1:] else " s"
        value = "; ".join(filter(None, (missing(cases, name) for name in names)))
        if not value:
            first, *others = (cases[name]["seconds"] for name in names)
            value = f"{first / others[0]:.2f}" if others else f"{first:.3g} s"
            value += ", in part estimated" * ("estimated" in cases[names[0]])
        lines.append([title, value, f"at most {aim}{unit}" if aim else ""])
    return lines


def steps(cases: dict[str, dict]) -> list[list[str]]:
    """Return the lines of a table: what each step took, beside what was planned."""
    lines = [COLUMNS]
    for name, found in cases.items():
        if "tflop_s" in found:
            allocated, planned = found.get("allocated_gib"), found["planned_gib"]
            off = f"{allocated / planned - 1:+.1%}" if allocated else None
            row = [found["seconds"], found["tflop_s"], allocated, planned, off]
            row += [found.get(key) for key in ("used_gib", "budget_gib", "up_off")]
            lines.append([name, *("" if value is None else str(value) for value in row)])
    return lines


def figures(cases: dict[str, dict]) -> list[list[str]]:
    """Return the lines of a table: all other figures."""
    lines = [["case", "what", "figure"]]
    for name, found in cases.items():
        if "tflop_s" not in found and "wrong" not in found and not missing(cases, name):
            items = ((key, value) for key, value in found.items() if not isinstance(value, dict))
            lines += [[name, key, str(value)] for key, value in items if key != "case_s"]
    return lines


def missing(cases: dict[str, dict], name: str) -> str:
    """Return why a case has no result; empty if it has one."""
    found = cases[name]
    if "skipped" in found:  # for want of time
        return f"{name}: not run"
    return f"{name}: {found['failed'][:100]}" if "failed" in found else ""


def tables(files: Iterable[Path]) -> str:
    """Return the tables of some JSON files one after the other; runs and cards are not compared."""
    results = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(files)]
    return "\n\n".join(map(table, results)) or NONE


if __name__ == "__main__":
    write(DOCUMENT, {"gpu": lambda: tables(RESULTS.glob("*.json"))})
