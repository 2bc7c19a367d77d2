"""Files are written whole or not at all."""

import pytest
from PIL import Image

from run.files import atomic


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
