"""The user study: tables by hand, blinding, balance, wrong input, and the page in a headless browser."""

import json
import math
import random
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from metaphd import user_study
from scoring.intervals import student

SYSTEMS = ("alpha", "beta", "gamma")
PEOPLE = ("woman_anna", "man_boris", "woman_clara", "man_dan")
COLUMNS = {1: ("Overall", "Multi-ref.", "Single-ref."), 2: ("Overall", "Recontextualised", "Stylistic")}


def write_picture(path: Path, colour: tuple, secret: str, side: int = 24) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    chunks = PngInfo()
    chunks.add_text("lora", secret)
    Image.new("RGB", (side, side), colour).save(path, pnginfo=chunks)


def write_world(root: Path, seeds: int = 3, photos: int = 5, people=PEOPLE, systems=SYSTEMS) -> Path:
    """Write prompts, photos and pictures: a colour for each person and prompt, the same for every system."""
    for k, person in enumerate(people):
        for n in range(photos):
            write_picture(root / "photos" / person / f"{n}.png", (50 * k, 40 * n, 99), person, side=40)
        for prompt in range(4):
            for seed in range(seeds):
                for number, system in enumerate(systems):
                    path = root / system / person / f"{prompt:02d}_words" / f"{seed}.png"
                    write_picture(
                        path, (50 * k, 50 * prompt, 80 * seed), f"{system}.safetensors", 24 + number
                    )
    (root / "prompts.txt").write_text(
        "\n".join(f'a [man/woman] </script> & "{n}" ü' for n in range(4)), "utf-8"
    )
    return root


def make(
    root: Path, *more: str, out: str = "study", systems=SYSTEMS, questions: int = 16
) -> tuple[dict, dict]:
    """Run `make`; return what the page holds, and the key."""
    named = [f"{name}={root / name}" for name in systems]
    files = ["--people", str(root / "photos"), "--prompts", str(root / "prompts.txt")]
    folder = ["--out", str(root / out), "--questions", str(questions)]
    user_study.main(["make", "--systems", *named, *files, *folder, *more])
    html = (root / out / "page" / "index.html").read_text("utf-8")
    page = json.loads(re.search(r'<script id="study"[^>]*>(.*?)</script>', html)[1])
    return page, json.loads((root / out / "key.json").read_text("utf-8"))


def answer(root: Path, name: str, choose, out: str = "study", **changes) -> Path:
    """Write a participant's file: choose(kind, k) names the system for the k-th of a kind, or None."""
    key = json.loads((root / out / "key.json").read_text("utf-8"))
    answers, count = [], Counter()
    for question, entry in key["questions"].items():
        system = choose(entry["kind"], count[entry["kind"]])
        count[entry["kind"]] += 1
        if system:
            choice = next(option for option, shown in entry["options"].items() if shown == system)
            answers.append({"question": question, "choice": choice, "seconds": 2.5})
    path = root / f"{name}.json"
    path.write_text(json.dumps({"study": key["study"], "participant": name, "answers": answers} | changes))
    return path


def tally(root: Path, *files: Path, out: str = "study") -> list[dict]:
    user_study.main(["tally", "--study", str(root / out), *map(str, files)])
    return list(json.loads((root / out / "tally.json").read_text())["tables"].values())


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = write_world(tmp_path_factory.mktemp("study"))
    make(root)
    return root


@pytest.fixture
def key(world) -> dict:
    return json.loads((world / "study" / "key.json").read_text("utf-8"))


def test_what_is_asked(world, key):
    """Four kinds in equal number; what each shows, and beside which photos."""
    questions = list(key["questions"].values())
    kinds = ("multi-reference", "single-reference", "recontextualised", "stylistic")
    assert Counter(q["kind"] for q in questions) == dict.fromkeys(kinds, 4)
    for question in questions:
        kind, part2 = question["kind"], question["kind"] in kinds[2:]
        assert sorted(question["options"].values()) == list(SYSTEMS[:2] if part2 else SYSTEMS)
        assert len(set(question["seeds"])) == (3 if part2 else 1)
        names = [Path(path).name for path in question["references"]]
        if kind == "multi-reference":
            assert len(set(names)) == 3 and "0.png" not in names
        else:
            assert names == ["0.png"]
        assert all(Path(path).parent.name == question["person"] for path in question["references"])
        if part2:
            assert (question["prompt"] in ("02", "03")) == (kind == "stylistic")
        word = "woman" if question["person"].startswith("woman") else "man"
        assert question["text"] == f'a {word} </script> & "{int(question["prompt"])}" ü'


def test_people_and_prompts_are_balanced(key):
    questions = list(key["questions"].values())
    for kind in {q["kind"] for q in questions}:
        own = [q for q in questions if q["kind"] == kind]
        assert set(Counter(q["person"] for q in own).values()) == {1}
        assert max(Counter(q["prompt"] for q in own).values()) == (1 if "reference" in kind else 2)
    part1 = [(q["person"], q["prompt"]) for q in questions if "reference" in q["kind"]]
    assert len(set(part1)) == 8, "a scene comes up twice although others were free"


def test_choosing_exhausts_the_pictures_before_it_stops():
    seeds = {(person, prompt): ["0", "1"] for person in "ab" for prompt in ("00", "01", "02")}
    chosen = user_study.choose_questions(seeds, 12, 1, Counter(), random.Random(0))
    assert len({(person, prompt, *some) for person, prompt, some in chosen}) == 12
    with pytest.raises(ValueError, match="--questions 52: 13 of each kind .* make 12 with 1 seed each"):
        user_study.choose_questions(seeds, 13, 1, Counter(), random.Random(0))


def test_the_page_is_blind(world, key):
    page = world / "study" / "page"
    assert sorted(path.name for path in page.iterdir()) == ["index.html", "pictures"]
    html = (page / "index.html").read_text("utf-8")
    for secret in (*SYSTEMS, *PEOPLE, str(world), "seed", "recontext", "safetensors", "key.json", "_words"):
        assert secret not in re.sub(r"since|seeds mulberry32", "", html), secret
    pictures = sorted((page / "pictures").iterdir())
    assert len(pictures) > 50 and all(re.fullmatch(r"[0-9a-f]{16}\.jpg", path.name) for path in pictures)
    sizes = set()
    for path in pictures:
        with Image.open(path) as image:
            assert not set(image.info) - {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
            assert not image.getexif()
            sizes.add(image.size)
        assert not any(word.encode() in path.read_bytes() for word in (*SYSTEMS, *PEOPLE))
    assert sizes == {(24, 24), (40, 40)}, "the systems' sizes differ by design; those of copies must not"


def test_the_same_picture_of_two_systems_has_unlinked_names(world, key):
    """All systems made the same, so bytes agree; no name, and no place in a question, goes with a system."""
    html = (world / "study" / "page" / "index.html").read_text("utf-8")
    page = json.loads(re.search(r'<script id="study"[^>]*>(.*?)</script>', html)[1])
    used, first = [], Counter()
    for question in page["questions"]:
        assert set(question) == {"id", "text", "references", "options"}
        assert all(set(option) == {"id", "pictures"} for option in question["options"])
        used += [name for option in question["options"] for name in option["pictures"]]
        one = {(world / "study" / "page" / o["pictures"][0]).read_bytes() for o in question["options"]}
        assert len(one) == 1
        first[key["questions"][question["id"]]["options"][question["options"][0]["id"]]] += 1
    assert len(used) == len(set(used)), "a file serves two options"
    assert len(first) > 1, "the same system always comes first"
    assert list(key["questions"]) != sorted(key["questions"])


def test_metadata_of_photos_is_stripped(tmp_path):
    path = tmp_path / "photo.jpg"
    exif = Image.Exif()
    exif[0x010E] = "secret of exif"
    image = Image.new("RGB", (30, 20), "red")
    image.save(path, exif=exif, comment=b"secret remark", icc_profile=b"secret profile")
    assert b"secret remark" in path.read_bytes()
    assert b"secret" not in user_study.encode_picture(path, 768)


def test_a_seed_gives_the_same_study(world):
    first, key = make(world, "--seed", "7", out="seven")
    again, same = make(world, "--seed", "7", out="seven-again")
    other, _ = make(world, "--seed", "8", out="eight")
    assert first == again and key["questions"] == same["questions"] and first != other
    assert first["id"] != other["id"]


def test_pictures_are_cut_to_the_smallest_size(tmp_path, capsys):
    write_world(tmp_path)
    write_picture(tmp_path / "gamma/woman_anna/00_words/0.png", (9, 9, 9), "x", side=50)
    write_picture(tmp_path / "gamma/woman_anna/00_words/1.png", (9, 9, 9), "x", side=50)
    page, _ = make(tmp_path, "--size", "16")
    assert "cut and scaled to 24x24" in capsys.readouterr().out
    names = [name for q in page["questions"] for o in q["options"] for name in o["pictures"]]
    sizes = {Image.open(tmp_path / "study" / "page" / name).size for name in names}
    assert sizes == {(16, 16)}


# Tables


def test_tables_by_hand(world):
    """Of three people alpha gets 4, 2, 3 of 4 multi-reference questions and 0, 2, 4 single-reference ones."""
    alpha = {"multi-reference": (4, 2, 3), "single-reference": (0, 2, 4), "recontextualised": (1, 1, 1)}
    files = [
        answer(world, f"p{n}", lambda kind, k: "alpha" if k < alpha.get(kind, (4, 4, 4))[n] else "beta")
        for n in range(3)
    ]
    one, two = tally(world, *files)
    cells = [one["alpha"][column] for column in COLUMNS[1]]
    assert [cell["percent"] for cell in cells] == pytest.approx([62.5, 75.0, 50.0])
    t = 4.302653  # 97.5 % quantile of Student's t with 2 degrees of freedom
    # Shares 1, .5, .75 have a standard deviation of .25; 0, .5, 1 of .5; their means .5, .5, .875 of .21651.
    halves = [t * 21.650635 / math.sqrt(3), t * 25 / math.sqrt(3), t * 50 / math.sqrt(3)]
    assert [cell["ci95"] for cell in cells] == pytest.approx(halves, rel=1e-4)
    assert [one["beta"][column]["percent"] for column in COLUMNS[1]] == pytest.approx([37.5, 25.0, 50.0])
    assert [one["gamma"][column]["percent"] for column in COLUMNS[1]] == [0, 0, 0]
    assert [two["alpha"][column]["percent"] for column in COLUMNS[2]] == pytest.approx([62.5, 25.0, 100.0])
    assert two["alpha"]["Stylistic"]["ci95"] == pytest.approx(0, abs=1e-9) and "gamma" not in two
    text = (world / "study" / "tally.md").read_text()
    assert "3 participants, 48 answers" in text
    assert re.search(r"\| alpha +\| \*\*62.50 ± 53.78\*\* +\| \*\*75.00 ± 62.10\*\* +\| \*\*50.00 ± ", text)
    assert re.search(r"\| beta  +\| 37.50 ± 53.78 +\| 25.00 ± 62.10 +\| \*\*50.00 ± ", text)
    assert re.search(r"\| +\| Overall \(%\) +\| Recontextualised \(%\) +\| Stylistic \(%\) +\|", text)


def test_one_participant_has_no_interval(world):
    one, _ = tally(world, answer(world, "alone", lambda kind, k: "beta"))
    assert one["beta"]["Overall"] == {"percent": 100.0, "ci95": None, "participants": 1}
    assert "±" not in (world / "study" / "tally.md").read_text()


def test_incomplete_answers_count_for_what_they_hold(world, capsys):
    """One answers 2 questions of a kind, 1 for alpha; another 4, all for alpha; a third nothing."""
    single = "single-reference"
    files = [
        answer(world, "few", lambda kind, k: ("alpha", "beta", None, None)[k] if kind == single else None),
        answer(world, "all", lambda kind, k: "alpha"),
        answer(world, "none", lambda kind, k: None),
    ]
    one, _ = tally(world, *files)
    cell = one["alpha"]["Single-ref."]
    residual = (1 - 2 * 5 / 6) * 2 / 6  # of `few`; that of `all` is its opposite
    assert cell["percent"] == pytest.approx(500 / 6) and cell["participants"] == 2
    assert cell["ci95"] == pytest.approx(12.706205 * 100 * abs(residual), rel=1e-3)
    said = capsys.readouterr().out
    assert "incomplete, used for what they hold: 2 of 3" in said
    assert f"{files[0]} (2 of 16), {files[2]} (0 of 16)" in said
    one, _ = tally(world, files[0])
    assert one["alpha"]["Multi-ref."]["percent"] is None and one["alpha"]["Overall"]["percent"] is None
    assert "–" in (world / "study" / "tally.md").read_text()


@pytest.mark.parametrize("freedom, quantile", [(1, 12.7062), (2, 4.30265), (24, 2.06390), (1000, 1.96234)])
def test_students_t_agrees_with_printed_tables(freedom, quantile):
    assert student(freedom) == pytest.approx(quantile, rel=1e-4)


def test_the_interval_agrees_with_resampled_participants():
    """A bootstrap over 300 participants, whose numbers of answers differ."""
    rng = np.random.default_rng(0)
    votes = np.zeros((300, 2, 2), int)
    votes[..., 1] = rng.integers(4, 17, (300, 2))
    votes[..., 0] = rng.binomial(votes[..., 1], rng.beta(2, 3, (300, 1)))
    cell = user_study.share(votes)
    picked = votes[rng.integers(0, 300, (4000, 300))].sum(axis=1)
    means = 100 * (picked[..., 0] / picked[..., 1]).mean(axis=1)
    assert cell["ci95"] == pytest.approx(1.968 * means.std(), rel=0.05)


# Wrong input


@pytest.mark.parametrize(
    "more, message",
    [
        (["--systems", "alpha"], "--systems alpha: should read NAME=DIR"),
        (["--systems", "=x"], "--systems =x: should read NAME=DIR"),
        (["--systems", "a=x", "b=y", "a=z"], "--systems: a is given 2 times"),
        (["--systems", "a=x"], "--systems a=x: needed are two"),
        (["--pair", "alpha", "delta"], "--pair alpha delta: should be two of --systems, alpha, beta, gamma"),
        (["--pair", "alpha", "alpha"], "--pair alpha alpha: should be two"),
        (["--questions", "10"], "--questions 10 must be 4, 8"),
        (["--questions", "0"], "--questions 0 must be 4, 8"),
        (
            ["--questions", "400"],
            "--questions 400: 100 of each kind need more pictures; of one they make 48 with 1 seed",
        ),
        (["--style-prompts", "2-9"], "--style-prompts 2-9: the list ends with number 3"),
        (["--style-prompts", "last"], "--style-prompts last: should read like 10-19"),
        (["--systems", "a=nowhere", "b=x"], "--systems a=nowhere: no such folder"),
    ],
)
def test_wrong_options(world, more, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(world, *more, out="never")
    assert not (world / "never").exists()


def test_a_study_is_never_overwritten(world):
    before = (world / "study" / "key.json").read_bytes()
    with pytest.raises(ValueError, match="is not empty: a study is never overwritten"):
        make(world)
    assert (world / "study" / "key.json").read_bytes() == before


def test_an_interrupted_study_leaves_nothing(world, monkeypatch):
    encode, times = user_study.encode_picture, iter(range(9))

    def interrupted(*args):
        if next(times) == 8:
            raise KeyboardInterrupt
        return encode(*args)

    monkeypatch.setattr(user_study, "encode_picture", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(world, out="broken")
    assert not any((world / "broken").iterdir())
    monkeypatch.undo()
    make(world, out="broken")


def test_nothing_in_common(tmp_path):
    write_world(tmp_path, people=PEOPLE[:1], systems=("alpha",))
    write_picture(tmp_path / "beta" / "someone" / "00" / "0.png", (0, 0, 0), "")
    with pytest.raises(ValueError, match="alpha begins with woman_anna/00/0, beta begins with someone/00/0"):
        make(tmp_path, systems=SYSTEMS[:2])


def test_pictures_that_a_system_lacks_are_left_out(tmp_path, capsys):
    write_world(tmp_path)
    shutil.rmtree(tmp_path / "beta" / "man_dan")
    _, key = make(tmp_path)
    said = capsys.readouterr().out
    assert "alpha: 12 of 48 pictures left out" in said and "gamma: 12 of 48" in said and "beta:" not in said
    assert "man_dan" not in {question["person"] for question in key["questions"].values()}


def test_few_photos(tmp_path, capsys):
    write_world(tmp_path, photos=3)
    _, key = make(tmp_path)
    assert "no multi-reference question): man_boris 2," in capsys.readouterr().out
    multiple = [q for q in key["questions"].values() if q["kind"] == "multi-reference"]
    assert {len(question["references"]) for question in multiple} == {2}
    for photo in ("1.png", "2.png"):
        (tmp_path / "photos" / "man_dan" / photo).unlink()
    _, key = make(tmp_path, out="other")
    people = {q["person"] for q in key["questions"].values() if q["kind"] == "multi-reference"}
    assert "man_dan" not in people
    assert "man_dan" in {question["person"] for question in key["questions"].values()}
    for photo in (tmp_path / "photos").glob("*/[12].png"):
        photo.unlink()
    with pytest.raises(ValueError, match="nobody has a second photo"):
        make(tmp_path, out="third")
    shutil.rmtree(tmp_path / "photos" / "man_dan")
    with pytest.raises(ValueError, match="has no photo of man_dan$"):
        make(tmp_path, out="third")


def test_references_and_styles_as_named(tmp_path):
    write_world(tmp_path)
    (tmp_path / "references.json").write_text(json.dumps({"man_dan": "3.png"}))
    _, key = make(tmp_path, "--references", str(tmp_path / "references.json"), "--style-prompts", "0,3")
    for question in key["questions"].values():
        names = [Path(path).name for path in question["references"]]
        reference = "3.png" if question["person"] == "man_dan" else "0.png"
        assert (reference in names) == (question["kind"] != "multi-reference")
        if question["kind"] in ("stylistic", "recontextualised"):
            assert (question["prompt"] in ("00", "03")) == (question["kind"] == "stylistic")


def test_part_2_is_left_out_with_fewer_than_three_seeds(tmp_path, capsys):
    write_world(tmp_path, seeds=2)
    page, key = make(tmp_path)
    assert (
        "part 2 left out: no recontextualised and no stylistic prompt has 3 seeds" in capsys.readouterr().out
    )
    assert {question["kind"] for question in key["questions"].values()} == {
        "multi-reference",
        "single-reference",
    }
    assert len(tally(tmp_path, answer(tmp_path, "p", lambda kind, k: "beta"))) == 1


def test_wrong_answers(world, tmp_path):
    good = answer(world, "good", lambda kind, k: "alpha")
    saved = json.loads(good.read_text())
    question, other = saved["answers"][:2]
    foreign = [question | {"choice": other["choice"]}]
    cases = {
        "answers the study 0123, not": answer(world, "bad", lambda kind, k: "alpha", study="0123"),
        "choice .*: the study has none such": answer(world, "bad1", lambda kind, k: None, answers=foreign),
        "question nine, choice": answer(
            world, "bad2", lambda kind, k: None, answers=[question | {"question": "nine"}]
        ),
        "twice": answer(world, "bad3", lambda kind, k: None, answers=[question, question]),
        "bad4.json is no whole file": answer(
            world, "bad4", lambda kind, k: None, answers=[{"question": "x"}]
        ),
        "bad5.json is no whole file": answer(world, "bad5", lambda kind, k: None, answers=None),
    }
    for name, content in {"cut": good.read_bytes()[:80], "list": b"[1]", "binary": b"\xff\xfe\x00"}.items():
        cases[f"{name}.json is no whole file"] = tmp_path / f"{name}.json"
        (tmp_path / f"{name}.json").write_bytes(content)
    for message, path in cases.items():
        with pytest.raises(ValueError, match=message):
            tally(world, good, path)
    twin = tmp_path / "twin.json"
    shutil.copy(good, twin)
    with pytest.raises(ValueError, match=re.escape(f"{good} and {twin} are by the same participant")):
        tally(world, good, twin)
    with pytest.raises(FileNotFoundError, match="there is no key.json"):
        tally(world, good, out="elsewhere")


@pytest.mark.parametrize("command", ([], ["make"], ["tally"]))
def test_help_is_a_manual_page(command, capsys):
    with pytest.raises(SystemExit) as stop:
        user_study.main([*command, "--help"])
    said = capsys.readouterr().out
    assert (
        stop.value.code == 0 and "python -m metaphd study" in said and max(map(len, said.splitlines())) <= 120
    )


# The page in a browser

WIDTHS = "all => Promise.all(all.map(image => image.decode().then(() => image.clientWidth)))"


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    if not (program := next(filter(None, map(shutil.which, names)), None)):
        pytest.skip("no Chromium on this machine")
    off = ("quic", "background-networking", "component-update", "sync", "gpu")
    flags = ["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in off)]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, world):
    """Open the page; at the end, fail on errors in it and on anything asked of the network."""
    contexts, wrong = [], []

    def visit(width: int = 1280, script: str = ""):
        context = browser.new_context(viewport={"width": width, "height": 800})
        contexts.append(context)
        if script:
            context.add_init_script(script)
        page = context.new_page()
        page.set_default_timeout(5000)
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("requestfailed", lambda request: wrong.append(f"{request.url}: {request.failure}"))
        page.on("request", lambda request: wrong.append(request.url) if remote(request.url) else None)
        page.goto((world / "study" / "page" / "index.html").as_uri())
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not wrong


def remote(url: str) -> bool:
    return not url.startswith(("file:", "data:", "blob:"))


def find(page, key: dict, system: str) -> int:
    """Return the place, from 1, of a system in the question on show."""
    options = [option for question in page.evaluate("study.questions") for option in question["options"]]
    held = {file: option["id"] for option in options for file in option["pictures"]}
    systems = {option: name for q in key["questions"].values() for option, name in q["options"].items()}
    files = page.locator(".set").evaluate_all("sets => sets.map(set => set.firstChild.getAttribute('src'))")
    return 1 + [systems[held[file]] for file in files].index(system)


def save(page, folder: Path) -> Path:
    with page.expect_download() as download:
        page.click("#save")
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def test_a_robot_that_loves_one_system(visit, world, key, tmp_path):
    """By clicks and keys in turn, with a reload half way, to the exact tables."""
    page = visit()
    page.click("#next")
    for k in range(16):
        assert page.locator("#count").inner_text() == f"{k + 1} of 16"
        assert page.locator("#next").is_disabled()
        assert all(page.locator("#ask img").evaluate_all(WIDTHS)), "a picture is not shown"
        place = find(page, key, "beta")
        if k == 8:
            page.reload()
            assert page.locator("#count").inner_text() == "9 of 16" and find(page, key, "beta") == place
        if k % 2:
            page.locator(".option .set").nth(place - 1).click()
            page.click("#next")
        else:
            page.keyboard.press(str(place))
            page.keyboard.press("Enter")
    assert page.locator("#answered").inner_text() == "You answered 16 of 16 questions."
    path = save(page, tmp_path)
    page.reload()
    assert page.locator("#save").is_visible(), "a reload at the end loses the answers"
    assert json.loads(save(page, tmp_path).read_text()) == json.loads(path.read_text())

    saved = json.loads(path.read_text())
    assert set(saved) == {"study", "participant", "answers"} and re.fullmatch(
        "[0-9a-f]{16}", saved["participant"]
    )
    assert all(set(given) == {"question", "choice", "seconds"} for given in saved["answers"])
    assert all(0 <= given["seconds"] < 60 for given in saved["answers"])
    for number, table in enumerate(tally(world, path), 1):
        for system, row in table.items():
            assert [row[c]["percent"] for c in COLUMNS[number]] == [100.0 * (system == "beta")] * 3

    page.click("#another")
    page.click("#next")
    others = [page.locator("#count").inner_text(), json.loads(page.evaluate("JSON.stringify(state)"))]
    assert others[0] == "1 of 16" and others[1]["participant"] != saved["participant"]
    assert not any(answer["choice"] for answer in others[1]["answers"].values())


def test_orders_differ_between_participants(visit):
    orders = []
    for _ in range(3):
        page = visit()
        orders.append(page.evaluate("order.map(q => [q.id, q.options.map(o => o.id)])"))
        assert sorted(q for q, _ in orders[-1]) == sorted(page.evaluate("study.questions.map(q => q.id)"))
    options = [{question: tuple(names) for question, names in order} for order in orders]
    assert len({tuple(q for q, _ in order) for order in orders}) == 3
    assert options[0] != options[1] and options[1] != options[2]


def test_nothing_is_clicked_through(visit):
    page = visit()
    page.dblclick("#next")
    assert page.locator("#count").inner_text() == "1 of 16" and page.locator("#next").is_disabled()
    page.keyboard.press("Enter")
    page.keyboard.press("9")
    assert page.locator("#count").inner_text() == "1 of 16" and not page.locator(":checked").count()
    page.locator(".option").first.dblclick()
    assert page.locator("#count").inner_text() == "1 of 16" and page.locator(":checked").count() == 1
    page.dblclick("#next")
    assert page.locator("#count").inner_text() == "2 of 16" and page.locator("#next").is_disabled()


def test_going_back_and_changing_ones_mind(visit, tmp_path):
    page = visit()
    page.click("#next")
    assert page.locator("#back").is_hidden()
    page.keyboard.press("1")
    page.keyboard.press("Enter")
    page.click("#back")
    assert page.locator("#count").inner_text() == "1 of 16"
    assert page.locator("#options input").first.is_checked() and page.locator("#next").is_enabled()
    page.keyboard.press("2")
    wanted = page.evaluate("order[0].options[1].id")
    page.click("#stop")
    assert page.locator("#answered").inner_text() == "You answered 1 of 16 questions."
    assert [given["choice"] for given in json.loads(save(page, tmp_path).read_text())["answers"]] == [wanted]
    page.click("#back")
    assert page.locator("#count").inner_text() == "2 of 16"


@pytest.mark.parametrize(
    "script",
    [
        "Object.defineProperty(window, 'localStorage', {get() { throw new Error('denied'); }})",
        "localStorage.getItem = () => '{damaged'",
    ],
)
def test_without_storage_one_can_still_answer(visit, script, tmp_path):
    page = visit(script=script)
    assert page.locator(".unkept").is_visible() == ("denied" in script)
    page.click("#next")
    for _ in range(16):
        page.keyboard.press("1")
        page.keyboard.press("Enter")
    assert len(json.loads(save(page, tmp_path).read_text())["answers"]) == 16


def test_accessible_and_blind_to_a_screen_reader(visit):
    page = visit()
    page.click("#next")
    for _ in range(6):
        assert page.evaluate("document.activeElement.id") == "question"
        texts = page.locator("#ask img").evaluate_all("all => all.map(image => image.alt)")
        assert all(
            re.fullmatch(r"Photo \d of the person|Picture \d|Set \d, picture \d", text) for text in texts
        )
        assert page.get_by_role("radio").count() == page.locator(".option").count() >= 2
        page.keyboard.press("Tab")
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        page.locator(".enlarge").last.click()
        assert page.locator("dialog").is_visible()
        page.keyboard.press("1")
        page.keyboard.press("Escape")
        assert page.locator("dialog").is_hidden() and not page.locator(":checked").count()
        page.get_by_role("radio").first.focus()
        page.keyboard.press("ArrowDown")
        assert page.get_by_role("radio").nth(1).is_checked()
        page.keyboard.press("Enter")


@pytest.mark.parametrize("width", (320, 400, 1280))
def test_no_sideways_scrolling(visit, width):
    page = visit(width)
    for _ in range(16):
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.click("#next")
        assert min(page.locator(".option img").evaluate_all(WIDTHS)) >= (75 if width < 760 else 200)
        page.keyboard.press("1")
    page.click("#next")
    page.click("#save")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
