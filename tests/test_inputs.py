"""Classes, references, faces, prompts and pictures are found and read as they should be."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from flux.errors import UserError
from people.faces import clip_face, known_face
from scoring import inputs, samples

PROMPTS = Path(__file__).parents[1] / "metaphd" / "prompts"


def test_the_prompt_lists():
    man, woman = (inputs.read_prompts(PROMPTS, kind) for kind in ("man", "woman"))
    assert len(man) == len(woman) == len({*man}) == len({*woman}) == 20
    for prompts, word in ((man, "man"), (woman, "woman")):
        assert all(re.search(rf"\b{word}\b", prompt) for prompt in prompts)
    for kind, other in (("man", r"\b(woman|her|she)\b"), ("woman", r"\b(man|his|he)\b")):
        frontal = inputs.read_prompts(PROMPTS / "frontal.txt", kind)
        assert len(frontal) == 10
        for prompt in frontal + {"man": man, "woman": woman}[kind]:
            assert not re.search(other, prompt) and not set(prompt) & set("[]/")
            assert len(prompt) < 160 and len(prompt.split()) < 40  # CLIP sees 75 tokens


@pytest.mark.parametrize("name, kind", [
    ("woman_anna", "woman"), ("man-3", "man"), ("man", "man"), ("manuel", "person"), ("anna", "person"),
])  # fmt: skip
def test_the_class_of_a_person(name, kind):
    assert inputs.class_of(name, {}) == kind
    assert inputs.class_of(name, {name: "woman"}) == "woman"


NFC, NFD = "Zo\u00eb", "Zoe\u0308"


def make_photos(folder: Path, *names: str) -> None:
    for k, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (k, 0, 0)).save(folder / name)


def test_names_are_the_same_composed_and_decomposed(tmp_path):
    """macOS and some programs write Zoë as an e and two dots."""
    make_photos(tmp_path / "people", f"{NFD}/{NFD}.png", f"{NFD}/a.png")
    make_photos(tmp_path / "made", f"{NFD}/00_x/0.png")
    (tmp_path / "references.json").write_text(json.dumps({NFC: f"{NFC}.png"}))
    (sample,) = samples.scan_samples(tmp_path / "made")
    references = inputs.read_names(tmp_path / "references.json", "--references")
    photos = inputs.find_photos(tmp_path / "people", references, [sample.person])
    assert {name: [path.name for path in paths] for name, paths in photos.items()} == {
        NFC: [f"{NFD}.png", "a.png"]
    }
    assert inputs.class_of(sample.person, {NFC: "woman"}) == "woman"
    assert sample.path.is_file()
    make_photos(tmp_path / "base", f"{NFD}/00_x/0.png")
    assert samples.find_base(sample, tmp_path / "base", "woman").is_file()
    for name in (NFC, NFD):
        (tmp_path / "people" / NFD / "faces.json").write_text(json.dumps({f"{name}.png": [1, 2, 3, 4]}))
        assert known_face(photos[NFC][0]) == (1, 2, 3, 4)


def test_references_in_folders_below(tmp_path):
    make_photos(tmp_path, "anna/1.png", "anna/2019/1.png", "anna/2019/2.png")
    for name, expected in {"1.png": "1.png", "2.png": "2019/2.png", "2019/1.png": "2019/1.png"}.items():
        first = inputs.find_photos(tmp_path, {"anna": name})["anna"][0]
        assert first == tmp_path / "anna" / expected


def test_litter_is_no_picture_of_a_system(tmp_path):
    make_photos(
        tmp_path, "anna/00/0.png", "anna/00/@eaDir/0.png/SYNOPHOTO_THUMB_M.png", "__MACOSX/anna/00/0.png"
    )
    make_photos(tmp_path, "anna/00/._0.png", "anna/00/.hidden.png")
    assert [str(sample.path.relative_to(tmp_path)) for sample in samples.scan_samples(tmp_path)] == [
        "anna/00/0.png"
    ]


def test_comfyuis_graph_is_no_prompt(tmp_path):
    """ComfyUI writes JSON where `sample.py` writes the prompt."""
    for text, prompt in {"a woman": "a woman", '{"3": {"class_type": "KSampler"}}': None}.items():
        (info := PngInfo()).add_text("prompt", text)
        Image.new("RGB", (8, 8)).save(tmp_path / "0.png", pnginfo=info)
        assert samples.written_prompt(tmp_path / "0.png") == prompt


@pytest.mark.parametrize(
    "box, clipped",
    [
        ((-2, 10, 50, 70), (0, 10, 50, 64)),
        ((1, 2, 3, 4), (1, 2, 3, 4)),
        ((0.5, -1e9, 1e9, 8.0), (0.5, 0, 64, 8.0)),
    ],
)
def test_faces_are_clipped(box, clipped, recwarn):
    assert clip_face(Path("a.png"), Image.new("RGB", (64, 64)), box) == clipped
    assert [str(warning.message).startswith("a.png: the face box") for warning in recwarn] == [True] * (
        box != clipped
    )


@pytest.mark.parametrize("box", [(-9, 0, 0, 9), (64, 0, 70, 9), (9, 9, 1, 1), (0, 70, 9, 80)])
def test_faces_outside_are_refused(box):
    with pytest.raises(UserError, match="a.png: the face box .* is not inside the photo of 64 x 64"):
        clip_face(Path("a.png"), Image.new("RGB", (64, 64)), box)
