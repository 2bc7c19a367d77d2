"""CLIP-T, CLIP-I, FaceSim and R-FaceSim on pictures by any system (paper, section 4.3 and Algorithm 3)."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from flux.errors import UserError
from people.cache import TensorCache
from run.arguments import Manual, Parser
from run.command import run_script
from run.files import check_writable
from run.models import SHIPPED, add_device_argument, choose_device
from scoring.evaluators import Judges, add_judge_arguments, load_judges
from scoring.report import write_report
from scoring.samples import (
    class_of,
    find_missing,
    find_photos,
    make_rows,
    read_names,
    read_prompts,
    scan_samples,
)
from scoring.tables import TITLES, shorten, summarize, write_scores

NEEDS = {"clip-t": "prompts", "clip-i": "base", "facesim": "people", "r-facesim": "people"}

# Formulas: embeddings (n, d) of n pictures in, cosines (n,) out


def clip_t(pictures: Tensor, prompts: Tensor) -> Tensor:
    """Compare each picture with its prompt: the cosine, as CLIP's embeddings have length 1."""
    return (pictures * prompts).sum(dim=-1)


def clip_i(pictures: Tensor, base: Tensor) -> Tensor:
    """Compare each picture with the base model's for the same prompt and seed."""
    return F.cosine_similarity(pictures, base, dim=-1)


def facesim(faces: Tensor, reference: Tensor) -> Tensor:
    """Compare each face with that of the photo which the system was given, (d,)."""
    return F.cosine_similarity(faces, reference, dim=-1)


def r_facesim(faces: Tensor, others: Tensor) -> Tensor:
    """Average over the person's other photos, (k, d), without the reference: S(i, p) of Algorithm 3."""
    return F.cosine_similarity(faces[:, None], others, dim=-1).mean(dim=1)  # (n, k) -> (n,)


# Scores


def score(rows: Sequence[dict], judges: Judges, photos=None, no_face: str = "zero") -> None:
    """Add to the rows of `make_rows` the scores that they allow, and the number of faces.

    A score that is not to be had is None. photos: of each person, the reference first. no_face: zero or skip.
    Raises ValueError on photos without a face.
    """
    pictures = [row["path"] for row in rows]
    if {"text", "base"} & rows[0].keys():
        images = judges.embed_images(pictures)
    if "text" in rows[0]:
        put(rows, "clip-t", clip_t(images, judges.embed_texts([row["text"] for row in rows])))
    if "base" in rows[0]:
        put(rows, "clip-i", clip_i(images, judges.embed_images([row["base"] for row in rows])))
    if photos:
        real = embed_photos({row["person"]: photos[row["person"]] for row in rows}, judges)
        for row, face, count in zip(rows, *judges.embed_faces(pictures)):
            reference, others = real[row["person"]].tensor_split([1])
            scored = count or no_face == "zero"  # without a face the embedding is zero, and all cosines are
            row["faces"] = count
            row["facesim"] = facesim(face[None], reference).item() if scored else None
            row["r-facesim"] = r_facesim(face[None], others).item() if scored and len(others) else None


def embed_photos(photos: dict[str, Sequence[Path]], judges: Judges) -> dict[str, Tensor]:
    """Embed everybody's real photos, (n, d) each; ValueError names those without a face."""
    real, blank = {}, []
    for name, paths in photos.items():
        real[name], counts = judges.embed_faces(paths)
        blank += [str(path) for path, count in zip(paths, counts) if count == 0]
    if blank:
        raise UserError(f"no face found in {shorten(blank)}: replace or remove")
    return real


def put(rows: Sequence[dict], metric: str, values: Tensor) -> None:
    for row, value in zip(rows, values.tolist(), strict=True):
        row[metric] = value


def evaluate(
    rows: Sequence[dict],
    judges: Judges,
    photos: dict | None,
    metrics: Sequence[str],
    no_face: str,
    missing: Sequence[str] = (),
    **about,
) -> dict:
    """Score the rows and return all that is to be written of a system, `about` it what the caller knows."""
    score(rows, judges, photos, no_face)
    judged = {"name": judges.name, "note": judges.note, "weights": judges.used}
    remarks = remark(rows, missing, no_face)
    return {**about, "judges": judged, "remarks": remarks, **summarize(rows, metrics), "pictures": rows}


def remark(rows: Sequence[dict], missing: list[str], no_face: str) -> dict[str, list[str]]:
    """Name the pictures and people whose scores need a word."""
    faces = [(str(row["path"]), row.get("faces", 1)) for row in rows]
    alone = {row["person"] for row in rows if row.get("faces") and row["r-facesim"] is None}
    remarks = {
        "missing": missing,
        f"no face found, {'counted as 0' if no_face == 'zero' else 'left out'}": [
            path for path, count in faces if count == 0
        ],
        "several faces, the largest is judged": [path for path, count in faces if count > 1],
        "no photo besides the reference, so no R-FaceSim": sorted(alone),
    }
    return {title: names for title, names in remarks.items() if names}


# Command line

MANUAL = """
Score pictures of people, made by any system, with the metrics of the Meta-LoRA paper.

commands:
  clip-t      does it show what the prompt says? CLIP's cosine of picture and prompt; needs --prompts
  clip-i      is it still the base model's scene? CLIP's cosine with that one's picture; needs --base
  facesim     is it the person? cosine of the face with the reference photo's; needs --people
  r-facesim   the same, a copied pose unrewarded: mean cosine with the person's other photos; needs --people
  report      all of these for which there is input

files:
  --images    DIR/<person>/<prompt>/<seed>.png, every prompt with the same seeds. A prompt's folder begins
              with its place in the list, counted from 0: 03, or 03_any-words
  --prompts   a prompt per line, [man/woman] and [his/her] filled in by class; or a folder, as prompts/,
              with a <class>.txt for each class
  --base      DIR/<prompt>/<seed>.png under the same names; in DIR/<class> or DIR/<person> where they differ
  --people    DIR/<person>/*.jpg|png, real photos; the first by name is the reference, which the system was
              given, unless --references names another: {"anna": "03.jpg"}
  --classes   {"anna": "woman", ...}; without it woman_anna is a woman, man_2 a man, others a person
  --out       FILE.json with all numbers, as they are; beside it FILE.csv with those of every picture, the
              table as FILE.md, and of report a page to look at, FILE.html. Tables are times 100: the mean
              over seeds, then prompts, then people, and its 95 % confidence interval over people by
              Student's t; and the relative difference of R-FaceSim from FaceSim (the paper's table 3), a
              dash where FaceSim itself may be chance. What is left out is named.
  A picture by sample.py says what it was made from: a prompt other than the list's is an error.

judges:
  CLIP ViT-B/32, and Inception-ResNet-v1 on the largest face that YuNet finds. But pictures of a --model that
  brings judges of its own, as tiny does in tiny/weights/judges, are theirs: CLIP-T is then the share of what
  the prompt names (of all that they know: scene, shirt, ...) that is seen, CLIP-I the cosine of what is seen
  in both pictures, and a face the whole picture. Such scores say so, and compare with no others.

examples:
  python metrics.py report --images out/mine --people photos --prompts prompts/frontal.txt
  python metrics.py clip-t --images out/mine --prompts prompts
  python metrics.py report --model tiny --images out/drawn --people drawn --prompts words.txt
"""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=MANUAL, formatter_class=Manual)
    parser.add_argument("command", choices=[*TITLES, "report"], metavar="command", help="one of the above")
    folder, file = {"type": Path, "metavar": "DIR"}, {"type": Path, "metavar": "FILE"}
    parser.add_argument("--images", required=True, **folder, help="pictures to be scored")
    parser.add_argument("--prompts", **file, help="what they were made from; or a folder")
    parser.add_argument("--base", **folder, help="the base model's pictures")
    parser.add_argument("--people", **folder, help="real photos of the people")
    parser.add_argument("--references", **file, help="which photo of each person the system was given")
    parser.add_argument("--classes", **file, help="class of each person")
    parser.add_argument("--out", **file, help="default: out/scores.json, or out/<command>.json")
    parser.add_argument("--incomplete", action="store_true", help="score although pictures are missing")
    add_judge_arguments(parser)
    group = parser.add_argument_group("model")
    group.add_argument("--model", help=f"whose judges to take: {', '.join(SHIPPED)}, or a model folder")
    add_device_argument(group)
    group.add_argument("--cache", default=Path("out/judged"), **folder, help="embeddings to keep")
    parser.set_defaults(dtype="fp32")
    args = parser.parse_args(argv)
    args.metrics = [args.command] if args.command != "report" else [m for m in TITLES if vars(args)[NEEDS[m]]]
    if lacking := [NEEDS[metric] for metric in args.metrics if not vars(args)[NEEDS[metric]]]:
        parser.error(f"{args.command} needs --{lacking[0]}")
    if not args.metrics:
        parser.error("report needs at least one of --prompts, --base and --people")
    unused = {*NEEDS.values()} - {NEEDS[metric] for metric in args.metrics}
    vars(args).update(dict.fromkeys(unused))
    args.out = args.out or Path("out") / f"{'scores' if args.command == 'report' else args.command}.json"
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    check_writable(args.out.parent, "--out")
    samples, photos, prompts = scan_samples(args.images), None, None
    people = sorted({sample.person for sample in samples})
    if args.people:
        least = 2 if args.command == "r-facesim" else 1  # the reference, and one to compare with
        references = read_names(args.references, "--references")
        people = list(photos := find_photos(args.people, references, people, least))
    given = read_names(args.classes, "--classes")
    classes = {name: class_of(name, given) for name in people}
    if args.prompts:
        prompts = {kind: read_prompts(args.prompts, kind) for kind in set(classes.values())}
    rows = make_rows(samples, classes, prompts, args.base)
    missing = find_missing(samples, classes, prompts)
    if missing and not args.incomplete:
        raise UserError(f"{args.images} lacks {shorten(missing)}; --incomplete scores what is there")

    judges = load_judges(args, TensorCache(args.cache), choose_device(args)[0])
    scores = evaluate(rows, judges, photos, args.metrics, args.no_face, missing, settings=vars(args))
    print(text := write_scores(args.out, scores, args.metrics))
    if args.command == "report":
        page = args.out.with_suffix(".html")
        write_report(page, {args.images.name: scores}, photos, table=text)
        print(f"{page} to look at")


if __name__ == "__main__":
    run_script(main)
