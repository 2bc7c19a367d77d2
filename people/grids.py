"""Sheets that show what a model has learned of people while it trains."""

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

import flux
from flux.sampling import generate
from flux.transformer import Prompt, Transformer
from people.crops import fit_shape
from people.folders import Photo
from people.photos import read_photo
from run.pictures import contact_sheet


def sample_grid(
    model: Transformer,
    choose: Callable[[int], None],
    photos: dict[str, Photo],
    autoencoder: Path,
    prompts: dict[str, Prompt],
    sampler: dict,
    resolution: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Image.Image:
    """Make a row for each person: a photo, then two pictures of each prompt.

    photos: by the person's name. choose: called with 0, 1, ... before the pictures of the first, the second.
    sampler: settings of `flux.sampling.denoise`.
    """
    decoder, rows = flux.load_autoencoder(autoencoder, device, dtype), []
    size = fit_shape((resolution, resolution), resolution, decoder.sizes.token_pixels)
    for slot, photo in enumerate(photos.values()):
        choose(slot)
        rows.append([read_photo(photo.path)])
        for prompt in prompts.values():
            for seed in (0, 1):
                rows[-1] += generate(model, decoder, prompt, [seed], size, **sampler)
    titles = ["photo", *(f"{text}, seed {seed}" for text in prompts for seed in (0, 1))]
    return contact_sheet(rows, [*photos], titles)
