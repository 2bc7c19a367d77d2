"""The whole job in the small world, by the commands a user would type: meta-train, learn, sample, score.

    make demo          (or: python tiny/demo.py --out out/demo)

Each command is printed before it runs. At the end stand a table of how close the pictures are to the person,
for the base model, LoRA and Meta-LoRA at the same number of steps, and a contact sheet to look at.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script from anywhere

from data import Person, contact_sheet, scan_people, to_tensor
from flux.loading import atomic
from tiny.judges import load_judges

ROOT = Path(__file__).parents[1]
PROMPTS = (
    "a photo of a {} at the beach wearing a red shirt",
    "a photo of a {} in the city in a yellow shirt",
    "a photo of a {} at night wearing a white shirt",
    "a painting of a {} in the forest",
    "a sketch of a {} wearing a green shirt",
    "a neon picture of a {} in the desert",
)
SYSTEMS = ("base", "lora", "meta-lora")


def run(*command: object) -> None:
    """Print a command as a user would type it, and run it."""
    print("\n$ python", shlex.join(str(word) for word in command), flush=True)
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)


def draw_curve(log: Path, path: Path, height: int = 200, width: int = 480) -> None:
    """Draw the loss of a meta-training run, each step and its running mean."""
    losses = [json.loads(line)["loss"] for line in log.read_text().splitlines()]
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


def personalize(person: Person, out: Path, args: argparse.Namespace) -> None:
    """Learn a person from the first photo, with the prior and without, and sample with each system."""
    reference = person.photos[0]
    word = person.name.split("_")[0]  # man or woman
    prompts = [prompt.format(word) for prompt in PROMPTS]
    for system in SYSTEMS:
        lora = out / f"{system}.safetensors"
        if system != "base":
            learn = ["personalize.py", reference.path, "--model", args.model, "--method", system]
            learn += ["--caption", reference.caption, "--steps", args.steps, "--lr", args.lr, "--no-augment"]
            run(*learn, "--samples", 0, "--no-checkpointing", "--out", lora)
        draw = ["sample.py", "--model", args.model, "--steps", 12, "--prompt", *prompts]
        run(*draw, "--out", out / system, *([] if system == "base" else ["--lora", lora]))


def look(path: Path) -> torch.Tensor:
    """Read a picture as the judges see it, (1, 3, 64, 64)."""
    return to_tensor(Image.open(path).convert("RGB"), (64, 64))[None]


@torch.no_grad()
def score(person: Person, out: Path, judges: tuple) -> dict[str, tuple[float, float]]:
    """Per system, the mean cosine with the person's other photos, and the prompt adherence."""
    identity, prompt = judges
    others = identity(torch.cat([look(photo.path) for photo in person.photos[1:]]))
    word = person.name.split("_")[0]
    scores = {}
    for system in SYSTEMS:
        pictures = torch.cat([look(path) for path in sorted((out / system).glob("0*.png"))])
        likeness = (identity(pictures) @ others.T).mean().item()
        told = [
            prompt.adherence(picture[None], p.format(word)).item() for picture, p in zip(pictures, PROMPTS)
        ]
        scores[system] = likeness, sum(told) / len(told)
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path("out/demo"), help="folder for everything that is written"
    )
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--people", type=int, default=6, help="held-out people to learn")
    parser.add_argument("--meta-steps", type=int, default=200, help="steps of the shortened meta-training")
    parser.add_argument("--steps", type=int, default=60, help="steps of either method in stage 2")
    parser.add_argument("--lr", type=float, default=1e-2, help="learning rate of either method in stage 2")
    args = parser.parse_args()
    out, began = args.out.resolve(), time.time()

    run("tiny/people.py", "--out", out / "ids", "--people", 60, "--photos", 20, "--seed", 0)
    meta = ["train_meta.py", "--data", out / "ids", "--model", args.model, "--out", out / "meta", "--r1", 32]
    meta += ["--steps", args.meta_steps, "--bucket-ids", 20, "--uses-per-image", 1, "--lr", 4e-3]
    run(*meta, "--sample-every", 0, "--no-checkpointing")
    draw_curve(out / "meta" / "log.jsonl", out / "curve.png")
    print(
        "\nThe shipped prior, tiny/weights/meta.safetensors, is the same command with more people and steps."
    )

    new = ["tiny/people.py", "--out", out / "new", "--people", args.people, "--photos", 8, "--photo-share", 1]
    run(*new, "--seed", 1)
    judges, rows, labels, table = load_judges(ROOT / "tiny" / "weights" / "judges"), [], [], []
    for person in scan_people(out / "new"):
        personalize(person, out / person.name, args)
        table.append(score(person, out / person.name, judges))
        photos = [Image.open(photo.path) for photo in person.photos]
        rows.append(photos[:7])
        labels.append(f"{person.name}: photos")
        for system in SYSTEMS:
            rows.append(
                [None, *(Image.open(path) for path in sorted((out / person.name / system).glob("0*.png")))]
            )
            labels.append(system)
    with atomic(out / "sheet.png") as temporary:
        first = 3 * (1 + len(SYSTEMS))  # three people fill a screen
        titles = ["the photo learned from", *(prompt.format("...") for prompt in PROMPTS)]
        contact_sheet(rows[:first], labels[:first], titles, cell=(128, 128)).save(temporary)

    print(
        f"\n{args.people} held-out people, one photo each, {args.steps} steps, {len(PROMPTS)} pictures each:"
    )
    print(f"{'':10} {'likeness':>9} {'prompt':>7}")
    for system in SYSTEMS:
        likeness, told = (sum(scores[system][k] for scores in table) / len(table) for k in (0, 1))
        print(f"{system:10} {100 * likeness:9.1f} {100 * told:7.1f}")
    print("likeness: cosine with the person's other photos x 100; prompt: attributes shown as asked, percent")
    print(
        f"The setting, {args.steps} steps on the whole photo without crops, was chosen after a look: likeness"
    )
    print("can be seen and the methods still differ. --steps, --lr and --people try others.")
    print(f"{out / 'sheet.png'} to look at; {time.time() - began:.0f} s in all")


if __name__ == "__main__":
    main()
