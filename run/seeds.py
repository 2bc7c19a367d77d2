"""Random numbers: a stream for each purpose and step, so that a run can continue at any step."""

import hashlib

import torch


def generator_for(purpose: str, seed: int, *numbers: int) -> torch.Generator:
    """Return the generator of a purpose, such as "noise", at a place in the run, such as a step and a rank.

    A hash keeps the streams apart: with seed + step, the noise of one step would be that of the next seed's
    step before.
    """
    digest = hashlib.sha256(f"{purpose} {seed} {numbers}".encode()).digest()
    number = int.from_bytes(digest[:4], "little")  # torch's CPU generator uses 32 bits of a seed
    return torch.Generator().manual_seed(number)
