"""The report: its data is complete and cannot break out; in a browser, the page does what it says."""

import base64
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from people.photos import read_photo
from scoring import curves, report, sheets
from tiny.people import draw_identities, draw_views, render, to_pil

NASTY = '</script><b>&"'
PEOPLE = {"woman_2": "woman", "woman_10": "woman", "Борис 王": "man", NASTY: "man"}
SCORES = {"woman_2": 0.5, "woman_10": 0.9, "Борис 王": 0.7, NASTY: 0.6}  # R-FaceSim of the first system
METRICS = ("clip-t", "clip-i", "facesim", "r-facesim")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
]
FLAGS += ["--disable-component-update", "--disable-sync"]


def group(people: int, **means: float) -> dict:
    return {
        "people": people,
        **{name: {"mean": m, "ci95": 0.0123, "people": people} for name, m in means.items()},
    }


def make_scores(files: list[Path], shift: float = 0.0, metrics=METRICS, place: dict | None = None) -> dict:
    """Two prompts and three seeds for everybody; woman_10's last picture shows no face."""
    rows, people = [], {}
    for k, (name, kind) in enumerate(PEOPLE.items()):
        values = dict(
            zip(METRICS, (0.3 + k / 1000 + shift, 0.8 - k / 1000, SCORES[name] + 0.05, SCORES[name] + shift))
        )
        people[name] = {"class": kind, **{metric: values[metric] for metric in metrics}}
        for j in range(6):
            row = {
                "person": name,
                "prompt": f"{j // 3:02d}",
                "seed": f"{(9, 10, 11)[j % 3]}",
                "path": files[6 * k + j],
            }
            row |= {"class": kind, "text": f"a {kind} <i>no. {j // 3}</i>", "faces": 1}
            rows.append(row | {metric: values[metric] for metric in metrics})
    rows[11]["faces"] = 0
    means = {m: sum(person[m] for person in people.values()) / 4 for m in metrics}
    classes = {"man": group(2, **means), "woman": group(2, **means)}
    overall = group(4, **means) | ({"relative difference": -0.071} if "r-facesim" in metrics else {})
    remarks = {"no face found": [str(rows[11]["path"])]}
    scores = {
        "settings": {"images": files[0].parent},
        "remarks": remarks,
        "overall": overall,
        "classes": classes,
    }
    return scores | {"people": people, "pictures": rows} | ({"system": place} if place else {})


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    """48 different pictures, of two systems, and at last eight photos."""
    folder, generator = tmp_path_factory.mktemp("pictures"), torch.Generator().manual_seed(0)
    images, _ = render(draw_identities(56, generator), draw_views(56, generator), size=160)
    paths = [folder / f"{k}.png" for k in range(56)]
    for path, image in zip(paths, images):
        to_pil(image).save(path)
    return paths


@pytest.fixture(scope="module")
def photos(files) -> dict[str, list[Path]]:
    return {name: files[48 + 2 * k : 50 + 2 * k] for k, name in enumerate(PEOPLE)}


@pytest.fixture(scope="module")
def systems(files) -> dict[str, dict]:
    return {f"first {NASTY}": make_scores(files), "second": make_scores(files[24:48], 0.01)}


@pytest.fixture(scope="module")
def page_file(systems, photos, files, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("report") / "new" / "report.html"
    report.write_report(path, systems, photos, files[:1], f"| the table {NASTY} |")
    return path


def content(path: Path) -> dict:
    """Read the data of a page as a browser does: up to the first end of a script element."""
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script', path.read_text("utf-8"), re.S)[
            1
        ]
    )


def decode(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))


def distance(a: Image.Image, b: Image.Image) -> float:
    """Return the mean absolute difference of two pictures' pixels, which are 0 to 255."""
    return np.abs(np.asarray(a.convert("L"), float) - np.asarray(b.convert("L"), float)).mean()


# The file


def test_the_page_holds_every_system_person_number_and_picture(page_file, systems, photos):
    found = content(page_file)
    assert [system["name"] for system in found["systems"]] == list(systems)
    assert found["metrics"] == {
        "clip-t": "CLIP-T",
        "clip-i": "CLIP-I",
        "facesim": "FaceSim",
        "r-facesim": "R-FaceSim",
    }
    assert len(found["images"]) == 56 and found["side"] == 128
    for system, scores in zip(found["systems"], systems.values()):
        assert system["people"] == scores["people"] and system["remarks"] == scores["remarks"]
        assert system["groups"] == {"overall": scores["overall"], **scores["classes"]}
        for picture, row in zip(system["pictures"], scores["pictures"], strict=True):
            assert {**row, "path": str(row["path"]), "image": picture["image"]} == picture
            shown, original = decode(found["images"][picture["image"]]), read_photo(row["path"])
            assert shown.size == (128, 128) and distance(shown, original.resize((128, 128))) < 6
    assert found["photos"].keys() == photos.keys() and all(len(own) == 2 for own in found["photos"].values())
    assert found["curves"][0].startswith("data:image/png")


def test_names_cannot_break_out(page_file):
    text = page_file.read_text("utf-8")
    assert NASTY not in text and "<b>&" not in text
    assert "the table &lt;/script&gt;&lt;b&gt;&amp;&quot;" in text
    assert text.count("</script>") == 2 and not re.search(r"{{\w+}}", text)


def test_a_place_in_the_data_stays_as_it_is(tmp_path, files):
    scores = make_scores(files)
    scores["remarks"] = {"missing": ["{{table}}", "{{nothing}}", "\udcff of a file name"]}
    report.write_report(tmp_path / "report.html", {"{{data}}": scores}, table="{{data}}")
    found = content(tmp_path / "report.html")["systems"][0]
    assert found["name"] == "{{data}}" and found["remarks"] == scores["remarks"]
    assert "<pre>{{data}}</pre>" in (tmp_path / "report.html").read_text("utf-8")


def test_equal_pictures_are_embedded_once(tmp_path, files):
    shutil.copy(files[0], tmp_path / "copy.png")
    scores = make_scores([tmp_path / "copy.png", *[files[0]] * 12, *files[1:12]])
    report.write_report(tmp_path / "report.html", {"one": scores, "two": scores})
    found = content(tmp_path / "report.html")
    assert len(found["images"]) == 12
    assert [picture["image"] for picture in found["systems"][1]["pictures"]] == [0] * 13 + list(range(1, 12))


@pytest.mark.parametrize("metrics", [("clip-t",), ("facesim", "r-facesim")])
def test_metrics_may_be_missing(tmp_path, files, metrics):
    report.write_report(tmp_path / "report.html", {"one": make_scores(files, metrics=metrics)})
    assert tuple(content(tmp_path / "report.html")["metrics"]) == metrics


def test_many_thumbnails_are_smaller(tmp_path, files, monkeypatch):
    sides = [report.thumbnail_side(n) for n in (0, 1, 4000, 4001, 16000, 64000, 10**7)]
    assert sides == [128, 128, 128, 120, 64, 32, 32]
    monkeypatch.setattr(report, "FULL_SIZE_COUNT", 6)
    report.write_report(tmp_path / "report.html", {"one": make_scores(files)})
    assert {max(decode(uri).size) for uri in content(tmp_path / "report.html")["images"]} == {64}


def test_a_picture_that_is_gone_is_an_error_and_the_old_page_stays(tmp_path, files):
    (tmp_path / "report.html").write_text("old")
    with pytest.raises(FileNotFoundError, match="gone.png"):
        report.write_report(tmp_path / "report.html", {"one": make_scores([Path("gone.png"), *files])})
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "old"


# Curves and sheets


def curve(method: str, rank: int, **means: float) -> dict[str, dict]:
    return {
        f"{method} {rank} {n}": {
            "overall": group(4, **{name: m + n / 10**4 for name, m in means.items()}),
            "system": {"method": method, "rank": rank, "steps": n},
        }
        for n in (500, 250)
    }


def test_curves_show_the_numbers(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    kept = []
    monkeypatch.setattr(
        Figure, "savefig", lambda self, path, **_: (kept.append(self), Path(path).write_text("drawn"))
    )
    systems = curve("meta-lora", 1, **{"clip-t": 0.3, "r-facesim": 0.7}) | curve(
        "lora", 2, **{"clip-t": 0.31, "r-facesim": 0.5}
    )
    systems |= curve("lora", 16, **{"clip-t": 0.29, "r-facesim": 0.6})
    systems["base $x$"] = {"overall": group(4, **{"clip-t": 0.33, "r-facesim": 0.1})}
    assert curves.plot_curves(tmp_path / "new" / "curves.png", systems)
    plane, faces, texts = kept[0].axes
    lines = {line.get_label(): line for line in plane.lines}
    torch.testing.assert_close(
        torch.tensor(lines["meta-lora, rank 1"].get_xydata()), torch.tensor([[32.5, 72.5], [35, 75]]).double()
    )
    assert {"lora, rank 2", "lora, rank 16"} <= lines.keys()
    (base,) = [text for text in plane.texts if text.get_text() == "base $x$"]
    assert base.xy == pytest.approx([33, 10])
    for axes, mean in (faces, 72.5), (texts, 32.5):
        time = {line.get_label(): line for line in axes.lines}
        assert time["meta-lora, rank 1"].get_xydata()[0].tolist() == pytest.approx([250, mean])
        assert "lora, rank 2" in time and "lora, rank 16" not in time  # the least rank only
        band = axes.collections[[*time].index("meta-lora, rank 1")].get_paths()[0].vertices
        assert band[band[:, 0] == 250, 1].min() == pytest.approx(mean - 1.23)
    shown = [text.get_text() for text in kept[0].legends[0].get_texts()]
    assert shown == ["lora, rank 2", "lora, rank 16", "meta-lora, rank 1"]


@pytest.mark.parametrize("metrics", [("clip-t", "r-facesim"), ("clip-t",), ("r-facesim",)])
def test_curves_are_drawn_from_what_there_is(tmp_path, metrics):
    assert curves.plot_curves(tmp_path / "curves.png", curve("lora", 1, **dict.fromkeys(metrics, 0.5)))
    assert read_photo(tmp_path / "curves.png").width > 500


def test_nothing_to_draw(tmp_path):
    none = {
        "overall": {"people": 1, "clip-t": {"mean": None, "ci95": None, "people": 0}},
        "system": {"method": "a", "rank": 1, "steps": 5},
    }
    systems = {"a": none, "b": {"overall": group(3, **{"clip-t": 0.3})}, "c": {"overall": {"people": 2}}}
    assert not curves.plot_curves(tmp_path / "curves.png", systems)
    assert not curves.plot_curves(tmp_path / "curves.png", curve("lora", 1, facesim=0.5))
    assert not any(tmp_path.iterdir())


def test_sheet_layout(files, photos, monkeypatch):
    calls = []
    monkeypatch.setattr(sheets, "contact_sheet", lambda *args: calls.append(args))
    rows = [row for row in make_scores(files)["pictures"] if row["person"] == "woman_2"]
    sheets.person_sheet(rows[::-1][1:], photos["woman_2"], [])
    cells, labels, titles, cell = calls[0]
    assert labels == ["a woman <i>no. 0</i>", "a woman <i>no. 1</i>"] and cell == (256, 256)
    assert titles[1:] == ["seed 9", "seed 10", "seed 11"]
    assert cells[1][3] is None  # the picture left out
    wanted = [photos["woman_2"][0], *files[:3]], [photos["woman_2"][1], *files[3:5]]
    for row, paths in zip(cells, wanted):
        for image, path in zip(row, paths):
            assert (
                image.resize((160, 160)).tobytes()
                == read_photo(path).resize(image.size).resize((160, 160)).tobytes()
            )


def test_sheets_are_written(tmp_path, files, photos):
    scores = make_scores(files)
    scores["people"].pop(NASTY)  # no file name
    sheets.write_sheets(tmp_path / "sheets", scores, photos)
    assert {path.stem for path in (tmp_path / "sheets").iterdir()} == PEOPLE.keys() - {NASTY}
    plain, marked = (
        sheets._cell({"path": files[11], "clip-t": 0.3, "faces": n}, ["clip-t"]).getpixel((250, 252))
        for n in (1, 0)
    )
    assert plain == (0x22, 0x22, 0x22) and marked == (0xA3, 0x20, 0x2A)


# The page in a browser


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    if not (program := next(filter(None, map(shutil.which, BROWSERS)), None)):
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Open pages that may neither complain nor ask for anything but themselves."""
    pages, wrong = [], []

    def open_page(path: Path, width: int = 1600):
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "request",
            lambda request: request.url.startswith(("data:", path.as_uri())) or wrong.append(request.url),
        )
        page.goto(path.as_uri())
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert not wrong


def people_of(page) -> list[str]:
    return [card.get_attribute("data-person") for card in page.locator("article").all()]


def test_the_table_sorts_within_classes(open_page, page_file):
    page = open_page(page_file)
    rows = lambda: [row.split("\t")[:2] for row in page.locator("#scores tbody tr").all_inner_texts()]
    first = f"first {NASTY}"
    order = lambda *names: [[name, kind] for kind in ("overall", "man", "woman") for name in names]
    assert rows() == order(first, "second")
    head = page.get_by_role("columnheader", name="R-FaceSim")
    assert head.get_attribute("aria-sort") is None
    for state, names in ("descending", ("second", first)), ("ascending", (first, "second")):
        head.get_by_role("button").click()
        assert head.get_attribute("aria-sort") == state and rows() == order(*names)
    page.get_by_role("button", name="System").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    assert rows() == order("second", first) and page.locator("[aria-sort]").count() == 1
    cells = page.locator("#scores tbody tr").first.locator("td").all_inner_texts()
    assert cells == ["overall", "4", "31.15 ± 1.23", "79.85 ± 1.23", "72.50 ± 1.23", "68.50 ± 1.23", "-7.1%"]
    assert page.locator("#scores tbody").first.locator("b").all_inner_texts() == [
        "31.15",
        "79.85",
        "72.50",
        "68.50",
        "79.85",
        "72.50",
    ]


def test_people_are_sorted(open_page, page_file):
    page = open_page(page_file)
    by_score, by_name = ["woman_2", NASTY, "Борис 王", "woman_10"], [NASTY, "woman_2", "woman_10", "Борис 王"]
    wanted = {
        "failures": ["woman_10", "woman_2", NASTY, "Борис 王"],  # first who has a picture without a face
        "name": by_name,
        "clip-t": [*PEOPLE],
        "clip-i": [*PEOPLE][::-1],
        "facesim": by_score,
        "r-facesim": by_score,
    }
    assert people_of(page) == wanted["failures"]
    assert [option.get_attribute("value") for option in page.locator("#sort option").all()] == [*wanted]
    for key, names in wanted.items():
        page.select_option("#sort", key)
        assert people_of(page) == names, key
        page.locator("#direction").click()
        assert people_of(page) == names[::-1], key


def test_filters(open_page, page_file):
    page = open_page(page_file)
    page.get_by_label("Class").select_option("man")
    assert people_of(page) == [NASTY, "Борис 王"]
    page.get_by_role("searchbox").fill("бор")
    assert people_of(page) == ["Борис 王"] and page.get_by_role("status").inner_text() == "1 of 4 people"
    page.get_by_label("Class").select_option("woman")
    assert people_of(page) == []


def test_a_system_can_be_chosen(open_page, page_file):
    page, found = open_page(page_file), content(page_file)
    for k in (1, 0):
        page.get_by_label("System").select_option(str(k))
        for name in PEOPLE:
            wanted = [
                found["images"][row["image"]]
                for row in found["systems"][k]["pictures"]
                if row["person"] == name
            ]
            card = page.locator("article").nth(people_of(page).index(name))
            assert [img.get_attribute("src") for img in card.locator(".shot img").all()] == wanted
            assert card.locator("h3").text_content() == name
            assert card.locator(".sheet thead").text_content() == "promptseed 9seed 10seed 11"
            assert (
                card.locator(".reference").get_attribute("src") == found["images"][found["photos"][name][0]]
            )
            assert card.locator(".photos img").count() == 2
    assert page.locator("article b, article i").count() == 0  # names and prompts are text


def test_scores_of_a_picture_for_pointer_keyboard_and_screen_reader(open_page, page_file):
    page = open_page(page_file)
    assert page.get_by_label("System").input_value() == "1"  # the last; the first is often the base model
    page.get_by_label("System").select_option("0")
    card, tip = page.locator("article").first, page.locator("#tip")
    failed = card.get_by_role("button", name="No face found")
    scores = "CLIP-T 30.10. CLIP-I 79.90. FaceSim 95.00. R-FaceSim 90.00"
    text = f"Prompt 01: a woman <i>no. 1</i>. Seed 11. {scores}. No face found"
    assert failed.locator("img").get_attribute("alt") == text
    assert page.locator(".failed").count() == 1 and "1 of 6 without a face" in card.inner_text()
    assert tip.is_hidden()
    failed.hover()
    assert tip.is_visible() and "R-FaceSim 90.00\nNo face found" in tip.inner_text()
    page.locator("h1").hover()
    assert tip.is_hidden()
    page.get_by_role("searchbox").focus()
    page.keyboard.press("Tab")  # one stop per person
    for key in ("ArrowLeft", "ArrowRight", "ArrowDown", "ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
    assert failed.evaluate("node => node === document.activeElement")
    page.wait_for_timeout(50)  # for the scrolling that focus may cause
    assert tip.is_visible() and "Seed 11" in tip.inner_text()
    page.keyboard.press("Escape")
    assert tip.is_hidden()
    page.keyboard.press("Tab")
    assert (
        page.locator("article")
        .nth(1)
        .locator(".shot")
        .first.evaluate("node => node === document.activeElement")
    )


def test_remarks_curves_and_text(open_page, page_file, files):
    page = open_page(page_file)
    page.get_by_text("no face found: 2").click()
    assert page.locator("#remarks li").all_inner_texts() == [
        f"first {NASTY} (1): {files[11]}",
        f"second (1): {files[35]}",
    ]
    page.get_by_text("The scores as text").click()
    assert page.locator("#text pre").inner_text() == f"| the table {NASTY} |"
    assert page.locator("#curves img").is_visible()


@pytest.mark.parametrize("width", [400, 1600])
def test_the_page_never_scrolls_sideways(open_page, page_file, width):
    page = open_page(page_file, width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = [label.bounding_box() for label in page.locator("#tools > :visible").all()]
    for k, a in enumerate(boxes):  # and no control lies on another
        for b in boxes[:k]:
            assert (
                a["y"] >= b["y"] + b["height"]
                or a["x"] >= b["x"] + b["width"]
                or b["y"] >= a["y"] + a["height"]
            )


def test_one_system_of_one_metric(open_page, files, tmp_path):
    scores = make_scores(files, metrics=("clip-t",))
    scores["pictures"].pop(1)
    for row in scores["pictures"]:
        del row["faces"]
    scores["people"]["woman_2"]["clip-t"] = None
    report.write_report(tmp_path / "report.html", {"only": scores})
    page = open_page(tmp_path / "report.html")
    assert page.get_by_label("System").is_hidden() and page.locator("#curves").is_hidden()
    assert page.locator("#scores b").count() == 0 and page.locator("#scores tbody").count() == 1
    assert page.locator("thead").first.inner_text().split() == ["System", "Class", "People", "CLIP-T"]
    for _ in range(2):  # who has no score comes last, up and down
        assert people_of(page)[-1] == "woman_2"
        page.locator("#direction").click()
    assert page.get_by_label("missing").count() == 1
    page.locator("article").last.locator(".shot").first.focus()
    page.keyboard.press("ArrowRight")  # over the gap
    assert "Seed 11" in page.locator("#tip").inner_text()
