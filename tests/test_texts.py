"""Small text files are read in every encoding that editors write, or refused by file and line."""

import pytest

from flux.checkpoint import read_json
from flux.errors import UserError
from flux.texts import read_text
from people.faces import known_face
from scoring.inputs import read_names, read_prompts

CODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32")


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("text", ["a woman in Köln\n", "", "a", "Ольга at the sea, アンナ behind\r\n"])
def test_encodings(tmp_path, coding, text):
    (tmp_path / "a.txt").write_bytes(text.encode(coding))
    assert read_text(tmp_path / "a.txt") == text


def test_the_mark_at_the_other_end(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xfe\xff" + "Köln".encode("utf-16-be"))
    assert read_text(tmp_path / "a.txt") == "Köln"


@pytest.mark.parametrize("coding", CODINGS)
def test_all_small_files_are_read_alike(tmp_path, coding):
    write = lambda name, text: (tmp_path / name).write_bytes(text.encode(coding))
    write("faces.json", '{"01.jpg": [1, 2, 3, 4]}')
    write("classes.json", '{"anna": "woman"}')
    write("prompts.txt", "a photo of a woman at the beach\n")
    assert known_face(tmp_path / "01.jpg") == (1, 2, 3, 4)
    assert read_names(tmp_path / "classes.json", "--classes") == {"anna": "woman"}
    assert read_json(tmp_path / "classes.json") == {"anna": "woman"}
    assert read_prompts(tmp_path / "prompts.txt", "woman") == ["a photo of a woman at the beach"]


@pytest.mark.parametrize(
    "content, message",
    [
        ("a\nit\x92s Köln".encode("latin-1"), "a.txt, line 2: byte 0x92 is not UTF-8 text"),  # Windows-1252
        (b"\xff\xfe\x00", "a.txt, line 1: byte 0x00 is not UTF-16-LE text"),
        (b"\x89PNG\r\n\x1a\n", "a.txt, line 1: byte 0x89"),
        (b"a" * 101, "a.txt is too long: at most 100 bytes"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path, content, message):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_text(tmp_path / "a.txt", 100)
