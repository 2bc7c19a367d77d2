"""Read small text files as people have them: UTF-8 with or without a byte order mark, and UTF-16."""

import codecs
from pathlib import Path

from flux.errors import UserError

MARKS = {  # byte order marks; that of UTF-32 begins as that of UTF-16 does, so it comes first
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
    codecs.BOM_UTF8: "utf-8",
}


def read_text(file: Path, most: int | None = None) -> str:
    """Read a text file; UserError, naming the file, when it is no such text or longer than `most` bytes."""
    with file.open("rb") as opened:
        content = opened.read(-1 if most is None else most + 1)
    if most is not None and len(content) > most:
        raise UserError(f"{file} is too long: at most {most} bytes")
    mark = next((mark for mark in MARKS if content.startswith(mark)), b"")
    coding, content = MARKS.get(mark, "utf-8"), content[len(mark) :]
    if not mark:
        # UTF-16 without a mark: where the text is Latin, every second byte is zero.
        for first, utf16 in enumerate(("utf-16-be", "utf-16-le")):
            if 4 * content[first::2].count(0) > len(content):
                coding = utf16
    try:
        return content.decode(coding)
    except UnicodeDecodeError as error:
        line, byte = content[: error.start].count(b"\n") + 1, content[error.start]
        raise UserError(
            f"{file}, line {line}: byte 0x{byte:02x} is not {coding.upper()} text; save it as UTF-8"
        ) from error
