"""The synthetic people: same seed same pictures, captions tell the view and only it, boxes hold the face."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tiny import people
from tiny.people import IDENTITY, SCENES, SHIRTS, STYLES, VIEW, caption, draw_identities, draw_views, render

FRONTAL = {"yaw": 0.0, "pitch": 0.0, "roll": 0.0, "width": 0.5, "x": 0.5, "y": 0.5, "style": 0, "scene": 6}
PLAIN = {"woman": 0, "hair": 0, "beard": 0, "glasses": 0, "mole_x": 0, "freckles": 0, "scar": 0}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def changed(before: torch.Tensor, after: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns of the pixels that differ clearly."""
    return torch.nonzero((before - after).abs().amax(0) > 0.2, as_tuple=True)


def test_same_seed_same_pictures_without_the_global_generator():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, second, other = (people.training_pictures(9, seeded(s), named=0.5) for s in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first[0], second[0]) and first[1] == second[1] and torch.equal(first[2], second[2])
    assert not torch.equal(first[0], other[0])


def test_range_and_shapes():
    images, captions, boxes = people.training_pictures(40, seeded())
    assert images.shape == (40, 3, 64, 64) and boxes.shape == (40, 4) and len(captions) == 40
    assert images.isfinite().all() and images.min() >= -1 and images.max() <= 1
    assert (images.flatten(1).std(1) > 0.1).all()  # nothing blank
    assert (boxes[:, 2:] - boxes[:, :2] >= 8).all() and boxes.min() >= 0 and boxes.max() <= 64


def test_a_row_does_not_depend_on_its_batch():
    identities, views = draw_identities(5, seeded()), draw_views(5, seeded(1))
    together, _ = render(identities, views)
    alone, _ = render(identities[3:4], views[3:4])
    torch.testing.assert_close(together[3:4], alone, atol=1e-5, rtol=0)


def test_other_sizes_show_the_same_picture():
    identities, views = draw_identities(8, seeded()), draw_views(8, seeded(1), style=torch.arange(8) % 4)
    small, small_boxes = render(identities, views, 64)
    large, large_boxes = render(identities, views, 128)
    assert (torch.nn.functional.avg_pool2d(large, 2) - small).abs().mean((1, 2, 3)).max() < 0.06
    assert (large_boxes / 2 - small_boxes).abs().max() <= 1


@pytest.mark.parametrize("name", [name for name in IDENTITY if name not in ("woman",)])
def test_every_number_of_a_person_is_seen(name):
    """All but the woman column, which shows in eyelashes and captions only, must change some pixels."""
    shown = {
        "hair": 7,
        "hair_length": 0.1,
        "part": 1.0,
        "beard": 0,
        "glasses": 1,
        "mole_x": 0.5,
        "freckles": 1,
        "earrings": 1,
        "scar": 1,
        "blush": 0.3,
    }
    person = draw_identities(1, seeded(), woman=1, **shown)
    other = person.clone()
    column = IDENTITY.index(name)
    step = {
        "hair": 1,
        "part": -2,
        "beard": 3,
        "glasses": 1,
        "freckles": -1,
        "earrings": -1,
        "scar": -1,
        "face_width": -0.15,
    }
    other[:, column] += step.get(name, -0.12 if float(person[0, column]) > 0.5 else 0.12)
    view = draw_views(1, seeded(1), **{**FRONTAL, "width": 0.4})
    difference = (render(person, view)[0] - render(other, view)[0]).abs()
    assert difference.max() > 0.03


def test_people_differ_in_every_style():
    identities = draw_identities(20, seeded())
    for style in range(len(STYLES)):
        images, _ = render(identities, draw_views(1, seeded(), **{**FRONTAL, "style": style}).expand(20, -1))
        distances = torch.cdist(images.flatten(1), images.flatten(1)) / images[0].numel() ** 0.5
        assert (distances + torch.eye(20)).min() > 0.05, list(STYLES)[style]


def test_styles_scenes_and_shirts_differ():
    person = draw_identities(1, seeded(2))
    for name, count in (("style", len(STYLES)), ("scene", len(SCENES)), ("shirt", len(SHIRTS))):
        views = draw_views(1, seeded(), **FRONTAL).repeat(count, 1)
        views[:, VIEW.index(name)] = torch.arange(count)
        images, _ = render(person.expand(count, -1), views)
        images = images[:, :, 56:] if name == "shirt" else images
        distances = torch.cdist(images.flatten(1), images.flatten(1)) / images[0].numel() ** 0.5
        assert (distances + torch.eye(count)).min() > 0.1, name


@pytest.mark.parametrize("view", [{}, {"yaw": 0.5}, {"roll": 0.2}, {"width": 0.35, "x": 0.3}, {"width": 0.8}])
def test_box_holds_both_eyes_and_they_mirror(view):
    """The eyes are found by recolouring them, without asking the renderer where they are."""
    brown = draw_identities(1, seeded(), **PLAIN, iris_r=0.5, iris_g=0.1, iris_b=0.0)
    blue = draw_identities(1, seeded(), **PLAIN, iris_r=0.0, iris_g=0.3, iris_b=1.0)
    views = draw_views(1, seeded(1), **{**FRONTAL, **view})
    (before, after), boxes = render(torch.cat([brown, blue]), views.expand(2, -1))
    y, x = changed(before, after)
    x0, y0, x1, y1 = boxes[0].tolist()
    assert x.min() >= x0 and x.max() < x1 and y.min() >= y0 and y.max() < y1
    columns = torch.unique(x)
    assert (columns.diff() > 1).sum() == 1  # two eyes, apart
    if not view:
        assert abs((x.min() + x.max()).item() - 63) <= 1 and (y < 40).all() and (y > 24).all()


def test_box_is_as_wide_as_the_face_and_follows_it():
    """Recolouring a bald man's skin changes face and ears, as wide as the box, and the narrower neck."""
    for view in ({}, {"width": 0.35}, {"x": 0.4, "y": 0.45, "width": 0.4}, {"width": 0.65}):
        pale = draw_identities(1, seeded(), **PLAIN, skin_r=0.9, skin_g=0.8, skin_b=0.7)
        deep = draw_identities(1, seeded(), **PLAIN, skin_r=0.4, skin_g=0.3, skin_b=0.2)
        views = draw_views(1, seeded(1), **{**FRONTAL, **view})
        (before, after), boxes = render(torch.cat([pale, deep]), views.expand(2, -1))
        _, x = changed(before, after)
        x0, _, x1, _ = boxes[0].tolist()
        assert abs(x.min() - x0) <= 2 and abs(x.max() + 1 - x1) <= 2, view


def test_captions_say_the_view_and_man_or_woman_only():
    words = set(
        " ".join([*SCENES.values(), *SHIRTS, *STYLES.values(), "of a man woman wearing in shirt"]).split()
    )
    generator = seeded()
    identities, views = draw_identities(300, generator), draw_views(300, generator)
    texts = [caption(v, i, generator, named=0.6) for v, i in zip(views, identities)]
    for text, view, identity in zip(texts, views, identities):
        said = text.split()
        scene, shirt, style = (int(view[VIEW.index(k)]) for k in ("scene", "shirt", "style"))
        assert set(said) <= words and len(said) <= 16
        assert ("woman" in said) == bool(identity[IDENTITY.index("woman")]) != ("man" in said)
        assert [s for s in SHIRTS if s in said] in ([], [list(SHIRTS)[shirt]])
        assert [s for s in SCENES.values() if s in text] in ([], [list(SCENES.values())[scene]])
        kinds = [s for s in STYLES.values() if text.startswith(s)]
        assert kinds == [list(STYLES.values())[style]] or (not kinds and style == 0)
    assert len(set(texts)) > 100
    whole = [caption(v, i, generator) for v, i in zip(views, identities)]
    assert all(
        re.search(r" shirt\b", t) and any(s in t for s in SCENES.values()) and " of " in t for t in whole
    )
    bare = [caption(v, i, generator, named=0) for v, i in zip(views, identities)]
    assert set(bare) == {
        f"{s} of {w}" if k else w for k, s in enumerate(STYLES.values()) for w in ("a man", "a woman")
    }


def test_framing_reaches_from_a_fifth_to_nine_tenths():
    width = draw_views(4000, seeded())[:, VIEW.index("width")]
    assert 0.2 <= width.min() < 0.22 and 0.88 < width.max() <= 0.9
    assert ((width > 0.35) & (width < 0.6)).float().mean() > 0.8


def test_wrong_input_stops():
    with pytest.raises(ValueError, match="colour"):
        draw_views(2, seeded(), colour=1)
    with pytest.raises(ValueError, match="multiple of 8"):
        render(draw_identities(1, seeded()), draw_views(1, seeded()), size=60)
    with pytest.raises(ValueError, match="2 identities and 1 views"):
        render(draw_identities(2, seeded()), draw_views(1, seeded()))


def test_data_set_layout(tmp_path):
    script = Path(people.__file__)
    command = [sys.executable, str(script), "--out", str(tmp_path / "ids"), "--people", "3", "--photos", "2"]
    subprocess.run(command, check=True, capture_output=True)
    folders = sorted(p for p in (tmp_path / "ids").iterdir() if p.is_dir())
    assert [
        re.fullmatch(r"(?:wo)?man_(\d{3})", f.name).group(1)
        for f in sorted(folders, key=lambda f: f.name[-3:])
    ] == [
        "000",
        "001",
        "002",
    ]
    for folder in folders:
        assert sorted(p.name for p in folder.iterdir()) == [
            "000.png",
            "000.txt",
            "001.png",
            "001.txt",
            "faces.json",
        ]
        faces = json.loads((folder / "faces.json").read_text())
        assert set(faces) == {"000.png", "001.png"} and all(len(box) == 4 for box in faces.values())
        assert np.asarray(Image.open(folder / "000.png")).shape == (64, 64, 3)
        assert folder.name.split("_")[0] in (folder / "001.txt").read_text().split()
    before = {p: p.read_bytes() for p in (tmp_path / "ids").rglob("*.*")}
    people.write_people(
        tmp_path / "ids", people=3, photos=2, seed=0
    )  # the same data set may be written again
    assert {p: p.read_bytes() for p in (tmp_path / "ids").rglob("*.*")} == before
    with pytest.raises(FileExistsError, match="not empty"):
        people.write_people(tmp_path / "ids", people=4, photos=2, seed=0)
