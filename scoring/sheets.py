"""Contact sheets with scores, one for each person."""

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from people.photos import read_photo
from run.files import atomic
from run.pictures import contact_sheet
from scoring.tables import TITLES, _metrics

# Contact sheets


def person_sheet(
    rows: Sequence[dict], photos: Sequence[Path], metrics: Sequence[str], side: int = 256
) -> Image.Image:
    """Lay out one person's pictures by one system, prompts down and seeds across, with their scores.

    rows: as in the scores, of this person. The first column holds the real photos, the reference on top.
    """
    rows = sorted(rows, key=lambda row: row["prompt"])
    prompts = {row["prompt"]: row.get("text") or f"prompt {row['prompt']}" for row in rows}
    seeds = sorted({row["seed"] for row in rows}, key=lambda seed: (len(seed), seed))  # 2 before 10
    place = {(row["prompt"], row["seed"]): row for row in rows}
    real = dict(zip(prompts, photos))  # what does not fit beside the prompts is left out
    cells = []
    for prompt in prompts:
        made = [_scored(place.get((prompt, seed)), metrics, side) for seed in seeds]
        cells.append([read_photo(real[prompt]) if prompt in real else None, *made])
    titles = ["real, reference first", *(f"seed {seed}" for seed in seeds)]
    return contact_sheet(cells, [*prompts.values()], titles, (side, side))


def _scored(row: dict | None, metrics: Sequence[str], side: int) -> Image.Image | None:
    """Return a square with a picture and, below it, its scores."""
    if row is None:
        return None
    known = [f"{TITLES[metric]} {100 * row[metric]:.1f}" for metric in metrics if row.get(metric) is not None]
    lines = ["  ".join(known[k : k + 2]) for k in range(0, len(known), 2)]
    lines = ["no face found"] * (row.get("faces") == 0) + lines
    font = ImageFont.load_default(size=max(10, side // 18))
    line = math.ceil(sum(font.getmetrics()) * 1.1)
    cell = Image.new("RGB", (side, side), "#a3202a" if row.get("faces") == 0 else "#222222")
    room = side - (line * len(lines) + 2 if lines else 0)
    cell.paste(ImageOps.pad(read_photo(row["path"]), (side, room), color=(128, 128, 128)))
    text = "\n".join(lines)
    ImageDraw.Draw(cell).multiline_text((4, room), text, "white", font, spacing=line - font.size)
    return cell


def write_sheets(folder: Path, scores: dict, photos: dict[str, list[Path]] | None = None) -> None:
    """Write <person>.jpg, the sheet of each person of a system."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in scores["people"]:
        rows = [row for row in scores["pictures"] if row["person"] == name]
        sheet = person_sheet(rows, (photos or {}).get(name, []), _metrics([scores]))
        with atomic(folder / f"{name}.jpg") as temporary:
            sheet.save(temporary, quality=90)
