"""The people data set of stage 1: encoded once into a cache on disk, then loaded bucket by bucket."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import flux
from flux.errors import UserError
from flux.hashes import fingerprint
from flux.loading import LOADERS, ModelFiles
from flux.memory import release
from flux.transformer import Prompt
from people.cache import TensorCache, content_key
from people.crops import to_tensor
from people.encoding import encode_picture, encode_prompt, make_batch, send, stack_prompts
from people.folders import Photo
from people.manifest import Manifest
from people.photos import READING, Size, read_photo
from run.ranks import Ranks
from run.settings import Training

VERSION = 1  # raise it whenever `to_tensor` changes, so that all photos are encoded anew


@dataclass(frozen=True)
class Batch:
    """The samples of one update."""

    inputs: dict[str, Tensor]  # the arguments of `flow_loss`
    slots: Tensor  # (b,) of the person on each photo
    photos: list[str]  # paths

    @property
    def t(self) -> Tensor:
        return self.inputs["t"]


@dataclass(frozen=True)
class BucketData:
    """The encoded photos of a bucket: one entry in each list per photo."""

    paths: list[Path]
    slots: list[int]
    shapes: list[Size]
    entries: list[tuple[dict[str, Tensor], dict[str, Tensor]]]  # posterior and prompt


class LatentDataset:
    """People, with the latents of their photos and the embeddings of their captions in a cache.

    The key of an entry is a hash of everything it depends on, so entries of other settings are never used.
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
        """shape: returns the (height, width) in which a photo of a size is trained.
        t5_length: number of tokens; None takes the tokenizer's.
        """
        self.people, self.cache, self.files, self.shape = people, cache, files, shape
        self.t5_length, self.device, self.dtype = t5_length, device, dtype
        sizes = flux.load_autoencoder(files.autoencoder, "meta").sizes  # from the header alone
        self.autoencoder_key = f"{fingerprint(files.autoencoder)} {sizes} {dtype}"
        sizes = tuple(LOADERS[part](file, "meta").sizes for part, file in files.encoders.items())
        folders = files.base.folders(files.tokenizers)
        vocabularies = [file for folder in folders for file in sorted(folder.iterdir()) if file.is_file()]
        weights = fingerprint(*files.encoders.values(), *vocabularies)
        self.encoders_key = f"{weights} {sizes} {t5_length} {dtype}"
        self.default_caption = f"a photo of a {class_word}"
        # For the sample grids that training writes.
        self.sampler = flux.default_sampler(files)
        self.sample_texts = [self.default_caption, f"{self.default_caption} smiling at the beach"]
        self.sample_texts += [""] if self.sampler["cfg"] > 1 else []

    def caption(self, photo: Photo) -> str:
        return photo.caption or self.default_caption

    def prompt_key(self, text: str) -> str:
        return content_key(text, self.encoders_key)

    def keys(self, photo: Photo) -> tuple[str, str]:
        """Return the keys of a photo's latents and of its caption."""
        latents = content_key(VERSION, READING, photo.digest, self.shape(photo.size), self.autoencoder_key)
        return latents, self.prompt_key(self.caption(photo))

    def encode(self, ranks: Ranks, vram: float | None = None) -> None:
        """Encode all photos and captions that are not in the cache yet.

        The encoders are loaded only if there are any, and freed afterwards. Each rank encodes its part.
        """
        photos_left, prompts_left = self._find_missing(ranks)
        if photos_left:
            autoencoder = flux.load_autoencoder(self.files.autoencoder, self.device, self.dtype)
            for person in tqdm(self.people, "latents of people", disable=not ranks.leads):
                for photo in person.photos:
                    key, _ = self.keys(photo)
                    if self._lacks(key, ranks):
                        with warnings.catch_warnings():
                            warnings.simplefilter("ignore")  # of colour profiles, which the scan reported
                            picture = to_tensor(read_photo(photo.path), self.shape(photo.size))
                        self.cache.put(key, encode_picture(picture, autoencoder))
            del autoencoder
            release(self.device)
        if prompts_left:
            conditioner = flux.load_conditioner(self.files, self.device, self.dtype, self.t5_length, vram)
            captions = (self.caption(photo) for person in self.people for photo in person.photos)
            for text in chain(self.sample_texts, tqdm(captions, "captions", disable=not ranks.leads)):
                key = self.prompt_key(text)
                if self._lacks(key, ranks):
                    self.cache.put(key, encode_prompt(text, conditioner))
            del conditioner
            release(self.device)
        ranks.wait()  # until the others have encoded their parts

    def _lacks(self, key: str, ranks: Ranks) -> bool:
        """Say whether an entry is missing that this rank has to make."""
        return ranks.makes(key) and key not in self.cache

    def _find_missing(self, ranks: Ranks) -> tuple[bool, bool]:
        """Say whether any latents, and whether any prompts, are missing that this rank has to make."""
        photos_left = False
        prompts_left = any(self._lacks(self.prompt_key(text), ranks) for text in self.sample_texts)
        for person in self.people:
            for photo in person.photos:
                latents, caption = self.keys(photo)
                photos_left = photos_left or self._lacks(latents, ranks)
                prompts_left = prompts_left or self._lacks(caption, ranks)
            if photos_left and prompts_left:
                break
        return photos_left, prompts_left

    def shapes(self, pids: Sequence[int]) -> list[Size]:
        """Return the shape in which each photo of some people is trained."""
        return [self.shape(photo.size) for pid in pids for photo in self.people[pid].photos]

    def load(self, pids: Sequence[int]) -> BucketData:
        """Load the encoded photos of a bucket; the slot of a person is the position in `pids`."""
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
        """Stack the chosen photos of a bucket, all of one shape, and draw their noise and times."""
        entries = [data.entries[k] for k in chosen]
        inputs = make_batch(entries, generator, training, self.device, self.dtype)
        (slots,) = send([torch.tensor([data.slots[k] for k in chosen])], self.device)
        return Batch(inputs, slots, [str(data.paths[k]) for k in chosen])

    def load_sample_prompts(self) -> tuple[dict[str, Prompt], dict]:
        """Return the prompts of the sample grids, encoded, and the settings of `denoise` for them."""
        keys = {text: self.prompt_key(text) for text in self.sample_texts}
        loaded = self._fetch(keys.values())
        prompts = {text: stack_prompts([loaded[key]]) for text, key in keys.items()}
        return prompts, self.sampler | {"negative": prompts.pop("", None)}

    def _fetch(self, keys: Iterable[str]) -> dict[str, dict[str, Tensor]]:
        loaded = {key: self.cache.get(key) for key in keys}
        lost = sum(entry is None for entry in loaded.values())
        if lost:
            raise UserError(
                f"{lost} entries of {self.cache.folder} are gone or damaged; the same command makes them anew"
            )
        return loaded
