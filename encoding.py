"""Photos and captions of many people to a cache on disk, which stage 1 reads a bucket at a time."""

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

import flux
from data import (
    Person,
    Photo,
    Picture,
    Size,
    TensorCache,
    common_shape,
    content_key,
    encode_pictures,
    encode_prompts,
)
from flux.loading import ModelFiles, fingerprint
from flux.memory import release
from survey import Roster


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

    def encode(self, people: Roster, cache: TensorCache, device: torch.device) -> None:
        """Encode what the cache has not yet; the encoders are loaded for that only, and gone afterwards."""
        missing = [False, any(content_key(text, self.encoders) not in cache for text in self.shown)]
        for photo in (photo for person in people for photo in person.photos):
            missing = [lacks or key not in cache for lacks, key in zip(missing, self.keys(photo))]
            if all(missing):
                break
        if missing[0]:
            autoencoder = flux.load_autoencoder(self.files.autoencoder, device, self.dtype)
            for person in tqdm(people, "latents of people"):
                pictures = [self.picture(photo) for photo in person.photos]
                encode_pictures(pictures, autoencoder, self.autoencoder, cache)
            del autoencoder
            release(device)
        if missing[1]:
            conditioner = flux.load_conditioner(self.files, device, self.dtype, self.args.t5_length)
            encode_prompts(self.shown, conditioner, self.encoders, cache)
            for person in tqdm(people, "captions of people"):
                captions = list(dict.fromkeys(map(self.caption, person.photos)))
                encode_prompts(captions, conditioner, self.encoders, cache)
            del conditioner
            release(device)

    def load(
        self, bucket: Sequence[Person], cache: TensorCache
    ) -> tuple[list[Photo], list[int], list[Size], list[tuple[dict, dict]]]:
        """Return a bucket's photos; of each its slot, its shape, and (latents, prompt) from the cache."""
        photos = [photo for person in bucket for photo in person.photos]
        slots = [slot for slot, person in enumerate(bucket) for _ in person.photos]
        keys = [self.keys(photo) for photo in photos]
        loaded = {key: cache.get(key) for key in {key for pair in keys for key in pair}}
        if lost := sum(entry is None for entry in loaded.values()):
            raise ValueError(f"{cache.folder} has lost {lost} entries; the same command makes them anew")
        entries = [(loaded[latents], loaded[caption]) for latents, caption in keys]
        return photos, slots, [self.shape(photo.size) for photo in photos], entries

    def prompts(self, cache: TensorCache) -> dict[str, tuple[Tensor, Tensor]]:
        """Return by text what the sample grids show: txt (1, l, d) and pooled (1, d)."""
        encoded = {text: cache.get(content_key(text, self.encoders)) for text in self.shown}
        return {text: (prompt["txt"][None], prompt["pooled"][None]) for text, prompt in encoded.items()}
