"""Blocks of a document that scripts write: nothing from <!-- name --> to <!-- end --> is typed by hand."""

import re
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path

from run.files import atomic

BLOCK = re.compile(
    r"^(?P<indent> *)<!-- (?P<name>\w+) -->\n.*?^ *<!-- end -->$", flags=re.MULTILINE | re.DOTALL
)


def fill(text: str, blocks: Mapping[str, Callable[[], str]]) -> str:
    """Return a document with those of its blocks written anew that are in `blocks`."""

    def block(found: re.Match) -> str:
        name, indent = found["name"], found["indent"]
        if name not in blocks:
            return found[0]
        inside = indent_lines(blocks[name](), indent)
        return "\n\n".join(filter(None, (f"{indent}<!-- {name} -->", inside, f"{indent}<!-- end -->")))

    return BLOCK.sub(block, text)


def indent_lines(text: str, indent: str) -> str:
    """Break prose at 118 characters, and tables not at all."""
    lines = []
    for line in text.split("\n"):
        width, more = (10**6, "") if line[:1] in "|<!#" else (118, "  " * line.startswith("- "))
        own = {"initial_indent": indent, "subsequent_indent": indent + more, "break_on_hyphens": False}
        lines += textwrap.wrap(line, width, break_long_words=False, **own) or [""]
    return "\n".join(lines)


def write(path: Path, blocks: Mapping[str, Callable[[], str]]) -> None:
    """Fill a document in place."""
    text = fill(path.read_text(encoding="utf-8"), blocks)
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
