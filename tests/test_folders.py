"""Folders and lists of people, and captions, are read; wrong layouts are refused."""

import json
import warnings

import pytest
from PIL import Image

from people.faces import known_face
from people.folders import read_caption, scan_people
from people.sources import find_people, read_list


def make_people(folder, **photos):
    for person, names in photos.items():
        (folder / person).mkdir(parents=True)
        for name in names:
            (folder / person / name).write_bytes(b"")


def test_scan_people(tmp_path):
    make_people(tmp_path, bea=["2.jpg", "1.PNG", "1.txt", "faces.json"], abe=["x.webp", "x.txt", ".y.jpg"])
    make_people(tmp_path / ".git", hooks=[])
    (tmp_path / "abe" / "x.txt").write_bytes("\ufeffa man\n  in Köln\n".encode())
    (tmp_path / "bea" / "1.txt").write_text("a woman")
    (tmp_path / "sheet.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="2 hidden .*; 1 files beside the people's folders .sheet.png"):
        abe, bea = scan_people(tmp_path)
    assert (abe.pid, abe.name, bea.pid, bea.name) == (0, "abe", 1, "bea")
    assert [(photo.path.name, photo.caption) for photo in abe.photos] == [("x.webp", "a man in Köln")]
    assert [(photo.path.name, photo.caption) for photo in bea.photos] == [
        ("1.PNG", "a woman"),
        ("2.jpg", None),
    ]


def test_scan_people_says_what_is_wrong_with_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        scan_people(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is empty"):
        scan_people(tmp_path / "empty")
    make_people(tmp_path / "ids", abe=["1.jpg"], bea=["1.jpg", "2.jpg"])
    with pytest.raises(ValueError, match="holds 2 photos; give the folder above"):
        scan_people(tmp_path / "ids" / "bea")
    (tmp_path / "empty").rmdir()
    with pytest.raises(ValueError, match="a level too high.*ids.abe"):
        scan_people(tmp_path)
    make_people(tmp_path / "ids", cid=["1.heic"], dan=[])
    with pytest.raises(ValueError, match=r"2 of 4 people .*\.webp.*: cid, dan"):
        scan_people(tmp_path / "ids")


def test_all_that_is_left_out_is_said(tmp_path):
    litter = [".DS_Store", "Thumbs.db", "._1.jpg", "desktop.ini"]
    make_people(tmp_path, abe=["1.jpg", "a.mov", "b.HEIC", ".c.jpg", "d.txt", "1-masklabel.png", *litter])
    make_people(
        tmp_path, bea=["1.jpg", "2.jpg"], **{"__MACOSX": ["._2.jpg"], "@eaDir": ["1.jpg"], ".cache": []}
    )
    make_people(tmp_path / "abe", **{"@eaDir": ["SYNOPHOTO_THUMB_M.jpg"], ".ipynb_checkpoints": ["1.jpg"]})
    (tmp_path / "abe" / "link").symlink_to("../bea")
    (tmp_path / "Thumbs.db").write_bytes(b"0")
    (tmp_path / "list.csv").write_bytes(b"0")
    with pytest.warns(UserWarning) as warned:
        abe, bea = scan_people(tmp_path)
    assert [photo.path.name for photo in abe.photos] == ["1.jpg"] and len(bea.photos) == 2
    (message,) = (str(warning.message) for warning in warned)
    assert message.splitlines() == [message] and message.endswith(
        "left out are 3 hidden files and folders (.cache, abe/.c.jpg, abe/.ipynb_checkpoints); "
        "1 files beside the people's folders (list.csv); 1 masks (abe/1-masklabel.png); "
        "1 links to folders (abe/link); 1 captions of no photo (abe/d.txt); "
        "1 files that are no photos (abe/a.mov); "
        "1 photos in formats that are not read: export them as JPEG (abe/b.HEIC)"
    )


def test_nothing_is_said_where_all_is_used(tmp_path, recwarn):
    make_people(tmp_path, abe=["1.jpg", "1.txt", "2.png", "2.png.caption", "faces.json", "Thumbs.db"])
    for name in ("1.txt", "2.png.caption"):
        (tmp_path / "abe" / name).write_text("a man")
    scan_people(tmp_path)
    assert not recwarn.list


def test_photos_in_folders_below_belong_to_the_person(tmp_path):
    make_people(tmp_path, abe=["9.jpg"], bea=["1.jpg"])
    make_people(tmp_path / "abe", **{"2019": ["1.jpg", "1.txt"], "2020": ["1.jpg"]})
    (tmp_path / "abe" / "2019" / "1.txt").write_text("a man")
    abe, bea = scan_people(tmp_path)
    assert [(str(photo.path.relative_to(tmp_path)), photo.caption) for photo in abe.photos] == [
        ("abe/9.jpg", None), ("abe/2019/1.jpg", "a man"), ("abe/2020/1.jpg", None)]  # fmt: skip


NFC, NFD = "Zo\u00eb", "Zoe\u0308"


@pytest.mark.parametrize(
    "photo, caption",
    [
        ("1.jpg", "1.txt"),
        ("1.jpg", "1.caption"),
        ("1.jpg", "1.TXT"),
        ("1.JPG", "1.jpg.txt"),
        ("1.png", "1.png.txt"),
        ("1.png.crop.png", "1.png.crop.txt"),
        ("1.v2.png", "1.v2.txt"),
        ("1", "1.txt"),
        (f"{NFC}.png", f"{NFD}.txt"),
        (f"{NFD}.png", f"{NFC}.png.caption"),
    ],
)
def test_names_of_captions(tmp_path, photo, caption):
    (tmp_path / "train.png").mkdir()  # a name that looks like a photo's must not confuse
    Image.new("RGB", (8, 8)).save(tmp_path / "train.png" / photo, "PNG")
    (tmp_path / "train.png" / caption).write_text("a woman")
    (person,) = scan_people(tmp_path)
    assert [(found.path.name, found.caption) for found in person.photos] == [(photo, "a woman")]


def test_of_several_captions_the_nearest_name_counts(tmp_path):
    make_people(tmp_path, abe=["1.jpg", "1.png", "2.png"])
    for name in ("1.txt", "1.caption", "1.png.txt", "2.caption", "2.json"):
        (tmp_path / "abe" / name).write_text(f"{name} has it")
    (abe,) = scan_people(tmp_path)
    assert [photo.caption for photo in abe.photos] == ["1.txt has it", "1.png.txt has it", "2.caption has it"]


@pytest.mark.parametrize(
    "text, caption",
    [
        ('{"caption": "a man", "text": "no"}', "a man"),
        ('{"text": " a man\\n"}', "a man"),
        ('{"prompt": "a man"}', "a man"),
        ('"a man"', "a man"),
        ('{"title": "IMG_1.jpg", "photoTakenTime": {"timestamp": "1"}}', None),  # of Google Takeout
        ('{"caption": ["a man", "a person"]}', None),
    ],
)
def test_captions_in_json(tmp_path, text, caption):
    make_people(tmp_path, abe=["1.jpg"])
    (tmp_path / "abe" / "1.json").write_text(text)
    with warnings.catch_warnings(record=True) as warned:
        assert scan_people(tmp_path)[0].photos[0].caption == caption
    assert [
        str(warning.message).endswith("1 JSON files without a caption (abe/1.json)") for warning in warned
    ] == ([] if caption else [True])


@pytest.mark.parametrize("above", [False, True])
def test_captions_in_metadata(tmp_path, above):
    make_people(tmp_path, abe=["1.jpg", "2.jpg", f"{NFD}.jpg", "2.txt"])
    (tmp_path / "abe" / "2.txt").write_text("from beside the photo")
    place = "abe/" if above else ""
    names = {"1.jpg": "one", "2.jpg": "two", f"{NFC}.jpg": "three"}
    lines = [json.dumps({"file_name": place + name, "text": text}) for name, text in names.items()]
    folder = tmp_path if above else tmp_path / "abe"
    (folder / "metadata.jsonl").write_text("\ufeff" + "\n".join(lines) + "\n", "utf-8")
    (abe,) = scan_people(tmp_path)
    assert [photo.caption for photo in abe.photos] == ["one", "from beside the photo", "three"]


def test_captions_in_a_table(tmp_path):
    make_people(tmp_path, abe=["1.jpg", "2.jpg"])
    (tmp_path / "abe" / "metadata.csv").write_bytes(
        b'file_name,text\r\n1.jpg,"a man, smiling"\r\n3.jpg,none\r\n'
    )
    assert [photo.caption for photo in scan_people(tmp_path)[0].photos] == ["a man, smiling", None]


@pytest.mark.parametrize("content", ["[1, 2]", '{"image": "1.jpg"}', "{", "", '"text"'])
def test_other_metadata_is_named(tmp_path, content):
    make_people(tmp_path, abe=["1.jpg"])
    (tmp_path / "abe" / "metadata.jsonl").write_text(content)
    with pytest.warns(
        UserWarning, match="1 captions that cannot be read .abe/metadata.jsonl: metadata.jsonl"
    ):
        scan_people(tmp_path)


def test_names_of_people(tmp_path):
    names = ["20_anna woman", "3_boris", NFD, "10_cid man", "2_cid man"]
    make_people(tmp_path, **{name: ["1.jpg"] for name in names})
    found = {person.photos[0].path.parent.name: person.name for person in scan_people(tmp_path)}
    assert found == {"20_anna woman": "anna", "3_boris": "3_boris", NFD: NFC, "10_cid man": "10_cid man",
                     "2_cid man": "2_cid man"}  # fmt: skip


def test_captions_must_be_text(tmp_path):
    make_people(tmp_path, abe=["1.jpg", "1.txt"])
    with pytest.raises(ValueError, match="1.txt is empty"):
        scan_people(tmp_path)
    (tmp_path / "abe" / "1.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="1.txt, line 1: byte 0x00 is not UTF-16"):
        scan_people(tmp_path)


# --- Folders one level down --------------------------------------------------------------------------------


def names_and_photos(data):
    """Return the people's names and the paths of their photos."""
    sources = find_people(data)
    photos = lambda person: [photo.relative_to(data).as_posix() for photo in person.contents().photos]
    return {person.name: photos(person) for person in sources.people}, sources


def test_people_in_one_grouping_folder(tmp_path):
    make_people(tmp_path / "images", identity_007=["p_1.jpg", "p_0.jpg"], identity_002=["p_0.jpg"], empty=[])
    make_people(tmp_path, attributes=["ages.txt"])
    (tmp_path / "images" / "preview.pdf").write_bytes(b"")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "images/identity_002/p_0.jpg", "text": "a man"}')
    people, sources = names_and_photos(tmp_path)
    assert people == {
        "empty": [],
        "identity_002": ["images/identity_002/p_0.jpg"],
        "identity_007": ["images/identity_007/p_0.jpg", "images/identity_007/p_1.jpg"],
    }
    assert [person.label for person in sources.people][1] == "images/identity_002"
    assert sources.remark == "each folder in images is a person"
    contents = sources.people[1].contents()
    assert read_caption(contents.photos[0], contents) == ("a man", "metadata")
    unused = [dict(contents.unused) for contents in sources.beside]
    assert unused == [
        {"folders beside those that hold the people's": ["attributes"]},
        {"files beside the people's folders": ["images/preview.pdf"]},
    ]


def test_people_in_several_grouping_folders(tmp_path):
    make_people(tmp_path / "women", bea=["1.jpg"], eve=["1.jpg"])
    make_people(tmp_path / "men", abe=["1.jpg"], dan=["1.jpg"])
    people, sources = names_and_photos(tmp_path)
    assert list(people) == ["abe", "bea", "dan", "eve"]
    assert sources.remark == "each folder in men, women is a person"


def test_a_photo_above_makes_a_folder_a_persons(tmp_path):
    """The same folders, but for one photo."""
    make_people(tmp_path / "women", bea=["1.jpg"], eve=["1.jpg"])
    make_people(tmp_path / "men", abe=["1.jpg"], dan=["1.jpg"])
    (tmp_path / "men" / "0.jpg").write_bytes(b"")
    people, sources = names_and_photos(tmp_path)
    assert list(people) == ["men", "women"] and not sources.remark
    assert people["men"] == ["men/0.jpg", "men/abe/1.jpg", "men/dan/1.jpg"]


def test_a_person_may_have_one_folder_more(tmp_path):
    make_people(tmp_path / "P001", assets=["1.jpg", "2.jpg"])
    make_people(tmp_path / "P002", assets=["1.jpg"])
    people, sources = names_and_photos(tmp_path)
    assert {name: len(photos) for name, photos in people.items()} == {"P001": 2, "P002": 1}
    assert not sources.remark
    (tmp_path / "P002").rename(tmp_path / "P001" / "other")  # now one folder with two
    people, sources = names_and_photos(tmp_path)
    assert list(people) == ["assets", "other"] and sources.remark


def test_nobody_is_guessed(tmp_path):
    make_people(tmp_path / "anna", front=["1.jpg"], side=["1.jpg"])
    make_people(tmp_path / "boris", front=["1.jpg"], back=["1.jpg"])
    with pytest.raises(ValueError, match="is anna/front and boris/front one person, or two.*or a list"):
        find_people(tmp_path)
    (tmp_path / "boris" / "front").rename(tmp_path / "boris" / "left")
    assert len(find_people(tmp_path).people) == 4


# --- Lists -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    "name, lines",
    [
        ("a.tsv", ["path\tperson\tcaption", "b/2.jpg\tbea\ta woman, smiling", "", " 1.jpg \tan abe\t"]),
        ("a.csv", ["Path,Person,Caption", 'b/2.jpg,bea,"a woman, smiling"', "1.jpg, an abe"]),
        ("a.TXT", ["path\tperson", "b/2.jpg\tbea\ta woman, smiling", "1.jpg\tan abe"]),
    ],
)
def test_lists(tmp_path, name, lines, end, mark):
    (tmp_path / name).write_bytes((mark + end.join(lines) + end).encode())
    assert read_list(tmp_path / name) == {"bea": {"b/2.jpg": "a woman, smiling"}, "an abe": {"1.jpg": ""}}


def test_a_list_with_spaces(tmp_path):
    """As CelebA's identity_CelebA.txt."""
    (tmp_path / "a.txt").write_text("000001.jpg 2880\n000002.jpg   2937\n000003.jpg 2880 a man, in  Köln\n")
    assert read_list(tmp_path / "a.txt") == {
        "2880": {"000001.jpg": "", "000003.jpg": "a man, in  Köln"},
        "2937": {"000002.jpg": ""},
    }


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.tsv", "1.jpg\tabe\n2.jpg abe\n", "a.tsv, line 2: '2.jpg abe'; must be path, person .* tabs"),
        ("a.tsv", "\n\n1.jpg\tabe\ta\tb\n", "line 3: '1.jpg', 'abe', 'a', 'b'; must be path"),
        ("a.tsv", "1.jpg\t\n", "line 1: '1.jpg', ''; must be"),
        ("a.tsv", "\tabe\n", "line 1: '', 'abe'; must be"),
        ("a.csv", "1.jpg;abe\n", "line 1: '1.jpg;abe'; must be .* commas"),
        ("a.csv", 'path,person\n1.jpg,"abe\n', "a.csv, line 2: unexpected end of data"),
        ("a.txt", "1.jpg abe\n2.jpg\n", "line 2: '2.jpg'; must be .* spaces or tabs"),
        ("a.txt", "1.jpg abe\n1.jpg bea\n1.jpg abe\n", "line 3: 1.jpg of abe is in the list already"),
        ("a.txt", "1.jpg abe\n./1.jpg abe\n", "line 2: ./1.jpg of abe is in the list already"),
        ("a.tsv", "1\0.jpg\tabe\n", "line 1: a path or person with control characters"),
        ("a.tsv", "path\tperson\n", "a.tsv is empty"),
        ("a.tsv", "", "a.tsv is empty"),
        ("a.jpg", "", "--data .*a.jpg is a file; it may be a list (.tsv, .csv, .txt), or a folder"),
        ("a.tsv", b"1.jpg\tabe\nK\xf6ln.jpg\tabe\n", "a.tsv, line 2: byte 0xf6 is not UTF-8"),
    ],
)
def test_bad_lines_are_errors(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    message = message.replace("(", "[(]").replace(")", "[)]")
    with pytest.raises(ValueError, match=message):
        find_people(tmp_path / name)


def test_only_the_first_line_may_be_a_header(tmp_path):
    (tmp_path / "a.tsv").write_text("1.jpg\tabe\npath\tperson\n")
    assert read_list(tmp_path / "a.tsv") == {"abe": {"1.jpg": ""}, "person": {"path": ""}}


def test_captions_of_a_list(tmp_path):
    """The list's, then files beside the photo, then metadata; photos may be anywhere."""
    make_people(tmp_path / "ids", abe=["1.jpg", "1.txt", "2.jpg", "2.txt", "3.jpg", "4.jpg"], bea=["1.jpg"])
    for name in ("1.txt", "2.txt"):
        (tmp_path / "ids" / "abe" / name).write_text(f"from {name}")
    (tmp_path / "ids" / "abe" / "metadata.jsonl").write_text('{"file_name": "3.jpg", "text": "metadata"}')
    (tmp_path / "ids" / "bea" / "metadata.jsonl").write_text("{")
    make_people(tmp_path, lists=[])
    paths = [f"../ids/abe/{k}.jpg" for k in (4, 3, 2, 1)] + [str(tmp_path / "ids" / "bea" / "1.jpg")]
    lines = [f"{path}\t{NFD if 'abe' in path else NFC}\t" for path in paths]
    lines[3] += "from the list"
    (tmp_path / "lists" / "a.tsv").write_text("\n".join(lines), "utf-8")
    (person,) = find_people(tmp_path / "lists" / "a.tsv").people
    contents = person.contents()
    assert person.name == NFC and all(photo.is_file() for photo in contents.photos)
    captions = [read_caption(photo, contents) for photo in contents.photos]
    assert captions == [
        ("from the list", "the list"),
        ("from 2.txt", ".txt"),
        ("metadata", "metadata"),
        (None, None),
        (None, None),
    ]
    ((where, problem),) = [case.split(": ", 1) for case in contents.unused["captions that cannot be read"]]
    assert where == str(tmp_path / "ids" / "bea" / "metadata.jsonl") and "JSON" in problem
    assert not any(person.contents().unused.values())  # it is said once
    (tmp_path / "ids" / "abe" / "faces.json").write_text('{"2.jpg": [1, 2, 3, 4]}')
    assert [known_face(photo) for photo in contents.photos][:2] == [None, (1, 2, 3, 4)]


def test_a_list_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.tsv"):
        find_people(tmp_path / "gone.tsv")
    make_people(tmp_path, **{"a.csv": []})
    make_people(tmp_path / "a.csv", abe=["1.jpg"])  # a folder may be called so
    assert [person.name for person in find_people(tmp_path / "a.csv").people] == ["abe"]
