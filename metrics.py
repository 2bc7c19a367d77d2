"""CLIP-T, CLIP-I, FaceSim and R-FaceSim of pictures by any system (paper, section 4.3 and Algorithm 3).

python metrics.py report --images out/mine --people photos --prompts metaphd/prompts/frontal.txt

docs/metrics.md says how the files are laid out, what is written, and which networks look at the pictures.
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

import torch.nn.functional as F
from torch import Tensor

from flux.errors import UserError
from people.cache import TensorCache
from run.arguments import Manual, Parser
from run.command import run_script
from run.files import check_writable
from run.models import SHIPPED, add_device_argument, choose_device
from scoring.bleed import PEOPLE, remark_bleed, score_bleed
from scoring.evaluators import Evaluators, add_evaluator_arguments, load_evaluators
from scoring.inputs import class_of, find_photos, read_names, read_prompts
from scoring.intervals import half_interval
from scoring.report import write_report
from scoring.samples import find_missing, make_rows, scan_samples
from scoring.tables import shorten, write_scores

# What each metric needs besides --images.
NEEDS = {
    "clip-t": ["prompts"],
    "clip-i": ["base"],
    "facesim": ["people"],
    "r-facesim": ["people"],
    **dict.fromkeys(PEOPLE, ["base", "people"]),  # other people's faces, in other pictures than the rest
}

# The formulas: cosines of embeddings (..., d)


def clip_t(image: Tensor, prompt: Tensor) -> Tensor:
    """Compare a picture with its prompt by the dot product; CLIP's embeddings have length 1."""
    return (image * prompt).sum(dim=-1)


def clip_i(image: Tensor, base_image: Tensor) -> Tensor:
    """Compare a picture with the base model's picture for the same prompt and seed."""
    return F.cosine_similarity(image, base_image, dim=-1)


def facesim(e_g: Tensor, e_ref: Tensor) -> Tensor:
    """Compare a generated face with that in the reference, the photo which the system was given."""
    return F.cosine_similarity(e_g, e_ref, dim=-1)


def r_facesim(e_g: Tensor, e_t: Tensor) -> Tensor:
    """Compare a generated face (d,) with the faces in the person's other photos (k, d), and average."""
    return F.cosine_similarity(e_g, e_t, dim=-1).mean()


# Algorithm 3: S(i, p) of each generated picture, then their mean


def score_faces(
    rows: Sequence[dict], evaluators: Evaluators, photos: dict[str, Sequence[Path]], no_face: str = "zero"
) -> None:
    """Add FaceSim and R-FaceSim to the rows, one for each generated picture.

    photos: of each identity; the first is the reference, from which M was fine-tuned to make the pictures.
    no_face: "zero" scores a picture without a face 0, "skip" None. R-FaceSim is None without a second photo.
    """
    real = embed_photos({row["person"]: photos[row["person"]] for row in rows}, evaluators)
    generated, counts = evaluators.embed_faces([row["path"] for row in rows])
    # For each i in I, for each p in P, and for each seed: g <- M(p), e_g <- E(C(g)).
    for row, e_g, faces in zip(rows, generated, counts, strict=True):
        i = row["person"]
        e_ref = real[i][0]  # ref <- select one(i)
        e_t = real[i][1:]  # T <- i \ {ref}; e_t <- E(C(t)) for each t in T
        row["faces"], row["facesim"], row["r-facesim"] = faces, None, None
        if faces or no_face == "zero":  # without a face e_g is zero, and so are its cosines
            row["facesim"] = facesim(e_g, e_ref).item()
            if len(e_t) > 0:
                row["r-facesim"] = r_facesim(e_g, e_t).item()  # S(i, p) <- mean of cosine(e_g, e_t) over T


def average(rows: Iterable[dict], metric: str) -> tuple[float | None, dict[str, float]]:
    """Average a metric: R-FaceSim <- mean{S(i, p) : i in I, p in P}; the mean of each i is returned, too.

    Over seeds first, then over prompts, then over identities, so that each weighs the same even if pictures
    are missing. Rows without a score do not count. The mean of no rows is None.
    """
    scores: dict[str, dict[str, list[float]]] = {}  # by identity and prompt, one for each seed
    for row in rows:
        if row.get(metric) is not None:
            scores.setdefault(row["person"], {}).setdefault(row["prompt"], []).append(row[metric])
    means = {i: fmean(fmean(seeds) for seeds in prompts.values()) for i, prompts in scores.items()}
    return (fmean(means.values()) if means else None), means


# All scores of a system


def evaluate(
    rows: Sequence[dict],
    evaluators: Evaluators,
    photos: dict[str, Sequence[Path]] | None,
    metrics: Sequence[str],
    no_face: str,
    missing: Sequence[str] = (),
    others: Sequence[dict] = (),
    **about: object,
) -> dict:
    """Score the rows of `make_rows` and return everything that is written of a system.

    photos: of each person, the reference first; others: rows with the scores of `score_bleed`; about: further
    entries, such as settings.
    """
    if rows:
        score(rows, evaluators, photos, no_face)
    used = {"name": evaluators.name, "note": evaluators.note, "weights": evaluators.used}
    remarks = remark(rows, missing, no_face) | remark_bleed(others)
    rows = [*rows, *others]
    return {**about, "evaluators": used, "remarks": remarks, **summarize(rows, metrics), "pictures": rows}


def score(
    rows: Sequence[dict],
    evaluators: Evaluators,
    photos: dict[str, Sequence[Path]] | None = None,
    no_face: str = "zero",
) -> None:
    """Add to the rows all scores for which they have the input; UserError on a photo without a face."""
    if "text" in rows[0] or "base" in rows[0]:
        images = evaluators.embed_images([row["path"] for row in rows])
    if "text" in rows[0]:
        prompts = evaluators.embed_texts([row["text"] for row in rows])
        for row, value in zip(rows, clip_t(images, prompts).tolist(), strict=True):
            row["clip-t"] = value
    if "base" in rows[0]:
        base_images = evaluators.embed_images([row["base"] for row in rows])
        for row, value in zip(rows, clip_i(images, base_images).tolist(), strict=True):
            row["clip-i"] = value
    if photos:
        score_faces(rows, evaluators, photos, no_face)


def embed_photos(photos: dict[str, Sequence[Path]], evaluators: Evaluators) -> dict[str, Tensor]:
    """Embed the faces of each person's real photos, (n, d); UserError names photos without a face."""
    embedded, without_face = {}, []
    for name, paths in photos.items():
        embedded[name], counts = evaluators.embed_faces(paths)
        without_face += [str(path) for path, count in zip(paths, counts) if count == 0]
    if without_face:
        raise UserError(f"no face found in {shorten(without_face)}: replace or remove")
    return embedded


def embed_references(
    rows: Sequence[dict], photos: dict[str, Sequence[Path]], evaluators: Evaluators
) -> dict[str, Tensor]:
    """Embed the reference of each person in the rows, (d,)."""
    references = {row["person"]: photos[row["person"]][:1] for row in rows}
    return {name: faces[0] for name, faces in embed_photos(references, evaluators).items()}


def summarize(rows: Sequence[dict], metrics: Sequence[str]) -> dict[str, dict]:
    """Average the rows over all people, over those of each class, and for each person; not times 100."""
    classes = {row["person"]: row["class"] for row in rows}
    people = {name: {"class": kind} for name, kind in classes.items()}
    for metric in metrics:
        _, means = average(rows, metric)
        for name in people:
            people[name][metric] = means.get(name)
    groups = {kind: [row for row in rows if row["class"] == kind] for kind in sorted({*classes.values()})}
    return {
        "overall": describe(rows, metrics),
        "classes": {kind: describe(group, metrics) for kind, group in groups.items()},
        "people": people,
    }


def describe(rows: Sequence[dict], metrics: Sequence[str]) -> dict:
    """Return each metric's mean with its 95 % interval over people, and Table 3's relative difference."""
    summary: dict = {"people": len({row["person"] for row in rows})}
    people = {}
    for metric in metrics:
        mean, people[metric] = average(rows, metric)
        half = half_interval([*people[metric].values()])
        summary[metric] = {"mean": mean, "ci95": half, "people": len(people[metric])}
    both = [i for i in people.get("facesim", ()) if i in people.get("r-facesim", ())]
    # Not where FaceSim may be zero: that would be a division by chance.
    if both and summary["facesim"]["mean"] > (summary["facesim"]["ci95"] or 0.1):
        means = [fmean(people[metric][i] for i in both) for metric in ("facesim", "r-facesim")]
        summary["relative difference"] = relative_difference(*means)
    return summary


def relative_difference(facesim: float, r_facesim: float) -> float | None:
    """Return the change from FaceSim to R-FaceSim relative to FaceSim (paper, Table 3).

    It is -0.11 for a system that copies the pose of the reference.
    """
    return (r_facesim - facesim) / facesim if facesim > 0 else None


def remark(rows: Sequence[dict], missing: Sequence[str], no_face: str) -> dict[str, list[str]]:
    """List the pictures and people whose scores need an explanation, by what is to be said of them."""
    faces = [(str(row["path"]), row.get("faces", 1)) for row in rows]
    effect = "counted as 0" if no_face == "zero" else "left out"
    alone = {row["person"] for row in rows if row.get("faces") and row["r-facesim"] is None}
    remarks = {
        "missing": [*missing],
        f"no face found, {effect}": [path for path, count in faces if count == 0],
        "several faces, the largest is scored": [path for path, count in faces if count > 1],
        "no photo besides the reference, so no R-FaceSim": sorted(alone),
    }
    return {title: names for title, names in remarks.items() if names}


# Command line

DESCRIPTION = """
Score pictures of people, made by any system, with the metrics of the Meta-LoRA paper.

  clip-t      compare each picture with its prompt
  clip-i      compare each picture with the base model's
  facesim     compare each face with the reference photo's
  r-facesim   compare each face with the person's other photos
  bleed       in pictures of two people, compare the other face with the person's
  class-bleed in pictures of somebody else instead, compare every face with the person's
  report      all but the last two of these for which there is input, and a page to look at

examples:
  python metrics.py report --images out/mine --people photos --prompts metaphd/prompts/frontal.txt
  python metrics.py clip-t --images out/mine --prompts metaphd/prompts
  python metrics.py report --model tiny --images out/toy --people people --prompts words.txt

docs/metrics.md describes the files and the scores.
"""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=DESCRIPTION, formatter_class=Manual)
    parser.add_argument("command", choices=[*NEEDS, "report"], metavar="command", help="one of the above")
    folder, file = {"type": Path, "metavar": "DIR"}, {"type": Path, "metavar": "FILE"}
    parser.add_argument("--images", required=True, **folder, help="DIR/<person>/<prompt>/<seed>.png")
    parser.add_argument("--prompts", **file, help="a prompt per line; or a folder with <class>.txt")
    parser.add_argument("--base", **folder, help="the base model's pictures, DIR/<prompt>/<seed>.png")
    parser.add_argument(
        "--people", **folder, help="real photos, DIR/<person>/*.jpg; the first is the reference"
    )
    parser.add_argument("--references", **file, help='other references, {"anna": "03.jpg"}')
    parser.add_argument("--classes", **file, help='{"anna": "woman"}; default: by name, as woman_anna')
    parser.add_argument(
        "--out", **file, help="default: out/<images>_scores.json, or out/<images>_<command>.json"
    )
    parser.add_argument("--incomplete", action="store_true", help="score although pictures are missing")
    add_evaluator_arguments(parser)
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", help=f"use the evaluators that come with it: {', '.join(SHIPPED)}, or a folder"
    )
    add_device_argument(group)
    group.add_argument("--cache", default=Path("out/judged"), **folder, help="keeps embeddings")
    parser.set_defaults(dtype="fp32")
    args = parser.parse_args(argv)
    given = dict(vars(args))
    if args.command == "report":
        args.metrics = [metric for metric in NEEDS if metric not in PEOPLE and given[NEEDS[metric][0]]]
    else:
        args.metrics = [args.command]
    if not args.metrics:
        parser.error("report needs at least one of --prompts, --base and --people")
    needed = dict.fromkeys(name for metric in args.metrics for name in NEEDS[metric])
    for name in needed:
        if not given[name]:
            parser.error(f"{args.command} needs --{name}")
    for name in {"prompts", "base", "people"} - needed.keys():
        setattr(args, name, None)
    what = "scores" if args.command == "report" else args.command
    args.out = args.out or Path("out") / f"{args.images.resolve().name}_{what}.json"
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    check_writable(args.out.parent, "--out")
    if args.out.exists():
        print(f"{args.out} is replaced")
    samples, photos, prompts = scan_samples(args.images), None, None
    people = sorted({sample.person for sample in samples})
    if args.people:
        least = 2 if args.command == "r-facesim" else 1  # the reference, and one to compare with
        references = read_names(args.references, "--references")
        photos = find_photos(args.people, references, people, least)
        people = list(photos)
    given = read_names(args.classes, "--classes")
    classes = {name: class_of(name, given) for name in people}
    if args.prompts:
        prompts = {kind: read_prompts(args.prompts, kind) for kind in set(classes.values())}
    rows = make_rows(samples, classes, prompts, args.base)
    missing = find_missing(samples, classes, prompts)
    if missing and not args.incomplete:
        raise UserError(f"{args.images} lacks {shorten(missing)}; --incomplete scores what is there")

    device, _ = choose_device(args)
    evaluators = load_evaluators(
        args.model, TensorCache(args.cache), device, args.clip, args.recognizer, args.detector
    )
    others = []
    if args.command in PEOPLE:
        rows, others = others, rows
        score_bleed(others, embed_references(others, photos, evaluators), evaluators, args.command)
    about = {"missing": missing, "others": others, "settings": vars(args)}
    scores = evaluate(rows, evaluators, photos, args.metrics, args.no_face, **about)
    text = write_scores(args.out, scores, args.metrics)
    print(text)
    if args.command == "report":
        page = args.out.with_suffix(".html")
        write_report(page, {args.images.name: scores}, photos, table=text)
        print(f"{page} to look at")


if __name__ == "__main__":
    run_script(main)
