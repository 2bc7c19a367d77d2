"""Files are written whole or not at all, sorted, and under names that say what differs."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lora.writing import write_tensors
from run.files import atomic, next_number, slug


def test_atomic_leaves_the_old_file_or_the_new(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with atomic(path) as temporary:
        Image.new("RGB", (4, 4)).save(temporary)
        assert path.read_text() == "old"
    assert Image.open(path).size == (4, 4) and list(tmp_path.iterdir()) == [path]


def test_a_safetensors_file_has_its_header_sorted(tmp_path):
    """Its writer's own order differs between processes; lengths could differ where JSON must escape."""
    path = tmp_path / "a.safetensors"
    odd = "".join(map(chr, range(1, 160))) + '\u2028\u202e"\\ä写真🏖'
    about = {**{f"{k}": k for k in range(9)}, odd: odd}
    write_tensors({"b": torch.ones(3).half(), "a": torch.zeros(2, 2)}, path, about)
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    keys = [*header["__metadata__"]]
    assert keys == sorted(keys) == sorted([*about, "format"]) and header["__metadata__"][odd] == odd
    assert torch.equal(load_file(path)["b"], torch.ones(3).half())
    code = "import sys, torch; from safetensors.torch import save_file; "
    code += "save_file({'a': torch.ones(1)}, sys.argv[1], {str(k): '' for k in range(9)})"
    files = [tmp_path / f"{k}" for k in range(4)]
    for file in files:
        subprocess.run([sys.executable, "-c", code, file], check=True)
    assert len({file.read_bytes() for file in files}) > 1  # else sorting would not be needed


@pytest.mark.parametrize(
    "text, expected",
    [
        ("A photo – at the BEACH!", "a-photo-at-the-beach"),
        ("写真、東京", "写真-東京"),
        ("Ольга в лесу", "ольга-в-лесу"),
        ("हिन्दी में", "हिन्दी-में"),
        ("صُورة", "صُورة"),
        ("Zoe\u0308", "zoë"),
        ("../../etc\x1b[2J\udcff", "etc-2j"),
        ("🏖", ""),
        ("", ""),
    ],
)
def test_letters_of_any_alphabet_survive_in_names(text, expected):
    assert slug(text) == expected


@pytest.mark.parametrize("letter", ["a", "ä", "写", "𝒳"])
def test_names_are_short_enough_for_a_disk(letter, tmp_path):
    assert 76 < len(slug(letter * 300).encode()) <= 80


def test_numbers_go_on(tmp_path):
    assert next_number(tmp_path) == 0
    for name in (
        "00_a.png",
        "07_b_3.png",
        "grid_07.png",
        "grid.png",
        "20260101_holiday.png",
        "9.png",
        "12_x.txt",
    ):
        (tmp_path / name).touch()
    assert next_number(tmp_path) == 8
    (tmp_path / "grid_11.png").touch()
    assert next_number(tmp_path) == 12
