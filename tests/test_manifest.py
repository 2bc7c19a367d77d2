"""The scan finds and names every fault in a data set; the manifest lists what is left."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from people import manifest
from people.crops import common_shape
from people.manifest import Manifest, scan_photos
from people.photos import read_photo
from run.files import atomic
from run.terminal import printable

NAMES = ("アンナ", "Ольга", "أمل", "Zoë", "a..\\..", "a b'c\"d;$(rm -rf x)", "line\nbreak", "esc\x1b[31m")
NAMES += ("\udcff\udcfe",)  # bytes that are no UTF-8


def noise(seed: int, size: tuple[int, int] = (64, 48), mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def make_person(folder: Path, photos: int = 3, seed: int = 0) -> Path:
    folder.mkdir(parents=True)
    for k in range(photos):
        noise(seed * 100 + k).save(folder / f"{k}.png")
    return folder


def look(folder: Path, out: Path | None = None, **options):
    out = out or folder.parent / "out"
    out.mkdir(exist_ok=True)
    usable = lambda size: common_shape(size, 32, 8)
    return scan_photos(folder, out / "people.jsonl", usable, min_side=options.pop("min_side", 8), **options)


def reasons(report) -> dict[str, list[str]]:
    return {f"{verdict}: {reason}": cases for (verdict, reason), cases in report.findings.items()}


def test_clean_data_has_nothing_to_report(tmp_path):
    for k, name in enumerate(("bea", "abe")):
        (make_person(tmp_path / "ids" / name, seed=k) / "1.txt").write_text("a man\n in  Köln", "utf-8")
    people, report = look(tmp_path / "ids")
    assert (report.people, report.photos, report.table()) == (2, 6, "")
    assert [person.name for person in people] == ["abe", "bea"] and [p.pid for p in people] == [0, 1]
    photo = people[1].photos[1]
    assert (photo.path, photo.size, photo.caption) == (tmp_path / "ids/bea/1.png", (48, 64), "a man in Köln")
    assert people[1].photos[0].caption is None


def messy(folder: Path) -> Path:
    """Write one person with every fault there is, and one without."""
    make_person(folder / "good", seed=1)
    bad = make_person(folder / "messy")
    turned = Image.Exif()
    turned[0x0112] = 6
    noise(10).save(bad / "turned.jpg", exif=turned)
    noise(11, mode="CMYK").save(bad / "cmyk.jpg")
    noise(12, mode="RGBA").save(bad / "clear.png")
    Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64) * 16).save(bad / "deep.png")
    noise(13).save(bad / "moving.webp", save_all=True, append_images=[noise(14)], lossless=True)
    content = (folder / "good" / "0.png").read_bytes()
    (bad / "half.png").write_bytes(content[: len(content) // 2])
    (bad / "empty.jpg").write_bytes(b"")
    (bad / "text.jpg").write_text("hello")
    noise(15, (7, 40)).save(bad / "thin.png")
    noise(16, (4, 4)).save(bad / "tiny.png")
    shutil.copy(bad / "1.png", bad / "1 copy.png")
    (bad / "folder.jpg").mkdir()
    (bad / "nowhere.png").symlink_to("missing.png")
    (bad / "circle.png").symlink_to("circle.png")
    os.mkfifo(bad / "pipe.png")
    (bad / "phone.heic").write_bytes(b"0")
    (bad / "0.txt").write_bytes(b"")
    (bad / "2.txt").write_bytes("Köln".encode("latin-1"))
    (bad / "turned.txt").write_text("a \x1b[31mred\x00 man")
    (bad / "loop").symlink_to("..")
    return folder


EXPECTED = {
    "converted: turned upright by its EXIF data": {"turned.jpg"},
    "converted: CMYK colours: converted to RGB": {"cmyk.jpg"},
    "converted: transparent: put on white": {"clear.png"},
    "converted: 16 bits a channel: reduced to 8": {"deep.png"},
    "converted: animated: only the first frame is used": {"moving.webp"},
    "converted: no caption that can be read: the default one is used": {"0.png", "2.png"},
    "skipped: photos that cannot be read": {
        *("half.png", "empty.jpg", "text.jpg", "nowhere.png", "circle.png", "pipe.png")
    },
    "skipped: too small (--min-side 8) or too narrow": {"thin.png", "tiny.png"},
    "skipped: the same as another of the same person": {"1.png"},
    "skipped: photos in formats that are not read: export them as JPEG": {"phone.heic"},
    "skipped: links to folders": {"loop"},
}


def test_every_fault_in_one_report(tmp_path):
    people, report = look(messy(tmp_path / "ids"))
    found = reasons(report)
    named = {key: {case.split("/")[1].split(":")[0] for case in cases} for key, cases in found.items()}
    assert named == EXPECTED
    assert [len(person.photos) for person in people] == [3, 8]
    captions = {photo.path.name: photo.caption for photo in people[1].photos}
    assert captions["turned.jpg"] == "a [31mred man" and captions["0.png"] is captions["2.png"] is None
    assert dict((photo.path.name, photo.size) for photo in people[1].photos)["turned.jpg"] == (64, 48)
    table = report.table()
    assert "6  photos that cannot be read" in table and "and 3 more" in table


def test_where_captions_are_from(tmp_path, capsys):
    anna, boris = (
        make_person(tmp_path / "ids" / "anna", 3),
        make_person(tmp_path / "ids" / "boris", 3, seed=1),
    )
    (anna / "0.txt").write_text("a woman")
    (anna / "1.CAPTION").write_text("a woman")
    (anna / "2.json").write_text("{}")
    (boris / "1.txt").write_text("a man")
    (boris / "2.png").write_bytes(b"")  # this photo is not used
    (boris / "2.txt").write_text("a man")
    (tmp_path / "ids" / "metadata.jsonl").write_text('{"file_name": "boris/0.png", "text": "a man"}')
    people, report = look(tmp_path / "ids")
    report.tell(tmp_path / "ids", tmp_path / "data.tsv", strict=False)
    assert "captions for 4 of 5 photos, from .caption and .txt and metadata\n" in capsys.readouterr().out
    assert reasons(report)["skipped: JSON files without a caption"] == ["anna/2.json"]
    assert [photo.caption for photo in people[1].photos] == ["a man", "a man"]
    make_person(tmp_path / "none" / "anna", 3)
    look(tmp_path / "none")[1].tell(tmp_path / "none", tmp_path / "data.tsv", strict=False)
    assert "captions for 0 of 3 photos\n" in capsys.readouterr().out


def test_folders_of_other_programs(tmp_path):
    """kohya's names, ai-toolkit's caches, OneTrainer's masks, copies by Jupyter, what systems leave."""
    anna = make_person(tmp_path / "ids" / "20_anna woman", 3)
    for k, name in enumerate(("_latent_cache", ".ipynb_checkpoints", "@eaDir", "2019")):
        make_person(anna / name, 1, seed=k + 5)
    (anna / "_latent_cache" / "0.png").rename(anna / "_latent_cache" / "0_ab12.safetensors")
    (anna / "_latent_cache" / "0_ab12.safetensors").write_bytes(bytes(64))
    (anna / "0.npz").write_bytes(b"PK\3\4")
    noise(9).save(anna / "0-masklabel.png")
    noise(10).save(anna / "IMG_1", "JPEG")
    for name in (".DS_Store", "Thumbs.db", "._0.png"):
        (anna / name).write_bytes(b"0")
    make_person(tmp_path / "ids" / "__MACOSX", 2, seed=20)
    (person,), report = look(tmp_path / "ids")
    assert person.name == "anna" and [str(photo.path.relative_to(anna)) for photo in person.photos] == [
        "0.png", "1.png", "2.png", "IMG_1", "2019/0.png"]  # fmt: skip
    assert all(photo.path.is_file() for photo in person.photos)
    where, cut = "20_anna woman", lambda cases: [case.split("/", 1)[-1].split(":")[0] for case in cases]
    assert {reason: cut(cases) for reason, cases in reasons(report).items()} == {
        "skipped: files that are no photos": ["0.npz", "_latent_cache/0_ab12.safetensors"],
        "skipped: masks": ["0-masklabel.png"],
        "skipped: hidden files and folders": [".ipynb_checkpoints"],
        "noted: photos in folders below a person's are used": [where],
        "noted: people by names of kohya's form": [where],
    }
    noted = reasons(report)["noted: people by names of kohya's form"]
    assert noted == ["20_anna woman: anna; 20 repeats and the class woman are ignored"]
    assert list(look(tmp_path / "ids")[0]) == [person]  # from the manifest


def test_people_who_are_left_out(tmp_path):
    ids = tmp_path / "ids"
    make_person(ids / "anna", photos=3)
    shutil.copytree(ids / "anna", ids / "anna again")
    (ids / "linked").symlink_to("anna")
    make_person(ids / "few", photos=1, seed=2)
    make_person(ids / "none", photos=0)
    shares = make_person(ids / "shares", photos=2, seed=3)
    shutil.copy(ids / "anna" / "0.png", shares / "both.png")
    people, report = look(ids, min_photos=2)
    assert [person.name for person in people] == ["anna", "shares"]
    assert reasons(report) == {
        "left out: people with the photos of another": ["anna again: as anna", "linked: as anna"],
        "left out: people with too few photos": [
            f"{name}: {count}, at least 2 are needed" for name, count in (("few", 1), ("none", 0))
        ],
        "noted: people who share photos": ["shares: 1 with anna"],
    }


def test_nobody_left_and_wrong_levels(tmp_path):
    make_person(tmp_path / "ids" / "anna", photos=1)
    with pytest.raises(ValueError, match="has nobody to train on(.|\n)*anna: 1, at least 2"):
        look(tmp_path / "ids", min_photos=2)
    with pytest.raises(ValueError, match="a level too low"):
        look(tmp_path / "ids" / "anna", tmp_path)


def test_names_in_any_script_reach_the_terminal_in_print(tmp_path, capsys):
    for k, name in enumerate(NAMES):
        (make_person(tmp_path / "ids" / name, seed=k) / "0.png").write_bytes(b"\x1b[31m")
    people, report = look(tmp_path / "ids")
    assert sorted(person.name for person in people) == sorted(NAMES)
    assert all(person.photos[0].path.is_file() for person in people)
    report.tell(tmp_path / "ids", tmp_path / "data.tsv", strict=False)
    assert list((tmp_path / "out").iterdir()) == [tmp_path / "out" / "people.jsonl"]
    written = (tmp_path / "data.tsv").read_text("utf-8")
    assert written.count("\n") == len(NAMES) and "アンナ" in written
    for text in (capsys.readouterr().out, written):
        assert all(char.isprintable() or char in "\n\t" for char in text)


@given(st.text())
def test_printable(text):
    assert printable(text).isprintable() and printable("Zoë アンナ") == "Zoë アンナ"


def test_strict(tmp_path):
    _, report = look(messy(tmp_path / "ids"))
    with pytest.raises(ValueError, match="--strict(.|\n)*tiny.png(.|\n)*data.tsv"):
        report.tell(tmp_path / "ids", tmp_path / "data.tsv", strict=True)
    assert (tmp_path / "data.tsv").read_text().count("\n") == 18


def test_only_what_has_changed_is_read_again(tmp_path, monkeypatch):
    read, examine = [], manifest.examine
    monkeypatch.setattr(manifest, "examine", lambda path: read.append(path.name) or examine(path))
    ids = messy(tmp_path / "ids")
    people, report = look(ids)
    first, contents = list(people), people.contents()
    assert len(read) == 3 + 18
    read.clear()
    again = look(ids)
    refused = EXPECTED["skipped: photos that cannot be read"] | {"phone.heic"}
    assert set(read) == refused  # they are tried again
    assert again[1] == report and list(again[0]) == first
    path = ids / "good" / "1.png"
    old = path.stat()
    content = path.read_bytes()
    other = noise(99)
    other.save(path)
    path.write_bytes(path.read_bytes()[: len(content)].ljust(len(content), b"\0"))
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))  # as long and as old as before
    read.clear()
    changed = look(ids)
    assert "1.png" in read and len(read) == 8
    assert changed[0].contents()["photos of good"] != contents["photos of good"]
    assert changed[0].contents()["photos of messy"] == contents["photos of messy"]
    (ids / "messy" / "3.txt").write_text("of no photo")
    (ids / "good" / "2.txt").write_text("a new caption")
    assert look(ids)[0][0].photos[2].caption == "a new caption"
    assert len(read) == 15


def test_a_memory_of_another_version_or_damaged_is_not_used(tmp_path, monkeypatch):
    read, examine = [], manifest.examine
    monkeypatch.setattr(manifest, "examine", lambda path: read.append(path.name) or examine(path))
    for k in range(4):
        make_person(tmp_path / "ids" / str(k), seed=k, photos=2)
    file = tmp_path / "out" / "people.jsonl"
    first = list(look(tmp_path / "ids")[0])
    lines = file.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b'"digest": "', b'"digest": "0')
    lines[2] = b"\xff\xfe\n"
    read.clear()
    file.write_bytes(b"".join(lines)[:-30])
    assert list(look(tmp_path / "ids")[0]) == first and len(read) == 6
    monkeypatch.setattr(manifest, "VERSION", 99)
    assert list(look(tmp_path / "ids")[0]) == first and len(read) == 6 + 8


def test_a_manifest_takes_no_memory_for_photos(tmp_path):
    for k in range(3):
        make_person(tmp_path / "ids" / str(k), seed=k)
    people, _ = look(tmp_path / "ids")
    assert isinstance(people, Manifest) and vars(people).keys() == {"file", "root", "starts"}
    assert len(people.starts) == 3 and all(isinstance(start, int) for start in people.starts)


@pytest.mark.parametrize("error", [MemoryError, NameError, TypeError])
def test_bugs_and_lack_of_memory_end_the_scan(tmp_path, monkeypatch, error):
    """They say nothing about the photo, so it must not be skipped; the manifest of the last scan stays."""
    make_person(tmp_path / "ids" / "anna")
    look(tmp_path / "ids")
    file = tmp_path / "out" / "people.jsonl"
    before = file.read_bytes()
    (tmp_path / "ids" / "anna" / "3.png").write_bytes((tmp_path / "ids" / "anna" / "2.png").read_bytes())

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(manifest, "decode_photo", fail)
    with pytest.raises(error):
        look(tmp_path / "ids")
    assert file.read_bytes() == before and list(file.parent.iterdir()) == [file]


# Lists, folders one level down, and limits


def write_list(ids: Path, file: Path) -> Path:
    """Write a list of all photos in folders of people."""
    file.parent.mkdir(exist_ok=True)
    paths = sorted(ids.glob("*/*.png"), reverse=True)
    file.write_text("".join(f"{os.path.relpath(path, file.parent)}\t{path.parent.name}\n" for path in paths))
    return file


def content_of(people: Manifest) -> list:
    """Return the people with their photos, whose paths may be written in several ways."""
    resolved = lambda photo: dataclasses.replace(photo, path=photo.path.resolve())
    return [(person.pid, person.name, *map(resolved, person.photos)) for person in people]


def test_a_list_is_as_good_as_folders(tmp_path, monkeypatch):
    for k, name in enumerate(("bea", "abe")):
        (make_person(tmp_path / "ids" / name, seed=k) / "1.txt").write_text(f"a photo of {name}")
    file = write_list(tmp_path / "ids", tmp_path / "lists" / "people.tsv")
    folders, of_folders = look(tmp_path / "ids")
    listed, of_list = look(file, tmp_path / "other")
    assert of_folders == of_list and not of_list.findings and not of_list.remarks
    assert content_of(folders) == content_of(listed) and folders.contents() == listed.contents()
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0] + "\tanother caption", *lines[1:]]))
    monkeypatch.setattr(manifest, "examine", lambda path: pytest.fail(f"{path} is read again"))
    changed, _ = look(file, tmp_path / "other")
    differ = [key for key, value in changed.contents().items() if value != folders.contents()[key]]
    assert differ == ["photos of bea"]
    file.write_text("\n".join(lines[1:]))
    assert look(file, tmp_path / "other")[1].photos == 5


def test_faults_of_a_list_are_reported(tmp_path):
    ids = tmp_path / "ids"
    make_person(ids / "abe")
    shutil.copy(ids / "abe" / "0.png", ids / "copy.png")
    noise(9, (4, 4)).save(ids / "tiny.png")
    (ids / "notes.pdf").write_bytes(b"%PDF")
    (ids / "unlisted.png").write_bytes(b"")
    names = [
        "abe/0.png",
        "abe/1.png",
        "copy.png",
        "tiny.png",
        "notes.pdf",
        "gone.png",
        str(tmp_path / "x.png"),
    ]
    lines = [f"{name},abe" for name in names] + ["abe/1.png,bea", "none.jpg,cid"]
    (ids / "list.csv").write_text("\n".join(lines))
    people, report = look(ids / "list.csv")
    assert [(person.name, len(person.photos)) for person in people] == [("abe", 2)]
    assert {reason: [case.split(": ")[0] for case in cases] for reason, cases in reasons(report).items()} == {
        "skipped: photos that cannot be read": [f"{tmp_path}/x.png", "gone.png", "none.jpg"],
        "skipped: too small (--min-side 8) or too narrow": ["tiny.png"],
        "skipped: files that are no photos": ["notes.pdf"],
        "skipped: the same as another of the same person": ["copy.png"],
        "left out: people with too few photos": ["cid"],
        "left out: people with the photos of another": ["bea"],
    }
    with pytest.raises(ValueError, match="--strict(.|\n)*gone.png: no such file"):
        report.tell(ids / "list.csv", tmp_path / "data.tsv", strict=True)


def test_people_one_level_down(tmp_path, capsys):
    for k, name in enumerate(("identity_007", "identity_002")):
        make_person(tmp_path / "ids" / "images" / name, seed=k)
    people, report = look(tmp_path / "ids")
    assert [person.name for person in people] == ["identity_002", "identity_007"]
    report.tell(tmp_path / "ids", tmp_path / "data.tsv", strict=True)  # it is no fault
    assert "\neach folder in images is a person\n" in capsys.readouterr().out
    direct, _ = look(tmp_path / "ids" / "images", tmp_path / "other")
    assert people.contents() == direct.contents() and list(people) == list(direct)
    (tmp_path / "ids" / "images" / "identity_002" / "0.png").write_bytes(b"")
    _, report = look(tmp_path / "ids")
    (case,) = reasons(report)["skipped: photos that cannot be read"]
    assert case.startswith("images/identity_002/0.png: ")


def test_limits(tmp_path, capsys):
    for k, name in enumerate(("abe", "bea", "cid", "dan")):
        make_person(tmp_path / "ids" / name, photos=4 if name != "bea" else 1, seed=k)
    (tmp_path / "ids" / "abe" / "0.png").write_bytes(b"")
    (tmp_path / "ids" / "dan" / "0.png").write_bytes(b"")  # not looked at
    people, report = look(tmp_path / "ids", min_photos=3, max_people=2, max_photos=2)
    names = {person.name: [photo.path.name for photo in person.photos] for person in people}
    assert names == {"abe": ["1.png", "2.png"], "cid": ["0.png", "1.png"]}
    assert (report.people, report.photos) == (2, 4)
    report.tell(tmp_path / "ids", tmp_path / "data.tsv", strict=False)
    said = capsys.readouterr().out
    assert "2 people, 4 photos" in said and "captions for 0 of 4 photos" in said
    assert "--max-people 2: the last 1 of 4 people by name are left out\n" in said
    assert "--max-photos 2: 3 good photos are left out\n" in said
    assert not any("dan" in case for cases in report.findings.values() for case in cases)
    people, report = look(tmp_path / "ids", min_photos=3, max_people=3, max_photos=4)
    assert (report.people, report.photos, report.remarks) == (3, 10, [])


# Anything at all


@pytest.fixture(scope="module")
def pictures() -> dict[str, bytes]:
    folder = Path(os.environ.get("TMPDIR", "/tmp"))
    contents = {}
    for name, options in {
        "a.png": {},
        "a.jpg": {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"},
        "a.webp": {"save_all": True, "append_images": [noise(2)]},
    }.items():
        with atomic(folder / f"manifest-{os.getpid()}-{name}") as temporary:
            noise(1).save(temporary, **options)
            contents[name] = temporary.read_bytes()
            temporary.write_bytes(b"")
        (folder / f"manifest-{os.getpid()}-{name}").unlink()
    return contents


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.sampled_from(["a.png", "a.jpg", "a.webp"]),
    st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=4)), max_size=6),
    st.floats(0, 1),
    st.binary(max_size=40) | st.none(),
)
def test_damaged_photos_and_captions(tmp_path, pictures, name, changes, end, caption):
    """A photo is used or refused, with a reason; nothing is raised, and nothing written but the manifest."""
    ids, out = tmp_path / "ids", tmp_path / "out"
    shutil.rmtree(ids, ignore_errors=True)
    make_person(ids / "good", photos=1)
    bad = make_person(ids / "bad", photos=0)
    content = bytearray(pictures[name])
    for place, junk in changes:
        at = int(place * (len(content) - 1))
        content[at : at + len(junk)] = junk
    (bad / name).write_bytes(content[: int(end * len(content)) if changes else None])
    if caption is not None:
        (bad / "a.txt").write_bytes(caption)
    before = {path: path.read_bytes() for path in ids.rglob("*") if path.is_file()}
    people, report = look(ids, out)
    assert report.photos == sum(len(person.photos) for person in people) in (1, 2)
    assert report.photos == 2 or any(verdict == "skipped" for verdict, _ in report.findings)
    assert {path: path.read_bytes() for path in ids.rglob("*") if path.is_file()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"ids", "out"}
    assert [path.name for path in out.iterdir()] == ["people.jsonl"]
    assert report.table() == "" or all(line.isprintable() for line in report.table().split("\n"))
    for person in people:
        for photo in person.photos:
            assert photo.caption is None or photo.caption.split()
            assert read_photo(photo.path).size == photo.size[::-1]
    json.dumps(people.contents())
