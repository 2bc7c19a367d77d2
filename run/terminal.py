"""What may reach a terminal: names and texts from outside are shown, never obeyed."""

import re
import sys
from typing import TextIO

BAR = re.compile(r"\r|\n*(\x1b\[A)*")  # how tqdm begins a line that it draws, and moves between bars


def printable(text: object) -> str:
    """Escape what a terminal would obey instead of show: control, formatting and undecodable characters."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode()
        for char in str(text)
    )


def printable_lines(text: object) -> str:
    """Do the same to several lines; a line end that came in an argument, in a file's name, is escaped too."""
    text = str(text)
    for part in {part for word in sys.argv[1:] for part in re.split("[/.]", word)}:
        if "\n" in part and part.strip():
            text = text.replace(part, printable(part))
    return "\n".join(map(printable, text.split("\n")))


class Shown:
    """A text stream that shows what a terminal would obey, or cannot encode. bars: tqdm may draw its own."""

    def __init__(self, stream: TextIO, bars: bool = False):
        self.stream, self.bars = stream, bars

    def write(self, text: str) -> int:
        drawn = BAR.match(text)[0] if self.bars else ""
        text = drawn + printable_lines(text.removeprefix(drawn).replace("\t", "    "))
        coding = getattr(self.stream, "encoding", None) or "utf-8"
        return self.stream.write(text.encode(coding, "backslashreplace").decode(coding))

    def __getattr__(self, name: str):
        return getattr(self.stream, name)
