"""The scores that are there, and which of them are compared with each other."""

from collections.abc import Sequence
from pathlib import Path

from studies.claim.scores import LORA, META, Sample, read_scores

RESAMPLES = 1000
PLACEMENTS = {"all": "all layers", "no-modulation": "no modulation"}
BEST = "each at its best placement"
CONTROLS = ("random", "even-layers", "flat")
ASIDE = ("looked", "attempts", "large", "validation")  # parts with people of their own


class Study:
    """The scores that are there: all of the test people together, the others by their part."""

    def __init__(self, folder: Path, missing: Sequence[str] = (), resamples: int = RESAMPLES):
        self.folder, self.missing, self.resamples = folder, missing, resamples
        parts = {file.stem: read_scores(file) for file in sorted(folder.glob("*.csv"))}
        self.aside = {name: parts.pop(name) for name in ASIDE if name in parts}
        self.cells = {key: cell for cells in parts.values() for key, cell in cells.items()}

    def replicates(self, placements: Sequence[str]) -> list[tuple[str, str]]:
        """Return the (base, prior) that have Meta-LoRA and LoRA at all of the placements."""
        there = {key[:2] for key in self.cells if key[1].isdecimal()}
        needed = [(targets, method) for targets in placements for method in (META, LORA)]
        has = {(key[0], key[1] if key[3] == META else None, key[2], key[3]) for key in self.cells}
        whole = [
            (base, prior)
            for base, prior in there
            if all((base, prior if method == META else None, t, method) in has for t, method in needed)
        ]
        return sorted(whole, key=lambda one: (one[0] != "tiny", one))  # the shipped base first

    def placements(self) -> dict[str, list[str]]:
        """Return the comparisons by name: the same placement for both methods, and each at its best one."""
        there = {name: [targets] for targets, name in PLACEMENTS.items() if self.replicates([targets])}
        if len(there) > 1 and self.replicates([*PLACEMENTS]):
            there[BEST] = [*PLACEMENTS]
        return there

    def pooled(self, placements: Sequence[str]) -> Sample:
        """Return all replicates that have the placements, together."""
        return Sample(self.cells, self.replicates(placements), self.resamples)

    def first(self) -> Sample:
        """Return the shipped base and prior alone, with which the side questions were asked."""
        return Sample(self.cells, [("tiny", "0")], self.resamples)
