"""Random numbers: for each purpose a stream of its own, so that a run can go on at any step."""

import hashlib

import torch


def generator_for(purpose: str, seed: int, *numbers: int) -> torch.Generator:
    """Return the generator of a purpose, such as "noise", at a place, such as a step and a rank.

    A hash keeps the streams apart: with seed + step, one step's noise would be the next seed's.
    """
    digest = hashlib.sha256(f"{purpose} {seed} {numbers}".encode()).digest()
    return torch.Generator().manual_seed(
        int.from_bytes(digest[:4], "little")
    )  # torch reads 32 bits of a seed
