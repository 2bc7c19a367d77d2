"""Blocks of Markdown documents that scripts write, between <!-- name --> and <!-- end -->."""

import re
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path

from run.files import atomic

BLOCK = re.compile(
    r"^(?P<indent> *)<!-- (?P<name>\w+) -->\n.*?^ *<!-- end -->$", flags=re.MULTILINE | re.DOTALL
)


def fill(text: str, blocks: Mapping[str, Callable[[], str]]) -> str:
    """Return a document's text with the given blocks, functions by name, written anew."""

    def block(match: re.Match) -> str:
        name, indent = match["name"], match["indent"]
        if name not in blocks:
            return match[0]
        inside = indent_lines(blocks[name](), indent)
        return "\n\n".join(filter(None, (f"{indent}<!-- {name} -->", inside, f"{indent}<!-- end -->")))

    return BLOCK.sub(block, text)


def indent_lines(text: str, indent: str) -> str:
    """Indent lines; break those of prose at 118 characters, but none of a table or a heading."""
    lines = []
    for line in text.split("\n"):
        width, more = (10**6, "") if line[:1] in "|<!#" else (118, "  " * line.startswith("- "))
        options = {"break_long_words": False, "break_on_hyphens": False}
        indents = {"initial_indent": indent, "subsequent_indent": indent + more}
        lines += textwrap.wrap(line, width, **indents, **options) or [""]
    return "\n".join(lines)


def write(path: Path, blocks: Mapping[str, Callable[[], str]]) -> None:
    """Write a document's blocks anew, in place."""
    text = fill(path.read_text(encoding="utf-8"), blocks)
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
