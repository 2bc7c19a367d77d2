"""Pictures that commands write: contact sheets, and PNG files with their settings inside."""

import json
import math
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from run.files import atomic
from run.terminal import printable

GAP = 4  # pixels between the cells of a contact sheet
# Some write the name with its folder or with its suffix.
TAG = re.compile(
    r"\s*<(?:lora|lyco):(?:[^<>]*[\\/])?([^<>]+?)(?:\.safetensors)?(?::(-?[0-9]*\.?[0-9]+(?:e-?[0-9]+)?))?>"
)


def contact_sheet(
    rows: Sequence[Sequence[Image.Image | None]],
    row_labels: Sequence[str] = (),
    column_titles: Sequence[str] = (),
    cell: tuple[int, int] = (256, 256),
) -> Image.Image:
    """Lay pictures out in a grid with labels, each fitted whole into its cell on grey.

    cell: its (height, width) in pixels. None and short rows leave cells empty. Long labels are wrapped, and
    cut after five lines.
    """
    height, width = cell
    gap, font = GAP, ImageFont.load_default(size=max(10, min(cell) // 16))
    letters = max(1, int(width / font.getlength("n")))
    line = math.ceil(sum(font.getmetrics()) * 1.1)

    def wrap(text: str, letters: int) -> list[str]:
        text = printable(" ".join(text.split()))
        return textwrap.wrap(text, max(1, letters), max_lines=5, placeholder="…")

    labels = [wrap(label, letters // 2) for label in row_labels]
    titles = [wrap(title, letters) for title in column_titles]
    left = gap + (width // 2 if any(labels) else 0)
    top = gap + line * max((len(title) for title in titles), default=0)
    columns = max(len(titles), max((len(row) for row in rows), default=0))
    sheet = Image.new("RGB", (left + columns * (width + gap), top + len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for j, title in enumerate(titles):
        draw.text((left + j * (width + gap), gap // 2), "\n".join(title), "black", font)
    for i, row in enumerate(rows):
        if i < len(labels):
            draw.text((gap, top + i * (height + gap)), "\n".join(labels[i]), "black", font)
        for j, picture in enumerate(row):
            if picture is not None:
                picture = ImageOps.pad(picture.convert("RGB"), (width, height), color=(128, 128, 128))
                sheet.paste(picture, (left + j * (width + gap), top + i * (height + gap)))
    return sheet


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """Write a picture, and the folder that it belongs to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        sheet.save(temporary)


def save_picture(picture: Image.Image, path: Path, settings: dict) -> None:
    """Write a PNG file with a text chunk for each setting."""
    chunks = PngInfo()
    for name, value in settings.items():
        chunks.add_itxt(name, str(value))
    with atomic(path) as temporary:
        picture.save(temporary, pnginfo=chunks)


def read_tags(prompt: str) -> tuple[str, list[tuple[str, float]]]:
    """Split a prompt into its text and its <lora:name:strength> tags, as `parameters` writes them."""
    tags = [(match[1], float(match[2] or 1)) for match in TAG.finditer(prompt)]
    return TAG.sub("", prompt).strip() if tags else prompt, tags


def parameters(prompt: str, seed: int, settings: dict, loras: list[tuple[str, float, str]]) -> str:
    """Return the settings as one text, as AUTOMATIC1111 and Forge write it and other programs read it.

    loras: the name, the strength and the hash of each.
    """
    tags = [f" <lora:{name}:{strength:g}>" for name, strength, _ in loras]
    lines = [prompt + "".join(tags)]
    lines += [f"Negative prompt: {settings['negative']}"] if "negative" in settings else []
    values = {
        "Steps": settings["steps"],
        "Sampler": "Euler",
        "CFG scale": f"{settings['cfg']:g}",
        **({"Distilled CFG Scale": f"{settings['guidance']:g}"} if "guidance" in settings else {}),
        "Seed": seed,
        "Size": settings["size"],
        "Model": Path(settings["model"]).stem,
    }
    if loras:
        values["Lora hashes"] = ", ".join(f"{name}: {digest}" for name, _, digest in loras)
    lines.append(", ".join(f"{key}: {_quoted(str(value))}" for key, value in values.items()))
    return "\n".join(lines)


def _quoted(text: str) -> str:
    """Return a value as A1111 writes it: as JSON if it holds what separates the values."""
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:"\n]', text) else text
