"""Which block of which document is written by which function: no number is typed by hand.

What stands between <!-- name --> and <!-- end --> in the documents is written by the function of BLOCKS with
that name. A part of the study that has no scores yet is left out.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench import documents
from studies.claim.sentences import claim, summary
from studies.claim.side_questions import aside, attempts
from studies.claim.study import Study
from studies.claim.tables import equal, flux_cost, looked, primary, rates

ROOT = Path(__file__).parents[2]
DOCUMENTS = (ROOT / "studies" / "claim" / "README.md", ROOT / "docs" / "findings.md")
BLOCKS: dict[str, Callable[[Study], str]] = {
    "summary": summary,
    "looked": looked,
    "primary": primary,
    "rates": rates,
    "equal": equal,
    "aside": aside,
    "attempts": attempts,
    "cost": flux_cost,
    "claim": claim,
}


def fill(text: str, study: Study) -> str:
    """Write the blocks of BLOCKS in a document anew."""
    return documents.fill(text, {name: partial(block, study) for name, block in BLOCKS.items()})


def write_documents(study: Study) -> None:
    """Fill the documents."""
    for path in DOCUMENTS:
        documents.write(path, {name: partial(block, study) for name, block in BLOCKS.items()})
