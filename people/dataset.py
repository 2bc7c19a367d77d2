"""Photos and captions of many people to a cache on disk, which stage 1 reads a bucket at a time."""

import argparse
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

import flux
from flux.errors import UserError
from flux.loading import ModelFiles
from flux.memory import release
from people.cache import TensorCache, content_key
from people.crops import common_shape
from people.folders import Person, Photo
from people.latents import Picture, encode_pictures, encode_prompts
from people.manifest import Roster
from people.photos import Size
from run.files import fingerprint
from run.ranks import Team


class Recipe:
    """How photos and captions become entries of the cache: in which shape, and under which keys.

    The keys hold everything that an entry depends on, so entries of other settings are never taken for ours.
    """

    def __init__(self, files: ModelFiles, args: argparse.Namespace, dtype: torch.dtype):
        self.files, self.args, self.dtype = files, args, dtype
        sizes = flux.load_autoencoder(files.autoencoder, "meta").sizes  # from the header alone
        self.multiple = 2 * sizes.reduction
        self.autoencoder = f"{fingerprint(files.autoencoder)} {sizes} {dtype}"
        sizes = flux.load_clip(files.clip, "meta").sizes, flux.load_t5(files.t5, "meta").sizes
        folders = [files.tokenizers / name for name in ("tokenizer", "tokenizer_2")]
        words = [file for folder in folders for file in sorted(folder.iterdir()) if file.is_file()]
        self.encoders = f"{fingerprint(files.clip, files.t5, *words)} {sizes} {args.t5_length} {dtype}"
        self.default = f"a photo of a {args.class_word}"
        self.shown = [self.default, f"{self.default} smiling at the beach"]  # in the sample grids

    def shape(self, size: Size) -> Size:
        return common_shape(size, self.args.resolution, self.multiple)

    def picture(self, photo: Photo) -> Picture:
        return Picture(photo.path, self.shape(photo.size), digest=photo.digest)

    def caption(self, photo: Photo) -> str:
        return photo.caption or self.default

    def keys(self, photo: Photo) -> tuple[str, str]:
        """Return the keys of its latents and of its caption."""
        return self.picture(photo).key(self.autoencoder), content_key(self.caption(photo), self.encoders)

    def encode(self, people: Roster, cache: TensorCache, device: torch.device, team: Team) -> None:
        """Encode what the cache has not yet; the encoders are loaded for that only, and gone afterwards.

        The team shares the work by key, so that no entry is made twice.
        """
        lacks = lambda key: team.makes(key) and key not in cache
        of_text = lambda text: content_key(text, self.encoders)
        missing = [False, any(lacks(of_text(text)) for text in self.shown)]
        for photo in (photo for person in people for photo in person.photos):
            missing = [known or lacks(key) for known, key in zip(missing, self.keys(photo))]
            if all(missing):
                break
        quiet = not team.leads
        if missing[0]:
            autoencoder = flux.load_autoencoder(self.files.autoencoder, device, self.dtype)
            for person in tqdm(people, "latents of people", disable=quiet):
                pictures = [self.picture(photo) for photo in person.photos]
                ours = [picture for picture in pictures if team.makes(picture.key(self.autoencoder))]
                encode_pictures(ours, autoencoder, self.autoencoder, cache)
            del autoencoder
            release(device)
        if missing[1]:
            length, vram = self.args.t5_length, self.args.vram
            conditioner = flux.load_conditioner(self.files, device, self.dtype, length, vram)
            encode = lambda texts: encode_prompts(
                [text for text in texts if team.makes(of_text(text))], conditioner, self.encoders, cache
            )
            encode(self.shown)
            for person in tqdm(people, "captions of people", disable=quiet):
                encode(dict.fromkeys(map(self.caption, person.photos)))
            del conditioner
            release(device)

    def load(
        self, bucket: Sequence[Person], cache: TensorCache
    ) -> tuple[list[Photo], list[int], list[Size], list[tuple[dict, dict]]]:
        """Return a bucket's photos; of each its slot, its shape, and (latents, prompt) from the cache."""
        photos = [photo for person in bucket for photo in person.photos]
        slots = [slot for slot, person in enumerate(bucket) for _ in person.photos]
        keys = [self.keys(photo) for photo in photos]
        loaded = fetch(cache, {key for pair in keys for key in pair})
        entries = [(loaded[latents], loaded[caption]) for latents, caption in keys]
        return photos, slots, [self.shape(photo.size) for photo in photos], entries

    def prompts(self, cache: TensorCache) -> dict[str, tuple[Tensor, Tensor]]:
        """Return by text what the sample grids show: txt (1, l, d) and pooled (1, d)."""
        keys = {text: content_key(text, self.encoders) for text in self.shown}
        loaded = fetch(cache, keys.values())
        return {x: tuple(loaded[key][part][None] for part in ("txt", "pooled")) for x, key in keys.items()}


def fetch(cache: TensorCache, keys: Iterable[str]) -> dict[str, dict[str, Tensor]]:
    """Return entries of the cache by key; ValueError when some are lost or damaged."""
    loaded = {key: cache.get(key) for key in keys}
    if lost := sum(entry is None for entry in loaded.values()):
        raise UserError(f"{cache.folder} has lost {lost} entries; the same command makes them anew")
    return loaded
