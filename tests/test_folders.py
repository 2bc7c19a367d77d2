"""Folders of people and their captions are listed; wrong layouts are refused."""

import pytest

from people.folders import scan_people


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


def test_captions_must_be_text(tmp_path):
    make_people(tmp_path, abe=["1.jpg", "1.txt"])
    with pytest.raises(ValueError, match="1.txt is empty"):
        scan_people(tmp_path)
    (tmp_path / "abe" / "1.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="1.txt, line 1: byte 0x00 is not UTF-16"):
        scan_people(tmp_path)
