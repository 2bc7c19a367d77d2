"""The cache keys of a people data set differ with everything that an entry depends on, and nothing else."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flux.errors import UserError
from flux.finding import find_files
from people.cache import TensorCache
from people.dataset import LatentDataset
from people.folders import Photo
from people.manifest import Manifest

PHOTO = Photo(Path("anna/1.jpg"), "a woman", (64, 48), digest="0a")


@pytest.fixture(scope="module")
def make(model, tmp_path_factory):
    folder, files = tmp_path_factory.mktemp("cache"), find_files(str(model))

    def make(**changes: object) -> LatentDataset:
        nobody = Manifest(folder / "people.jsonl", folder, [])
        options = {"shape": lambda size: size, "class_word": "woman", "t5_length": None}
        options |= {"device": torch.device("cpu"), "dtype": torch.float32}
        return LatentDataset(nobody, TensorCache(folder), files, **options | changes)

    return make


@pytest.mark.parametrize(
    "photo, settings, latents_differ, caption_differs",
    [
        ({"path": Path("boris/2.jpg")}, {}, False, False),  # the content counts, not the name
        ({"digest": "0b"}, {}, True, False),
        ({"size": (48, 64)}, {}, True, False),
        ({"caption": "a man"}, {}, False, True),
        ({"caption": None}, {}, False, True),
        ({}, {"class_word": "man"}, False, False),  # there is a caption
        ({}, {"shape": lambda size: (32, 32)}, True, False),
        ({}, {"t5_length": 9}, False, True),
        ({}, {"dtype": torch.bfloat16}, True, True),
    ],
)
def test_keys(make, photo, settings, latents_differ, caption_differs):
    before, after = make().keys(PHOTO), make(**settings).keys(replace(PHOTO, **photo))
    assert [a != b for a, b in zip(before, after)] == [latents_differ, caption_differs]


def test_photos_without_a_caption_get_the_default_one(make):
    assert make().caption(replace(PHOTO, caption=None)) == "a photo of a woman"
    assert make().caption(PHOTO) == "a woman"


def test_missing_entries_are_an_error(make):
    with pytest.raises(UserError, match="2 entries of .* are gone or damaged"):
        make().load_sample_prompts()
