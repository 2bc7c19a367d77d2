"""Contact sheets: one for each person, with the real photos and the scored pictures."""

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from people.photos import read_photo
from run.files import atomic
from run.pictures import contact_sheet
from scoring.tables import TITLES, scored_metrics

SIDE = 256  # pixels of a cell


def person_sheet(rows: Sequence[dict], photos: Sequence[Path], metrics: Sequence[str]) -> Image.Image:
    """Lay out one person's pictures by one system: prompts down, seeds across, real photos at left.

    rows: those of this person in the scores; photos: real ones, the reference first.
    """
    rows = sorted(rows, key=lambda row: row["prompt"])
    prompts = {row["prompt"]: row.get("text") or f"prompt {row['prompt']}" for row in rows}
    seeds = sorted({row["seed"] for row in rows}, key=lambda seed: (len(seed), seed))  # 2 before 10
    place = {(row["prompt"], row["seed"]): row for row in rows}
    real = dict(zip(prompts, photos))  # at most one photo beside each prompt
    cells = []
    for prompt in prompts:
        pictures = [_cell(place.get((prompt, seed)), metrics) for seed in seeds]
        cells.append([read_photo(real[prompt]) if prompt in real else None, *pictures])
    titles = ["real, reference first", *(f"seed {seed}" for seed in seeds)]
    return contact_sheet(cells, [*prompts.values()], titles, (SIDE, SIDE))


def _cell(row: dict | None, metrics: Sequence[str]) -> Image.Image | None:
    """Return a square cell: the picture of a row, and its scores below it."""
    if row is None:
        return None
    known = [f"{TITLES[metric]} {100 * row[metric]:.1f}" for metric in metrics if row.get(metric) is not None]
    lines = ["  ".join(known[k : k + 2]) for k in range(0, len(known), 2)]
    without_face = row.get("faces") == 0
    if without_face:
        lines = ["no face found", *lines]
    font = ImageFont.load_default(size=SIDE // 18)
    line = math.ceil(sum(font.getmetrics()) * 1.1)
    cell = Image.new("RGB", (SIDE, SIDE), "#a3202a" if without_face else "#222222")
    room = SIDE - (line * len(lines) + 2 if lines else 0)
    cell.paste(ImageOps.pad(read_photo(row["path"]), (SIDE, room), color=(128, 128, 128)))
    text = "\n".join(lines)
    ImageDraw.Draw(cell).multiline_text((4, room), text, "white", font, spacing=line - font.size)
    return cell


def write_sheets(folder: Path, scores: dict, photos: dict[str, list[Path]] | None = None) -> None:
    """Write the sheet of each person of a system as <person>.jpg."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in scores["people"]:
        rows = [row for row in scores["pictures"] if row["person"] == name]
        sheet = person_sheet(rows, (photos or {}).get(name, []), scored_metrics([scores]))
        with atomic(folder / f"{name}.jpg") as temporary:
            sheet.save(temporary, quality=90)
