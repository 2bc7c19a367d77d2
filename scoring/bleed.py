"""Bleeding: how much a person's LoRA pulls the faces of other people towards that person's. Ours."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from scoring.evaluators import Evaluators, Faces

PEOPLE = {"bleed": 2, "class-bleed": 1}  # whom a picture should show: the person and another; only another


def bleed(others: Tensor, base_others: Tensor, e_ref: Tensor) -> Tensor:
    """Compare other people's faces (n, d) with the learned person's (d,), and subtract the same of the base.

    base_others: (m, d), the other people in the base model's picture for the same prompt and seed. 0: as
    without the LoRA; near the person's own similarity: they are copies.
    """
    alike, by_chance = (F.cosine_similarity(faces, e_ref, dim=-1).mean() for faces in (others, base_others))
    return alike - by_chance


def leave_out(faces: Faces, base: Faces, e_ref: Tensor) -> tuple[Tensor, Tensor]:
    """Return the faces (n, d) of both pictures without that of the learned person.

    It is the face most similar to the reference; in the base model's picture the one at its place. The base's
    most similar one would be a biased choice: what is left would be less similar than two strangers are.
    """
    own = F.cosine_similarity(faces.embedded, e_ref, dim=-1).argmax()
    there = (base.middles - faces.middles[own]).norm(dim=-1).argmin()
    return without(faces.embedded, own), without(base.embedded, there)


def without(rows: Tensor, k: Tensor) -> Tensor:
    return rows[torch.arange(len(rows)) != k]


def score_bleed(
    rows: Sequence[dict], references: dict[str, Tensor], evaluators: Evaluators, metric: str
) -> None:
    """Add bleed or class-bleed to the rows, and how many faces both pictures have.

    references: the embedding (d,) of each person's reference photo. It is None where nobody else's face is
    found in both pictures; with more faces than expected all others are averaged. `remark_bleed` tells.
    """
    seen = evaluators.embed_all_faces([row["path"] for row in rows])
    seen_by_base = evaluators.embed_all_faces([row["base"] for row in rows])
    for row, faces, base in zip(rows, seen, seen_by_base, strict=True):
        e_ref = references[row["person"]]
        row |= {
            "of": metric,
            "all faces": len(faces.embedded),
            "base faces": len(base.embedded),
            metric: None,
        }
        least = PEOPLE[metric]
        if min(row["all faces"], row["base faces"]) >= least:
            others = (faces.embedded, base.embedded) if least == 1 else leave_out(faces, base, e_ref)
            row[metric] = bleed(*others, e_ref).item()


def remark_bleed(rows: Sequence[dict]) -> dict[str, list[str]]:
    """List the pictures, of a system and of the base, whose number of faces is not as expected."""
    remarks = {}
    for row in rows:
        least = PEOPLE[row["of"]]
        for path, count in ((row["path"], row["all faces"]), (row["base"], row["base faces"])):
            if count != least:
                effect = "left out" if count < least else "all others are averaged"
                title = f"{row['of']}: {'fewer' if count < least else 'more'} faces than {least}, {effect}"
                remarks.setdefault(title, {})[str(path)] = None
    return {title: [*paths] for title, paths in remarks.items()}
