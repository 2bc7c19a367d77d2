"""What many identities cost: memory over their number, and the time of a change of buckets at full size.

    python bench/bank.py                          # both, minutes
    python bench/bank.py --people 100 10000       # memory only, other numbers of people

Memory is the peak of a whole `train_meta.py` process in the small world: survey, encoding, training, with the
bank written. The change of buckets has the shapes of FLUX.1-dev and needs 6 GB of memory, but no model.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script from anywhere

from flux.model import Flux
from flux.plan import FLUX_DEV
from metalora import SlotAdamW, factors, inject
from runs import Bank

ROOT = Path(__file__).parents[1]


def write_noise(folder: Path, people: int, photos: int) -> None:
    """Write people of small random pictures, with a caption each."""
    draw = np.random.default_rng(0)
    for person in range(people):
        (place := folder / f"{person:05d}").mkdir(parents=True)
        for k in range(photos):
            Image.fromarray(draw.integers(0, 255, (16, 16, 3), np.uint8)).save(place / f"{k}.png")
        (place / "0.txt").write_text(f"a photo of a person {person % 10}")


def peak_of_training(folder: Path, people: int, photos: int, steps: int) -> tuple[float, float, float]:
    """Train on so many people; return the peak in MB and the seconds of the run and of its resumption."""
    write_noise(folder / "ids", people, photos)
    command = [sys.executable, ROOT / "train_meta.py", "--model", "tiny", "--data", folder / "ids"]
    command += ["--out", folder / "out", "--r1", 8, "--uses-per-image", 1, "--save-every", 100]
    command += ["--sample-every", 0, "--no-checkpointing", "--keep-buckets", "--steps"]
    found = []
    for end in (steps, steps + 1):
        began = time.perf_counter()
        process = subprocess.Popen([*map(str, command), str(end)], stdout=-3, stderr=-3)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"training on {people} people failed")
        found.append((usage.ru_maxrss / 1024, time.perf_counter() - began))
    return max(memory for memory, _ in found), found[0][1], found[1][1]


def full_size(slots: int) -> tuple[list[torch.nn.Parameter], SlotAdamW]:
    """Return FLUX.1-dev's mid and up for so many identities, filled with noise, and their optimiser."""
    with torch.device("meta"):
        model = inject(Flux(FLUX_DEV), 128, 1, slots)
    shapes = [factor.shape for factor in factors(model, "mid", "up")]
    personal = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    return personal, SlotAdamW(personal, 1e-4)


def time_of_change(folder: Path, slots: int) -> None:
    """Store a bucket, read the next in the thread, and copy it in; print the seconds of each."""
    personal, optimiser = full_size(slots)
    each = sum(p.numel() for p in personal) / slots
    bank, clock = Bank(folder / "buckets", buckets=2), time.perf_counter
    state = {"factors": [p.data for p in personal], "optimiser": optimiser.state_dict()}
    bank.store(0, state)
    began = clock()
    bank.store(1, state)
    stored = clock() - began
    began = clock()
    bank.read_ahead(2)
    bank.ahead[2].result()
    read = clock() - began
    began = clock()
    state = bank.fetch(2)
    for own, kept in zip(personal, state["factors"], strict=True):
        own.data.copy_(kept)
    optimiser.load_state_dict(state["optimiser"])
    opened = clock() - began
    size = bank.file(1).stat().st_size / 1e9
    print(f"{slots} identities x {each / 1e6:.2f} M parameters with AdamW's state: {size:.2f} GB a file")
    print(f"stored and synced {stored:.1f} s; read and checked {read:.1f} s, while the bucket before trains;")
    print(f"copied in {opened:.2f} s. A change of buckets stops the training for {stored + opened:.1f} s.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--people", type=int, nargs="+", help="numbers of identities; then memory only")
    parser.add_argument("--photos", type=int, default=4, help="of each; the paper has 20")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--slots", type=int, default=50, help="identities in a bucket of full size")
    parser.add_argument("--folder", type=Path, help="where to write, some GB; default: the system's")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        if not args.people:
            time_of_change(Path(temporary), args.slots)
        print(f"{'people':>7} {'photos':>7} {'peak':>8} {'run':>8} {'again':>8}", flush=True)
        for people in args.people or (100, 1000, 10_000):
            folder = Path(temporary) / str(people)
            peak, run, again = peak_of_training(folder, people, args.photos, args.steps)
            row = f"{people:>7} {people * args.photos:>7} {peak:>5.0f} MB {run:>6.0f} s {again:>6.0f} s"
            print(row, flush=True)


if __name__ == "__main__":
    main()
