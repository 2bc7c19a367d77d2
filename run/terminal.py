"""Escape names and texts from files, so that control characters in them have no effect on the terminal.

`run_script` escapes all that a command prints. `printable` is for a name that must not break the line that it
stands in, and for what goes into pictures.
"""

import re
import sys
from typing import TextIO

BAR = re.compile(r"\r|\n*(\x1b\[A)*")  # what tqdm writes to begin a bar, or to move between bars


def printable(text: object) -> str:
    """Escape control and formatting characters, and bytes that are not UTF-8; the result is one line."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode()
        for char in str(text)
    )


def printable_lines(text: object) -> str:
    """Escape a text of several lines; also line ends that come from file names in the command's arguments."""
    text = str(text)
    for word in sys.argv[1:]:
        for part in re.split("[/.]", word):
            if "\n" in part and part.strip():
                text = text.replace(part, printable(part))
    return "\n".join(map(printable, text.split("\n")))


class Shown:
    """A text stream that escapes what a terminal would obey or cannot encode.

    bars: let the control characters through with which tqdm draws its bars.
    """

    def __init__(self, stream: TextIO, bars: bool = False):
        self.stream, self.bars = stream, bars

    def write(self, text: str) -> int:
        drawn = BAR.match(text)[0] if self.bars else ""
        text = drawn + printable_lines(text.removeprefix(drawn).replace("\t", "    "))
        coding = getattr(self.stream, "encoding", None) or "utf-8"
        return self.stream.write(text.encode(coding, "backslashreplace").decode(coding))

    def __getattr__(self, name: str):
        return getattr(self.stream, name)
