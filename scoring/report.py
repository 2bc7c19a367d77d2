"""What one would rather see than read: a page of scores and pictures, the paper's figure 3, contact sheets.

Scores come as `metrics.py` writes them, as JSON; nothing here computes one. The page is a single file that
needs neither server nor network: templates/report.html with everything put into its two {{places}}.
"""

import base64
import html
import io
import json
import math
import re
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from people.photos import read_photo
from run.files import atomic
from scoring.tables import TITLES, _metrics

TEMPLATE = Path(__file__).with_name("report.html")
SIDE, PLENTY = 128, 4000  # pixels of a thumbnail's longer side, up to so many thumbnails: some 20 MB


# The page


def write_report(
    path: Path,
    systems: dict[str, dict],
    photos: dict[str, list[Path]] | None = None,
    curves: Path | None = None,
    table: str = "",
) -> None:
    """Write one HTML file to look at and compare systems: their scores, remarks, and every picture.

    systems: the scores of each by its name; photos: of each person, the reference first; curves: what
    `draw_curves` drew; table: the scores as text, to copy. Raises as `read_photo` when a picture is gone.
    """
    people = dict.fromkeys(name for scores in systems.values() for name in scores["people"])
    photos = {name: (photos or {}).get(name, []) for name in people}
    rows = [row for scores in systems.values() for row in scores["pictures"]]
    files = dict.fromkeys(map(Path, [*(row["path"] for row in rows), *sum(photos.values(), [])]))
    side, uris = thumbnail_side(len(files)), {}  # uris by their numbers, in order; equal pictures share one
    for file in tqdm(files, "thumbnails", disable=len(files) < 50):
        files[file] = uris.setdefault(thumbnail(file, side), len(uris))
    content = {
        "side": side,
        "metrics": {metric: TITLES[metric] for metric in _metrics(systems.values())},
        "curves": curves and _uri("png", curves.read_bytes()),
        "photos": {name: [files[Path(photo)] for photo in photos[name]] for name in people},
        "systems": [
            {
                "name": name,
                "note": scores.get("judges", {}).get("note", ""),
                "settings": scores.get("settings", {}),
                "remarks": scores.get("remarks", {}),
                "groups": {"overall": scores["overall"], **scores["classes"]},
                "people": scores["people"],
                "pictures": [{**row, "image": files[Path(row["path"])]} for row in scores["pictures"]],
            }
            for name, scores in systems.items()
        ],
        "images": list(uris),
    }
    # In a script element only "<" can end the data; ASCII also carries file names that are not Unicode.
    text = json.dumps(content, default=str, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    places = {"table": html.escape(table), "data": text}
    page = re.sub(r"{{(\w+)}}", lambda place: places[place[1]], TEMPLATE.read_text("utf-8"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        temporary.write_text(page, "utf-8", errors="replace")


def thumbnail_side(count: int) -> int:
    """Return the longer side of thumbnails: SIDE, or less, down to 32, where there are more than PLENTY."""
    return max(32, min(SIDE, int(SIDE * math.sqrt(PLENTY / max(1, count))) // 8 * 8))


def thumbnail(path: Path, side: int) -> str:
    """Return a picture, made to fit a square of `side`, as a data URI."""
    image, file = read_photo(path), io.BytesIO()
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    image.save(file, "jpeg", quality=80, optimize=True)
    return _uri("jpeg", file.getvalue())


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
