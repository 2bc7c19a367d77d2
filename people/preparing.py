"""The people of a training run: the options that name them, and how they are looked at and encoded."""

import argparse
from functools import partial
from pathlib import Path

import torch

import flux
from flux.hashes import fingerprint
from flux.loading import ModelFiles
from people.cache import TensorCache
from people.crops import common_shape
from people.dataset import LatentDataset
from people.manifest import Manifest, scan_photos
from run.checkpoints import check_settings
from run.ranks import Ranks


def add_people_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that `prepare_data` reads."""
    group = parser.add_argument_group("people")
    group.add_argument(
        "--data",
        type=Path,
        required=True,
        help="folder of people, <person>/*.jpg|png|webp; or a list (.tsv, .csv, .txt) with a photo's path, a "
        "person and perhaps a caption in each line",
    )
    group.add_argument(
        "--class",
        dest="class_word",
        default="person",
        help="word of the default caption; paper: woman or man",
    )
    group.add_argument(
        "--resolution",
        type=int,
        help="photos are shrunk to this side squared, in pixels; default: the model's, 1024",
    )
    group.add_argument(
        "--min-side",
        type=int,
        help="photos with a shorter side are left out, in pixels; default: an eighth of --resolution",
    )
    group.add_argument(
        "--min-photos", type=int, default=1, help="people with fewer good photos are left out; paper: 20"
    )
    group.add_argument("--max-people", type=int, help="use only so many people, the first by name")
    group.add_argument("--max-photos", type=int, help="use only so many photos of each, the first by name")
    group.add_argument(
        "--strict", action="store_true", help="stop when a photo is not used, or not used as it is"
    )


def prepare_data(
    args: argparse.Namespace,
    files: ModelFiles,
    resolution: int,
    settings: dict[str, object],
    may_change: tuple[str, ...],
    device: torch.device,
    dtype: torch.dtype,
    ranks: Ranks,
) -> LatentDataset:
    """Look at all photos, check that a run in --out can go on with these settings, and encode the photos.

    args: of a command with `add_people_arguments`, in which those of may_change may differ from run to run.
    settings: what else must stay as it was.
    """
    min_side = resolution // 8 if args.min_side is None else args.min_side
    multiple = flux.load_autoencoder(files.autoencoder, "meta").sizes.token_pixels
    shape = partial(common_shape, resolution=resolution, multiple=multiple)

    def look() -> Manifest:
        limits = min_side, args.min_photos, args.max_people, args.max_photos
        people, report = scan_photos(args.data, args.out / "people.jsonl", shape, *limits)
        report.tell(args.data, args.out / "data.tsv", args.strict)
        return people

    people = ranks.once(look)
    settings = settings | {**vars(args), "resolution": resolution, "min_side": min_side, "dtype": str(dtype)}
    settings |= {"base": fingerprint(files.transformer), "world": ranks.size}
    ranks.once(lambda: check_settings(args.out, settings | people.contents(), may_change))

    cache = TensorCache(args.out / "cache")
    dataset = LatentDataset(people, cache, files, shape, args.class_word, args.t5_length, device, dtype)
    dataset.encode(ranks, args.vram)
    return dataset
