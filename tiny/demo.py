"""Run the whole method on the toy model: meta-train, personalize, sample and score, by the users' commands.

    make demo          (or: python tiny/demo.py --out out/demo)

Each command is printed before it runs. At the end it prints the scores of the base model, of LoRA and of
Meta-LoRA after the same numbers of steps, and of LoRAs that are predicted without any, and names a report and
a contact sheet to look at.
"""

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image

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


def write_sheet(people: Path, pictures: Path, steps: int, path: Path) -> None:
    """Lay out photos of a few people and, below them, the pictures of each system, a column per prompt."""
    prompts, found = PROMPTS.read_text().splitlines(), scan_people(people)
    shown = ("base", "_s0", f"_s{steps}")
    systems = [folder.name for folder in pictures.iterdir() if folder.name.endswith(shown)]
    rows, labels = [], []
    for person in found[:: -(-len(found) // SHOWN)]:
        rows.append([Image.open(photo.path) for photo in person.photos[: 1 + len(prompts)]])
        labels.append(f"{person.name}: photos")
        for system in sorted(systems):
            owner = person.name.split("_")[0] if system == "base" else person.name
            places = [pictures / system / owner / f"{k:02d}" / "0.png" for k in range(len(prompts))]
            rows.append([None, *map(Image.open, places)])
            labels.append(system.split("_")[0].removesuffix("-noaug"))
    titles = ["the photo learned from", *(prompt.replace("[man/woman]", "...") for prompt in prompts)]
    with atomic(path) as temporary:
        contact_sheet(rows, labels, titles, cell=(128, 128)).save(temporary)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for all results")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--people", type=int, default=12, help="held-out people to personalize")
    parser.add_argument("--meta-steps", type=int, default=90, help="steps of the shortened meta-training")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[30, 60, 120], help="of either method in stage 2"
    )
    parser.add_argument("--lr", type=float, default=1e-2, help="learning rate of either method in stage 2")
    args = parser.parse_args()
    out, began, model = args.out.resolve(), time.time(), ["--model", args.model]

    run("tiny/people.py", "--out", out / "ids", "--people", 30, "--photos", 20, "--seed", 0)
    meta = ["train_meta.py", "--data", out / "ids", *model, "--out", out / "meta", "--r1", 32]
    meta += ["--steps", args.meta_steps, "--bucket-ids", 15, "--uses-per-image", 1, "--lr", 4e-3]
    run(*meta, "--sample-every", 0)
    print(f"\n{out / 'meta' / 'loss.png'} shows the loss. The next commands use the stage-1 file that comes")
    print("with the model, tiny/weights/meta.safetensors: the same command with more people and steps.")

    held_out = ["--people", args.people, "--photos", 8, "--photo-share", 1, "--seed", 1]
    run("tiny/people.py", "--out", out / "new", *held_out)
    person = scan_people(out / "new")[0]
    photo, lora, word = person.photos[0], out / f"{person.name}.safetensors", person.name.split("_")[0]
    training = ["--lr", args.lr, "--steps"]
    options = ["--caption", photo.caption, "--no-augment", "--samples", 0, "--out", lora, "--force"]
    run("personalize.py", photo.path, *model, *options, *training, max(args.steps))
    prompts = [f"a photo of a {word} at the beach", f"a painting of a {word} in the forest"]
    run("sample.py", *model, "--lora", lora, "--steps", 12, "--prompt", *prompts, "--out", out / "samples")

    systems = ["--method", "lora-noaug", "meta-lora-noaug", "predicted", *training, *args.steps]
    systems += ["--at-once", args.people]
    protocol = ["--people", out / "new", "--prompts", PROMPTS, "--seeds", 1, "--sample-steps", 12]
    benchmark = out / "benchmark"
    run("-m", "metaphd", "run", *model, *protocol, *systems, "--out", benchmark)
    write_sheet(out / "new", benchmark / "pictures", max(args.steps), out / "sheet.png")
    print(
        f"\n{args.people} held-out people, one photo each, learned without crops, at a learning rate chosen\n"
        "on other people: a demonstration, not a study."
    )
    print(f"Look at {out / 'sheet.png'} and {benchmark / 'report.html'}; {time.time() - began:.0f} s in all")


if __name__ == "__main__":
    main()
