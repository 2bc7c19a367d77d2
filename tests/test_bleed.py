"""Bleeding: known amounts of it are measured in pictures of two synthetic people; wrong counts are told."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

import metrics
from people.cache import TensorCache
from run.models import SHIPPED
from scoring.bleed import leave_out, remark_bleed, score_bleed
from scoring.evaluators import Faces, PaperEvaluators, SmallEvaluators
from tiny.people import IDENTITY, draw_identities, draw_views, render, to_pil

KINDS = (
    "woman",
    "hair",
    "part",
    "beard",
    "glasses",
    "freckles",
    "earrings",
    "scar",
)  # not mixed, but switched
AMOUNTS = (0, 0.25, 0.5, 0.75, 1)
COUPLES = 12


def mix(other: Tensor, learned: Tensor, amount: float) -> Tensor:
    """Interpolate identities; what has no value between two switches in the middle."""
    mixed = other.lerp(learned, amount)
    for name in KINDS:
        k = IDENTITY.index(name)
        mixed[:, k] = (learned if amount > 0.5 else other)[:, k]
    return mixed


def paste(*faces: Image.Image) -> Image.Image:
    wide = Image.new("RGB", (64 * len(faces), 64))
    for k, face in enumerate(faces):
        wide.paste(face, (64 * k, 0))
    return wide


@pytest.fixture(scope="module")
def couples(tmp_path_factory) -> Path:
    """Files <what>/<person>/00/0.png: what the base model and systems of known bleeding would make.

    base: two strangers. 0 .. 1: the learned person, and the right stranger by so much mixed with the learned
    one. stranger: one alone. swapped: 1 and its base, both mirrored in their order. wrong: as 1, but with
    somebody else than the learned person. people: the learned ones.
    """
    root, generator = tmp_path_factory.mktemp("couples"), torch.Generator().manual_seed(1)
    left, right, learned, wrong = (draw_identities(COUPLES, generator) for _ in range(4))
    views = [draw_views(COUPLES, generator, style=0.0, width=0.5) for _ in range(3)]

    def draw(identities: Tensor, view: int) -> list[Image.Image]:
        return [to_pil(image) for image in render(identities, views[view])[0]]

    shown = {"base": zip(draw(left, 0), draw(right, 1))}
    for amount in AMOUNTS:
        shown[f"{amount:g}"] = zip(draw(learned, 0), draw(mix(right, learned, amount), 1))
    shown["swapped"] = zip(draw(learned, 1), draw(learned, 0))
    shown["swapped-base"] = zip(draw(right, 1), draw(left, 0))
    shown["wrong"] = zip(draw(learned, 0), draw(mix(right, wrong, 1), 1))
    shown["alone"] = zip(draw(learned, 0))
    shown["stranger"] = zip(draw(right, 0))
    shown["three"] = zip(draw(learned, 0), draw(right, 1), draw(right, 1))
    for what, pictures in shown.items():
        for k, faces in enumerate(pictures):
            file = root / what / f"person_{k}" / "00" / "0.png"
            file.parent.mkdir(parents=True)
            paste(*faces).save(file)
    for k, face in enumerate(draw(learned, 2)):
        (root / "people" / f"person_{k}").mkdir(parents=True)
        face.save(root / "people" / f"person_{k}" / "0.png")
    return root


@pytest.fixture
def measure(couples, tmp_path, monkeypatch):
    """Call metrics.py on pictures and base pictures, both by name; returns what it writes."""
    monkeypatch.chdir(tmp_path)

    def call(images: str, base: str = "base", command: str = "bleed") -> dict:
        words = [command, "--model", "tiny", "--device", "cpu", "--people", couples / "people"]
        words += ["--images", couples / images, "--base", couples / base, "--out", "scores.json"]
        metrics.main([str(word) for word in words])
        return json.loads(Path("scores.json").read_text())

    return call


def test_bleed_is_the_amount_that_was_mixed_in(measure, capsys):
    found = [measure(f"{amount:g}") for amount in AMOUNTS]
    means = [scores["overall"]["bleed"]["mean"] for scores in found]
    assert means[0] == pytest.approx(0, abs=1e-6)  # the other face is the base's: nothing is added by chance
    assert all(low < high for low, high in zip(means, means[1:]))
    # Two pictures of one person have a cosine of .93 and of two people of about 0.
    assert means[-1] > 0.75
    assert not found[0]["remarks"] and found[0]["overall"]["bleed"]["people"] == COUPLES
    assert f"| {100 * means[-1]:.2f} ± " in capsys.readouterr().out


def test_bleed_does_not_depend_on_the_order(measure):
    plain, swapped = measure("1"), measure("swapped", "swapped-base")
    for name, person in plain["people"].items():
        # Which of the two copies counts as the learned person is chance; the views of both differ.
        assert swapped["people"][name]["bleed"] == pytest.approx(person["bleed"], abs=1e-5)


def test_likeness_to_somebody_else_is_no_bleeding(measure):
    """The negative control: the other face is replaced as a whole, by that of a third person."""
    assert abs(measure("wrong")["overall"]["bleed"]["mean"]) < 0.15


def test_the_bases_most_similar_face_would_be_a_biased_choice(couples, tmp_path):
    """Without any bleeding, comparing with the base's less similar face gives more than 0."""
    evaluators, biased = SmallEvaluators(SHIPPED["tiny"] / "judges", TensorCache(tmp_path)), []
    for k in range(COUPLES):
        path = Path(f"person_{k}", "00", "0.png")
        own, base = evaluators.embed_all_faces([couples / "0" / path, couples / "base" / path])
        e_ref = evaluators.embed_faces([couples / "people" / f"person_{k}" / "0.png"])[0][0]
        other, base_other = leave_out(own, base, e_ref)
        assert torch.equal(other, base_other)
        biased.append((other @ e_ref - (base.embedded @ e_ref).min()).item())
    assert sum(biased) / COUPLES > 0.05


def test_class_bleed_counts_every_face(measure):
    """The learned person instead of a stranger: nearly all of the likeness; the base itself: nothing."""
    same = measure("alone", "alone", "class-bleed")
    assert same["overall"]["class-bleed"]["mean"] == pytest.approx(0, abs=1e-6)
    assert measure("alone", "stranger", "class-bleed")["overall"]["class-bleed"]["mean"] > 0.75


def test_unexpected_numbers_of_faces_are_told(measure):
    single = measure("alone")
    title = "bleed: fewer faces than 2, left out"
    assert len(single["remarks"][title]) == COUPLES and single["overall"]["bleed"]["mean"] is None
    base = measure("1", "alone")
    assert base["remarks"][title] == single["remarks"][title] and base["overall"]["bleed"]["mean"] is None
    three = measure("three")
    assert len(three["remarks"]["bleed: more faces than 2, all others are averaged"]) == COUPLES
    assert three["overall"]["bleed"]["mean"] == pytest.approx(0, abs=0.05)
    assert {row["all faces"] for row in three["pictures"]} == {3}


def test_by_hand_on_a_few_embeddings():
    class Fake(metrics.Evaluators):
        def embed_all_faces(self, paths):
            return [Faces(*seen[path.stem]) for path in paths]

    ref, other, base_left = torch.eye(3)
    tilted = torch.tensor([0.6, 0.8, 0.0])
    middles = torch.tensor([[0.25, 0.5], [0.75, 0.5]])
    seen = {
        "system": (torch.stack([tilted, ref]), middles.flip(0)),  # the learned person stands at left
        "base": (torch.stack([base_left, other]), middles),
        "empty": (torch.zeros(0, 1), torch.zeros(0, 2)),
    }
    rows = [
        {"person": "a", "path": Path("system"), "base": Path(base)} for base in ("base", "empty", "system")
    ]
    score_bleed(rows, {"a": ref}, Fake(None), "bleed")
    assert [row["bleed"] for row in rows] == [pytest.approx(0.6), None, pytest.approx(0)]
    assert remark_bleed(rows) == {"bleed: fewer faces than 2, left out": ["empty"]}


def test_every_face_of_a_photo_is_embedded(portraits, tmp_path):
    """Two portraits side by side, found by YuNet; the recogniser is replaced: a box is the embedding."""

    class Boxes:
        def embed_faces(self, images, boxes):
            assert all(image.size == (1024, 512) for image in images)
            return torch.tensor(boxes).float()

    faces = [Image.open(portraits[k]).convert("RGB").resize((512, 512)) for k in (0, 4)]
    for name, pair in {"ab": faces, "ba": faces[::-1]}.items():
        wide = Image.new("RGB", (1024, 512))
        for k, face in enumerate(pair):
            wide.paste(face, (512 * k, 0))
        wide.save(tmp_path / f"{name}.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "none.png")
    evaluators = PaperEvaluators(TensorCache(tmp_path / "cache"), recognizer=portraits[0])
    evaluators.recognizer = Boxes()
    for _ in range(2):  # the second time from the cache
        ab, ba, none = evaluators.embed_all_faces([tmp_path / f"{x}.png" for x in ("ab", "ba", "none")])
        for found in (ab, ba):
            assert len(found.embedded) == 2 and sorted(found.middles[:, 0] > 0.5) == [False, True]
            x = found.embedded[:, [0, 2]].mean(dim=1) / 1024
            torch.testing.assert_close(found.middles[:, 0], x)
        assert len(none.embedded) == 0
