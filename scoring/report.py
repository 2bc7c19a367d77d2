"""The report: one HTML file with the scores and pictures of one or several systems.

The scores are those that `metrics.py` writes as JSON. The page needs neither a server nor a network: it is
report.html in this folder, with everything filled into its two {{places}}.
"""

import base64
import html
import io
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from people.photos import read_photo
from run.files import atomic
from scoring.tables import TITLES, scored_metrics

TEMPLATE = Path(__file__).with_name("report.html")
SIDE = 128  # pixels of a thumbnail's longer side
FULL_SIZE_COUNT = 4000  # above this number thumbnails shrink, to keep the page near 20 MB


def write_report(
    path: Path,
    systems: dict[str, dict],
    photos: dict[str, list[Path]] | None = None,
    curves: Sequence[Path] = (),
    table: str = "",
) -> None:
    """Write one HTML file that shows and compares systems: scores, remarks, and every picture.

    systems: the scores of each, by its name; photos: of each person, the reference first; curves: files
    that `plot_curves` and `plot_strengths` wrote; table: the scores as text. Raises as `read_photo` when a
    picture is missing.
    """
    people = dict.fromkeys(name for scores in systems.values() for name in scores["people"])
    photos = {name: (photos or {}).get(name, []) for name in people}
    rows = [row for scores in systems.values() for row in scores["pictures"]]
    files = dict.fromkeys(map(Path, [*(row["path"] for row in rows), *sum(photos.values(), [])]))
    side, uris = thumbnail_side(len(files)), {}  # the number of each data URI; equal pictures share one
    for file in tqdm(files, "thumbnails", disable=len(files) < 50):
        files[file] = uris.setdefault(thumbnail(file, side), len(uris))
    content = {
        "side": side,
        "metrics": {metric: TITLES[metric] for metric in scored_metrics(systems.values())},
        "curves": [_uri("png", file.read_bytes()) for file in curves],
        "photos": {name: [files[Path(photo)] for photo in photos[name]] for name in people},
        "systems": [
            {
                "name": name,
                "note": scores.get("evaluators", {}).get("note", ""),
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
    # Without "<" nothing in the data can end the script element. JSON in ASCII also holds file names that are
    # not valid Unicode.
    text = json.dumps(content, default=str, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    places = {"table": html.escape(table), "data": text}
    page = re.sub(r"{{(\w+)}}", lambda place: places[place[1]], TEMPLATE.read_text("utf-8"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        temporary.write_text(page, "utf-8", errors="replace")


def thumbnail_side(count: int) -> int:
    """Return the longer side of thumbnails in pixels: SIDE up to FULL_SIZE_COUNT, then down to 32."""
    return max(32, min(SIDE, int(SIDE * math.sqrt(FULL_SIZE_COUNT / max(1, count))) // 8 * 8))


def thumbnail(path: Path, side: int) -> str:
    """Return a picture, shrunk to fit a square of `side` pixels, as a data URI."""
    image, file = read_photo(path), io.BytesIO()
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    image.save(file, "jpeg", quality=80, optimize=True)
    return _uri("jpeg", file.getvalue())


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
