"""The cache keys of a people data set differ with everything that an entry depends on, and nothing else."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flux.errors import UserError
from flux.finding import find_files
from flux.loading import ModelFiles
from people.cache import TensorCache
from people.dataset import LatentDataset
from people.folders import Photo
from people.manifest import Manifest

PHOTO = Photo(Path("anna/1.jpg"), "a woman", (64, 48), digest="0a")


@pytest.fixture(scope="module", params=["model", "klein"])
def make(request, tmp_path_factory):
    folder, files = tmp_path_factory.mktemp("cache"), find_files(str(request.getfixturevalue(request.param)))

    def make(files: ModelFiles = files, **changes: object) -> LatentDataset:
        nobody = Manifest(folder / "people.jsonl", folder, [])
        options = {"shape": lambda size: size, "class_word": "woman", "t5_length": None}
        options |= {"device": torch.device("cpu"), "dtype": torch.float32}
        return LatentDataset(nobody, TensorCache(folder), files, **options | changes)

    make.files = files
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


def test_keys_of_other_text_encoders(make, tmp_path):
    """Another byte of any of them, or of a tokenizer, changes the captions' keys, not those of latents."""
    before = make().keys(PHOTO)
    for changed in (*make.files.encoders, "tokenizers"):
        files = replace(make.files, encoders=dict(make.files.encoders), tokenizers=tmp_path / changed)
        shutil.copytree(make.files.folder, files.tokenizers)
        assert make(files).keys(PHOTO) == before
        if changed == "tokenizers":
            file = next((files.tokenizers / "tokenizer").iterdir())
            file.write_text(file.read_text() + " ")
        else:
            files.encoders[changed] = files.tokenizers / make.files.encoders[changed].name
            file = files.encoders[changed] / "model.safetensors"
            *rest, last = file.read_bytes()
            file.write_bytes(bytes([*rest, last ^ 1]))
        after = make(files).keys(PHOTO)
        assert after[0] == before[0] and after[1] != before[1]


def test_photos_without_a_caption_get_the_default_one(make):
    assert make().caption(replace(PHOTO, caption=None)) == "a photo of a woman"
    assert make().caption(PHOTO) == "a woman"


def test_missing_entries_are_an_error(make):
    count = 2 + (make().sampler["cfg"] > 1)  # the negative prompt
    with pytest.raises(UserError, match=f"^{count} entries of .* are gone or damaged"):
        make().load_sample_prompts()
