"""What one would rather see than read: a page of scores and pictures, the paper's figure 3, contact sheets.

Scores come as `metrics.py` writes them, as JSON; nothing here computes one. The page is a single file that
needs neither server nor network: templates/report.html with everything put into its two {{places}}.
"""

import base64
import html
import io
import itertools
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from data import contact_sheet, read_photo
from flux.loading import atomic

TITLES = {"clip-t": "CLIP-T", "clip-i": "CLIP-I", "facesim": "FaceSim", "r-facesim": "R-FaceSim"}
TEMPLATE = Path(__file__).parent / "templates" / "report.html"
SIDE, PLENTY = 128, 4000  # pixels of a thumbnail's longer side, up to so many thumbnails: some 20 MB
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito's, for all eyes
MARKERS = "osD^vP"


# Tables


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Lay out lines of text as a Markdown table, the first as its head."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def student(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t, which makes 95 % intervals of few people."""
    # At t = sqrt(freedom) tan(a), a has the density cos(a) ** (freedom - 1).
    ends, step = np.linspace(0, math.pi / 2, 10**5 + 1, retstep=True)
    mass = np.cumsum(np.cos(ends[1:] - step / 2) ** (freedom - 1))
    return math.sqrt(freedom) * math.tan(np.interp(0.95 * mass[-1], mass, ends[1:]))


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


def _metrics(systems: Iterable[dict]) -> list[str]:
    found = {metric for scores in systems for metric in scores["overall"]}
    return [metric for metric in TITLES if metric in found]


# Curves


def draw_curves(path: Path, systems: dict[str, dict]) -> bool:
    """Draw the paper's figure 3 from scores over all people; return False, and draw nothing, without any.

    Left, R-FaceSim against CLIP-T: a curve through the step counts of each method, rank and learning rate,
    and, where a method has several ranks, a parabola fitted to all its points. Right, both against steps with
    95 % intervals, at each method's least rank. A system is on a curve by scores["system"], {"method",
    "rank", "lr", "steps"}; one without is a point at left, and a level at right.
    """
    curves, levels = {}, {}  # (method, rank, lr): {steps: percents}; name: percents
    for name, scores in systems.items():
        place, overall = scores.get("system") or {}, scores["overall"]
        means = {
            metric: overall[metric] for metric in _metrics([scores]) if overall[metric]["mean"] is not None
        }
        percents = {metric: (100 * mean["mean"], 100 * (mean["ci95"] or 0)) for metric, mean in means.items()}
        if place.get("steps") is None:
            levels[name] = percents
        else:
            key = place["method"], place.get("rank") or 0, place.get("lr") or 0
            curves.setdefault(key, {})[place["steps"]] = percents
    curves = {key: dict(sorted(curves[key].items())) for key in sorted(curves)}
    drawn = [percents for curve in curves.values() for percents in curve.values()]
    plane = any({"clip-t", "r-facesim"} <= percents.keys() for percents in [*drawn, *levels.values()])
    timed = [metric for metric in ("r-facesim", "clip-t") if any(metric in percents for percents in drawn)]
    if not plane and not timed:
        return False

    import matplotlib  # takes a second, and only this function needs it
    from matplotlib.figure import Figure

    style = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e8e8e8"}
    with matplotlib.rc_context({**style, "font.size": 9, "text.parse_math": False, "axes.axisbelow": True}):
        figure = Figure(figsize=(11, 5.4) if plane and timed else (6.5, 5.4), layout="constrained")
        panels = figure.subplot_mosaic([["plane"] * plane + [metric] for metric in timed] or [["plane"]])
        colours = dict(zip(dict.fromkeys((method, lr) for method, _, lr in curves), itertools.cycle(COLOURS)))
        if plane:
            _draw_plane(panels["plane"], curves, levels, colours)
        for metric in timed:
            _draw_time(panels[metric], metric, curves, levels, colours)
        if timed:
            panels[timed[0]].set_title("Bands are 95 % intervals over people", fontsize=9)
            panels[timed[-1]].set_xlabel("steps")
        handles = {}
        for panel in panels.values():  # a curve that is in several panels comes once
            handles |= dict(zip(*panel.get_legend_handles_labels()[::-1])) | handles
        columns = min(len(handles), 5)
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns, frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as temporary:
            figure.savefig(temporary, dpi=150)
    return True


def _draw_plane(axes, curves: dict, levels: dict, colours: dict) -> None:
    both, ranks, clouds = ("clip-t", "r-facesim"), sorted({rank for _, rank, _ in curves}), {}
    for (method, rank, lr), curve in curves.items():
        colour = colours[method, lr]
        steps = [n for n, percents in curve.items() if {*both} <= percents.keys()]
        points = [[curve[n][metric][0] for metric in both] for n in steps]
        clouds.setdefault((method, lr), []).extend(points)
        marker = MARKERS[ranks.index(rank) % len(MARKERS)]
        look = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1}
        axes.plot(*zip(*points), label=_curve_name((method, rank, lr), curves), **look)
        shown = slice(None, None, 1 if len(curves) <= 2 else max(1, len(steps) - 1))  # of many only both ends
        for n, point in zip(steps[shown], points[shown]):
            axes.annotate(str(n), point, (5, 4), textcoords="offset points", fontsize=7, color=colour)
    for cloud, points in clouds.items():
        if sum((key[0], key[2]) == cloud for key in curves) > 1 and len({x for x, _ in points}) > 3:
            fitted = np.polynomial.Polynomial.fit(*zip(*points), 2)
            axes.plot(*fitted.linspace(), "--", color=colours[cloud], linewidth=1, alpha=0.6, zorder=1)
    for name, percents in levels.items():
        if {*both} <= percents.keys():
            point = [percents[metric][0] for metric in both]
            axes.plot(*point, "*", color="#333333", markersize=11)
            axes.annotate(name, point, (8, 0), textcoords="offset points", va="center")
    fits = "; dashed, a parabola through a method's points" if len(ranks) > 1 else ""
    axes.set_title("Numbers are steps" + fits, fontsize=9)
    axes.set(xlabel="CLIP-T", ylabel="R-FaceSim")
    axes.margins(0.1)


def _draw_time(axes, metric: str, curves: dict, levels: dict, colours: dict) -> None:
    for (method, lr), rank in {(method, lr): rank for method, rank, lr in reversed(curves)}.items():
        key, look = (method, rank, lr), {"color": colours[method, lr]}
        known = {n: percents[metric] for n, percents in curves[key].items() if metric in percents}
        steps, (means, halves) = [*known], np.array([*known.values()]).reshape(-1, 2).T
        axes.plot(steps, means, "o-", label=_curve_name(key, curves), markersize=5, **look)
        axes.fill_between(steps, means - halves, means + halves, alpha=0.15, linewidth=0, **look)
        if len(steps) == 1:  # of which a band shows nothing
            axes.errorbar(steps, means, halves, capsize=3, **look)
    for name, percents in levels.items():
        if metric in percents:
            level, place = percents[metric][0], ("axes fraction", "data")
            axes.axhline(level, color="#333333", linewidth=1)
            axes.annotate(name, (1, level), (4, 0), place, textcoords="offset points", va="center")
    axes.set(ylabel=TITLES[metric], xticks=sorted({n for curve in curves.values() for n in curve}))


def _curve_name(key: tuple[str, int, float], curves: dict) -> str:
    method, rank, lr = key
    several = len({rate for *_, rate in curves}) > 1
    return method + (f", rank {rank}" if rank else "") + (f", lr {lr:g}" if several else "")


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
