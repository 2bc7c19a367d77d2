"""A people data set as stage 1 reads it: encoded once to a cache on disk, loaded a bucket at a time."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import flux
from flux.errors import UserError
from flux.loading import ModelFiles
from flux.memory import release
from people.cache import TensorCache, content_key
from people.crops import to_tensor
from people.folders import Photo
from people.latents import encode_picture, encode_prompt, make_batch
from people.manifest import Manifest
from people.photos import Size, read_photo
from run.files import fingerprint
from run.ranks import Ranks
from run.settings import Training

VERSION = 1  # raise it whenever `to_tensor` changes a pixel: latents made before are then encoded anew


@dataclass(frozen=True)
class Batch:
    """What an update learns from."""

    inputs: dict[str, Tensor]  # the arguments of `flow_loss`
    slots: Tensor  # (b,) the identity of each sample in its bucket
    photos: list[str]  # their files

    @property
    def t(self) -> list[float]:
        return self.inputs["t"].tolist()


@dataclass(frozen=True)
class BucketData:
    """The photos of a bucket, encoded: a list entry each."""

    paths: list[Path]
    slots: list[int]
    shapes: list[Size]
    entries: list[tuple[dict[str, Tensor], dict[str, Tensor]]]  # posterior and prompt


class LatentDataset:
    """How photos and captions become entries of the cache: in which shape, and under which keys.

    The keys hold everything that an entry depends on, so entries of other settings are never taken for ours.
    """

    def __init__(
        self,
        people: Manifest,
        cache: TensorCache,
        files: ModelFiles,
        shape: Callable[[Size], Size],
        class_word: str,
        t5_length: int | None,
        device: torch.device,
        dtype: torch.dtype,
    ):
        """shape: in which a photo of a size is trained; t5_length: None for what the tokenizer says."""
        self.people, self.cache, self.files, self.shape = people, cache, files, shape
        self.t5_length, self.device, self.dtype = t5_length, device, dtype
        sizes = flux.load_autoencoder(files.autoencoder, "meta").sizes  # from the header alone
        self.autoencoder = f"{fingerprint(files.autoencoder)} {sizes} {dtype}"
        sizes = flux.load_clip(files.clip, "meta").sizes, flux.load_t5(files.t5, "meta").sizes
        folders = [files.tokenizers / name for name in ("tokenizer", "tokenizer_2")]
        words = [file for folder in folders for file in sorted(folder.iterdir()) if file.is_file()]
        self.encoders = f"{fingerprint(files.clip, files.t5, *words)} {sizes} {t5_length} {dtype}"
        self.default_caption = f"a photo of a {class_word}"
        # Of the sample grids.
        self.sample_prompts = [self.default_caption, f"{self.default_caption} smiling at the beach"]

    def caption(self, photo: Photo) -> str:
        return photo.caption or self.default_caption

    def prompt_key(self, text: str) -> str:
        return content_key(text, self.encoders)

    def keys(self, photo: Photo) -> tuple[str, str]:
        """Return the keys of its latents and of its caption."""
        latents = content_key(VERSION, photo.digest, self.shape(photo.size), self.autoencoder)
        return latents, self.prompt_key(self.caption(photo))

    def encode(self, ranks: Ranks, vram: float | None = None) -> None:
        """Encode what the cache has not yet; the encoders are loaded for that only, and gone afterwards.

        The ranks share the work by key, so that no entry is made twice.
        """
        lacks = lambda key: ranks.makes(key) and key not in self.cache
        missing = [False, any(lacks(self.prompt_key(text)) for text in self.sample_prompts)]
        for photo in (photo for person in self.people for photo in person.photos):
            missing = [known or lacks(key) for known, key in zip(missing, self.keys(photo))]
            if all(missing):
                break
        if missing[0]:
            autoencoder = flux.load_autoencoder(self.files.autoencoder, self.device, self.dtype)
            for person in tqdm(self.people, "latents of people", disable=not ranks.leads):
                for photo in person.photos:
                    if lacks(key := self.keys(photo)[0]):
                        picture = to_tensor(read_photo(photo.path), self.shape(photo.size))
                        self.cache.put(key, encode_picture(picture, autoencoder))
            del autoencoder
            release(self.device)
        if missing[1]:
            conditioner = flux.load_conditioner(self.files, self.device, self.dtype, self.t5_length, vram)
            captions = (self.caption(photo) for person in self.people for photo in person.photos)
            for text in chain(self.sample_prompts, tqdm(captions, "captions", disable=not ranks.leads)):
                if lacks(key := self.prompt_key(text)):
                    self.cache.put(key, encode_prompt(text, conditioner))
            del conditioner
            release(self.device)
        ranks.wait()  # each has made a part

    def shapes(self, pids: Sequence[int]) -> list[Size]:
        """Return in which shapes the photos of some people are trained."""
        return [self.shape(photo.size) for pid in pids for photo in self.people[pid].photos]

    def load(self, pids: Sequence[int]) -> BucketData:
        """Read the photos of a bucket's people, whose slots are their places in `pids`."""
        photos = [(slot, photo) for slot, pid in enumerate(pids) for photo in self.people[pid].photos]
        keys = [self.keys(photo) for _, photo in photos]
        loaded = self._fetch({key for pair in keys for key in pair})
        return BucketData(
            paths=[photo.path for _, photo in photos],
            slots=[slot for slot, _ in photos],
            shapes=[self.shape(photo.size) for _, photo in photos],
            entries=[(loaded[latents], loaded[caption]) for latents, caption in keys],
        )

    def batch(
        self, data: BucketData, chosen: Sequence[int], generator: torch.Generator, training: Training
    ) -> Batch:
        """Stack the chosen photos of a bucket, of one shape, and draw their noise and times."""
        entries = [data.entries[k] for k in chosen]
        inputs = make_batch(entries, generator, training, self.device, self.dtype)
        slots = torch.tensor([data.slots[k] for k in chosen], device=self.device)
        return Batch(inputs, slots, [str(data.paths[k]) for k in chosen])

    def load_sample_prompts(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return by text what the sample grids show: txt (1, l, d) and pooled (1, d)."""
        keys = {text: self.prompt_key(text) for text in self.sample_prompts}
        loaded = self._fetch(keys.values())
        return {x: tuple(loaded[key][part][None] for part in ("txt", "pooled")) for x, key in keys.items()}

    def _fetch(self, keys: Iterable[str]) -> dict[str, dict[str, Tensor]]:
        loaded = {key: self.cache.get(key) for key in keys}
        if lost := sum(entry is None for entry in loaded.values()):
            raise UserError(f"{self.cache.folder} has lost {lost} entries; the same command makes them anew")
        return loaded
