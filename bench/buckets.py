"""What many identities cost: the scan, training, and a change of buckets at full size.

    python bench/buckets.py                                           # everything, an hour
    python bench/buckets.py --parts scan --photos 20                  # of 100, 1,000 and 10,000 people
    python bench/buckets.py --parts training --people 100 1000
    python bench/buckets.py --parts change --slots 50 --folder /big   # FLUX.1-dev's shapes; 6 GiB of memory

Each number is that of a process of its own. "scan" is how `train_meta.py` begins: it reads every photo whole
and writes people.jsonl; the second scan finds nothing changed. "training" is a whole run of `train_meta.py`
on the toy model: scan, encoding, steps, buckets stored; the second run continues for one step. Photos have
16 x 16 pixels: the bytes of real ones, and the time to decode them, come on top.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script from anywhere

from flux.model import Flux
from metalora import SlotAdamW, inject
from run.checkpoints import BucketStore
from run.costs import FLUX_DEV

ROOT = Path(__file__).parents[1]
PARTS = ["scan", "training", "change"]


def write_noise(folder: Path, people: int, photos: int) -> None:
    """Write people of small random pictures, with a caption each."""
    draw = np.random.default_rng(0)
    for person in range(people):
        place = folder / f"{person:05d}"
        place.mkdir(parents=True)
        for k in range(photos):
            Image.fromarray(draw.integers(0, 255, (16, 16, 3), np.uint8)).save(place / f"{k}.png")
        (place / "0.txt").write_text(f"a photo of a person {person % 10}")


SCAN = """
import sys, time
from pathlib import Path
from people.crops import common_shape
from people.manifest import scan_photos
began = time.perf_counter()
people, report = scan_photos(Path(sys.argv[1]), Path(sys.argv[2]), lambda size: common_shape(size, 64, 8))
people.contents()
print(time.perf_counter() - began)
"""


def measure(command: list) -> tuple[float, str]:
    """Run a command; return its peak of memory in GiB, and what it printed."""
    words, paths = list(map(str, command)), {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(words, stdout=-1, stderr=-3, text=True, env=paths)
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(words)[:300]} failed")
    return usage.ru_maxrss / 2**20, text


def measure_scan(folder: Path) -> list[tuple[float, float]]:
    """Scan people twice; return the peak in GiB and the seconds of each scan."""
    (folder / "out").mkdir(exist_ok=True)
    command = [sys.executable, "-c", SCAN, folder / "ids", folder / "out" / "people.jsonl"]
    return [(peak, float(text)) for peak, text in (measure(command), measure(command))]


def measure_training(folder: Path, steps: int) -> list[tuple[float, float]]:
    """Train on people, then continue for a step; return the peak in GiB and the seconds of each run."""
    command = [sys.executable, ROOT / "train_meta.py", "--model", "tiny", "--data", folder / "ids"]
    command += ["--out", folder / "out", "--r1", 8, "--uses-per-image", 1, "--save-every", 100]
    command += ["--sample-every", 0, "--keep-buckets", "--steps"]
    costs = []
    for end in (steps, steps + 1):
        began = time.perf_counter()
        peak, _ = measure([*command, end])
        costs.append((peak, time.perf_counter() - began))
    return costs


def full_size(slots: int) -> tuple[Tensor, SlotAdamW]:
    """Return FLUX.1-dev's mid and up for so many identities, filled with noise, and their optimizer."""
    with torch.device("meta"):
        model = inject(Flux(FLUX_DEV), 128, 1, slots)
    personal = torch.randn(model.factors.personal.shape)
    return personal, SlotAdamW(personal, 1e-4)


def time_of_change(folder: Path, slots: int) -> None:
    """Store a bucket, read the next one in the thread, and copy it in; print the seconds of each."""
    personal, optimizer = full_size(slots)
    each = personal.shape[1]
    store, clock = BucketStore(folder / "buckets", buckets=2), time.perf_counter
    state = {"personal": personal, "optimizer": optimizer.state_dict()}
    store.put(0, state)
    began = clock()
    store.put(1, state)
    stored = clock() - began
    began = clock()
    store.read_ahead(2)
    store.ahead[2].result()
    read = clock() - began
    began = clock()
    state = store.fetch(2)
    personal.copy_(state["personal"])
    optimizer.load_state_dict(state["optimizer"])
    opened = clock() - began
    size = store.file(1).stat().st_size / 2**30
    print(f"{slots} identities x {each / 1e6:.2f} M parameters with AdamW's state: {size:.2f} GiB a file")
    print(f"stored in {stored:.1f} s; read and checked in {read:.1f} s, while the bucket before trains;")
    print(f"copied in {opened:.2f} s. A change of buckets stops the training for {stored + opened:.1f} s.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument("--people", type=int, nargs="+", default=[100, 1000, 10_000], help="identities")
    parser.add_argument("--photos", type=int, default=4, help="of each; the paper's people have 20")
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--slots", type=int, default=50, help="identities in a bucket of full size")
    parser.add_argument("--folder", type=Path, help="where to write some GiB; default: the system's")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        if "change" in args.parts:
            time_of_change(Path(temporary), args.slots)
        parts = {"scan": measure_scan, "training": lambda folder: measure_training(folder, args.steps)}
        parts = {name: part for name, part in parts.items() if name in args.parts}
        if parts:
            print(f"{'people':>7} {'photos':>7}  part          peak     time   second", flush=True)
        for people in args.people if parts else ():
            folder = Path(temporary) / str(people)
            write_noise(folder / "ids", people, args.photos)
            for name, part in parts.items():
                costs = part(folder)
                peak, (first, second) = max(peak for peak, _ in costs), (seconds for _, seconds in costs)
                row = f"{people:>7} {people * args.photos:>7}  {name:<8} {peak:>5.2f} GiB"
                print(f"{row} {first:>6.1f} s {second:>6.1f} s", flush=True)
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
