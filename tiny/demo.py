"""The whole job in the small world, by the commands a user would type: meta-train, learn, sample, score.

    make demo          (or: python tiny/demo.py --out out/demo)

Each command is printed before it runs. At the end stand the scores of the base model, LoRA and Meta-LoRA
after the same numbers of steps, a report and a contact sheet to look at.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script from anywhere

from people.folders import scan_people
from run.files import atomic
from run.pictures import contact_sheet

ROOT = Path(__file__).parents[1]
PROMPTS = ROOT / "tiny" / "prompts.txt"
SHOWN = 3  # people on the contact sheet; they fill a screen


def run(*command: object) -> None:
    """Print a command as a user would type it, and run it."""
    print("\n$ python", shlex.join(str(word) for word in command), flush=True)
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)


def draw_curve(log: Path, path: Path, height: int = 200, width: int = 480) -> None:
    """Draw the loss of a meta-training run, each step and its running mean."""
    losses = [json.loads(line)["loss"] for line in log.read_text().splitlines()]
    losses = [loss for loss in losses if loss is not None]  # a skipped step has none
    low, high = min(losses), max(losses)
    image = Image.new("RGB", (width, height), "white")
    draw, points, mean = ImageDraw.Draw(image), [], losses[0]
    for step, loss in enumerate(losses):
        x, mean = 10 + (width - 20) * step / len(losses), 0.95 * mean + 0.05 * loss
        y, y_mean = (
            height - 10 - (height - 20) * (value - low) / (high - low + 1e-9) for value in (loss, mean)
        )
        draw.point((x, y), "silver")
        points.append((x, y_mean))
    draw.line(points, "black", 2)
    draw.text((14, 4), f"loss of {len(losses)} steps, {low:.2f} to {high:.2f}", "black")
    with atomic(path) as temporary:
        image.save(temporary)


def draw_sheet(people: Path, pictures: Path, steps: int, path: Path) -> None:
    """Lay out photos of some people and, below, what each system made of them, a column per prompt."""
    prompts, everybody = PROMPTS.read_text().splitlines(), scan_people(people)
    systems = [folder.name for folder in pictures.iterdir() if folder.name.endswith(("base", f"_s{steps}"))]
    rows, labels = [], []
    for person in everybody[:: -(-len(everybody) // SHOWN)]:
        rows.append([Image.open(photo.path) for photo in person.photos[: 1 + len(prompts)]])
        labels.append(f"{person.name}: photos")
        for system in sorted(systems):
            whose = person.name.split("_")[0] if system == "base" else person.name
            made = [Image.open(pictures / system / whose / f"{k:02d}" / "0.png") for k in range(len(prompts))]
            rows.append([None, *made])
            labels.append(system.split("_")[0].removesuffix("-noaug"))
    titles = ["the photo learned from", *(prompt.replace("[man/woman]", "...") for prompt in prompts)]
    with atomic(path) as temporary:
        contact_sheet(rows, labels, titles, cell=(128, 128)).save(temporary)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path("out/demo"), help="folder for everything that is written"
    )
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--people", type=int, default=12, help="held-out people to learn")
    parser.add_argument("--meta-steps", type=int, default=200, help="steps of the shortened meta-training")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[30, 60, 120], help="of either method in stage 2"
    )
    parser.add_argument("--lr", type=float, default=1e-2, help="learning rate of either method in stage 2")
    args = parser.parse_args()
    out, began, small = args.out.resolve(), time.time(), ["--model", args.model]

    run("tiny/people.py", "--out", out / "ids", "--people", 60, "--photos", 20, "--seed", 0)
    meta = ["train_meta.py", "--data", out / "ids", *small, "--out", out / "meta", "--r1", 32]
    meta += ["--steps", args.meta_steps, "--bucket-ids", 20, "--uses-per-image", 1, "--lr", 4e-3]
    run(*meta, "--sample-every", 0)
    draw_curve(out / "meta" / "log.jsonl", out / "curve.png")
    print(
        "\nThe shipped prior, tiny/weights/meta.safetensors, is the same command with more people and steps."
    )

    new = ["tiny/people.py", "--out", out / "new", "--people", args.people, "--photos", 8, "--photo-share", 1]
    run(*new, "--seed", 1)
    person = scan_people(out / "new")[0]
    photo, learned, word = person.photos[0], out / f"{person.name}.safetensors", person.name.split("_")[0]
    setting = ["--lr", args.lr, "--steps"]
    own = ["--caption", photo.caption, "--no-augment", "--samples", 0, "--out", learned]
    run("personalize.py", photo.path, *small, *own, *setting, max(args.steps))
    prompts = [f"a photo of a {word} at the beach", f"a painting of a {word} in the forest"]
    run("sample.py", *small, "--lora", learned, "--steps", 12, "--prompt", *prompts, "--out", out / "samples")

    systems = ["--method", "lora-noaug", "meta-lora-noaug", *setting, *args.steps, "--at-once", args.people]
    protocol = ["--people", out / "new", "--prompts", PROMPTS, "--seeds", 1, "--sample-steps", 12]
    bench = out / "benchmark"
    run("-m", "metaphd", "run", *small, *protocol, *systems, "--out", bench)
    draw_sheet(out / "new", bench / "pictures", max(args.steps), out / "sheet.png")
    print(
        f"\n{args.people} held-out people, one photo each, learned without crops, at a learning rate chosen"
    )
    print("after a look at other people: a demonstration, not a study.")
    print(f"{out / 'sheet.png'} and {bench / 'report.html'} to look at; {time.time() - began:.0f} s in all")


if __name__ == "__main__":
    main()
