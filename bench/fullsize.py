"""The memory that FLUX.1-dev takes at full size on a CPU, with a file of random weights.

    python bench/fullsize.py                        # everything; takes 45 GiB of disk meanwhile
    python bench/fullsize.py --only open forward    # some rows; 22.5 GiB unless `merge` is one of them

Every row is a process of its own, whose memory is read from /proc (Linux): anonymous memory, which the
process cannot do without, and pages of files, which the kernel can drop and read again. The weights are not
in the page cache when a row begins. Images and texts are small, since the question is where the weights are;
bench/memory.py counts activations at real sizes. What is written is deleted at the end, also when it fails or
is stopped.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script from anywhere

from flux import Flux, load_transformer
from flux.memory import arrange, blocks_of
from flux.model import FluxSizes
from flux.sampling import denoise
from flux.transformer import Prompt
from lora.names import part_sizes
from lora.writing import name_tensors
from metalora import inject, linear_names
from people.dataset import Batch
from personalize import updates
from run.costs import FLUX_DEV, GIB
from run.settings import Training
from train_meta import MetaLearner, update

ROOT = Path(__file__).parents[1]
ROWS = ("open", "forward", "stage2", "stage1", "merge")
MEMORY = {"resident": "VmHWM", "anonymous": "RssAnon", "of files": "RssFile"}  # of /proc/PID/status
LIMITS = {  # GiB at most
    "forward": {"resident": 1.2},
    "stage2": {"anonymous": 3.0, "of files": 4.0},
    "merge": {"anonymous": 2.0},
}
STD = 0.02  # of the weights: so a layer of 3,072 inputs about keeps the norm of its input


# --- What is written ---------------------------------------------------------------------------------------


def write_checkpoint(path: Path, sizes: FluxSizes = FLUX_DEV) -> None:
    """Write a transformer of random bfloat16 weights under its own names, one tensor at a time in memory."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in sorted(Flux(sizes).state_dict().items())}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * shape.numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(0)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        bar = tqdm(total=end, desc=path.name, unit="B", unit_scale=True, mininterval=2, dynamic_ncols=True)
        for name, shape in shapes.items():
            mean = 1.0 if name.endswith(".scale") else 0.0  # of the norms
            tensor = torch.empty(shape, dtype=torch.bfloat16).normal_(mean, STD, generator=generator)
            bar.update(file.write(memoryview(tensor.view(-1).view(torch.uint8).numpy())))
        bar.close()
        os.fsync(file.fileno())


def write_lora(path: Path, sizes: FluxSizes, rank: int) -> None:
    """Write a random LoRA of every layer that we adapt, in float16 in diffusers' format."""
    with torch.device("meta"):
        model = Flux(sizes)
    lora = {}
    for name, parts in linear_names(model):
        d_out, d_in = model.get_submodule(name).weight.shape
        for part, rows in zip(parts, part_sizes(len(parts), d_out, d_in)):
            lora[part] = (torch.randn(rank, d_in) * STD).half(), (torch.randn(rows, rank) * STD).half()
    save_file(name_tensors(lora, "diffusers"), path)


# --- What is measured, in a process of its own -------------------------------------------------------------


def inputs(args: argparse.Namespace, batch: int, model: Flux) -> tuple[Tensor, Prompt]:
    """Return random latents, and a prompt."""
    side, sizes = args.resolution // 8, model.sizes
    txt = torch.randn(batch, args.tokens, sizes.txt_size).bfloat16()
    latents = torch.randn(batch, sizes.in_channels // 4, side, side)
    return latents, {"txt": txt, "pooled": torch.randn(batch, sizes.pooled_size).bfloat16()}


def forward(args: argparse.Namespace, model: Flux) -> Tensor:
    """Sample in a single step."""
    return denoise(arrange(model, "cpu", stream=len(blocks_of(model))), *inputs(args, 1, model), steps=1)


def train(args: argparse.Namespace, model: Flux) -> Tensor:
    """Do steps of stage 1 or 2 as the scripts do them; return the last loss."""
    stage1 = args.row == "stage1"
    b, identities = (args.batch, args.identities) if stage1 else (1, 1)
    inject(model, r1=128, r2=1, slots=identities)
    arrange(model, "cpu", checkpoint="all", stream=len(blocks_of(model)))
    batches = []
    for _ in range(args.steps):
        latents, prompt = inputs(args, b, model)
        batch = {"latents": latents, "noise": torch.randn_like(latents), "t": torch.rand(b)}
        batches.append(batch | prompt)
    if stage1:
        learner, slots = MetaLearner(model, Training()), torch.arange(b) % identities
        for batch in batches:
            loss = update(model, learner, Batch(batch, slots, []), False, Training())["loss"]
        return loss
    for meta_down in model.factors.meta_down:
        meta_down.data = meta_down.data.half()  # as `metalora.assign_meta` leaves it
        meta_down.requires_grad_(False)
    return [*updates(model, model.factors.personal, batches, Training())][-1].detach()


def run_row(args: argparse.Namespace) -> None:
    """Do what a row measures, and print the seconds that it took."""
    torch.manual_seed(0)
    began = time.perf_counter()
    model = load_transformer(args.file)
    if args.row != "open":
        result = (forward if args.row == "forward" else train)(args, model)
        assert result.isfinite().all(), "the result is infinite or NaN"
    print(time.perf_counter() - began)


# --- Watching ----------------------------------------------------------------------------------------------


def watch(command: list[object]) -> tuple[str, dict[str, float]]:
    """Run a command; return what it printed, and the peaks of its memory in GiB."""
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True)
    peaks, status = defaultdict(int), Path(f"/proc/{process.pid}/status")
    try:
        while process.poll() is None:
            for line in status.read_text().splitlines():
                name, _, _ = line.partition(":")
                if name in MEMORY.values():
                    peaks[name] = max(peaks[name], int(line.split()[1]))  # kB
            time.sleep(0.01)
    finally:
        process.terminate()
        printed, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed ({process.returncode})")
    return printed, {name: peaks[key] * 1024 / GIB for name, key in MEMORY.items()}


def measure(row: str, args: argparse.Namespace, folder: Path) -> str:
    """Measure one row and return it as a line of the table."""
    with args.file.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # drop it from the page cache
    if row == "merge":
        lora = folder / "lora.safetensors"
        write_lora(lora, load_transformer(args.file, "meta").sizes, args.rank)
        out, began = folder / "merged.safetensors", time.perf_counter()
        command = [sys.executable, "-m", "lora", "merge", args.file, out, "--lora", lora]
        _, peaks = watch(command)
        seconds = time.perf_counter() - began
        out.unlink()
    else:
        command = [sys.executable, __file__, "--row", row, "--file", args.file]
        for name in ("resolution", "tokens", "identities", "batch", "steps"):
            command += [f"--{name}", getattr(args, name)]
        printed, peaks = watch(command)
        seconds = float(printed)
    limits = LIMITS.get(row, {})
    over = "(!)" if any(peaks[name] > most for name, most in limits.items()) else ""
    limits = ", ".join(f"{name} {most}" for name, most in limits.items())
    numbers = " | ".join(f"{peaks[name]:.2f}" for name in MEMORY)
    return f"| {describe(row, args)} | {seconds:.1f} | {numbers} | {limits} {over}|"


def describe(row: str, args: argparse.Namespace) -> str:
    batch, people = (args.batch, f", {args.identities} identities") if row == "stage1" else (1, "")
    tokens = f"{batch} x {args.resolution}px + {args.tokens}"
    return {
        "open": "open and assign",
        "forward": f"a forward pass, {tokens}, all blocks streamed",
        "merge": f"python -m lora merge, rank {args.rank}",
    }.get(row, f"{args.steps} step(s) of {row}, {tokens}, r1 128{people}, all recomputed and streamed")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=ROWS, default=ROWS, metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--out", type=Path, default=Path("out/fullsize"), help="where to write")
    parser.add_argument("--file", type=Path, help="flux1-dev.safetensors; default: random weights")
    parser.add_argument("--resolution", type=int, default=256, help="pixels of a side")
    parser.add_argument("--tokens", type=int, default=64, help="of text; FLUX.1-dev is used with 512")
    parser.add_argument("--identities", type=int, default=4, help="in stage 1; the paper's buckets have 50")
    parser.add_argument("--batch", type=int, default=4, help="of stage 1; stage 2's is 1")
    parser.add_argument("--steps", type=int, default=1, help="of training")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA that is merged")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)  # a process that is watched
    args = parser.parse_args(argv)
    if args.row:
        return run_row(args)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that files are deleted
    args.out.mkdir(parents=True, exist_ok=True)
    needed = 22.5 * ((args.file is None) + ("merge" in args.only))
    free = shutil.disk_usage(args.out).free / GIB
    if free < needed:
        raise SystemExit(f"{args.out} has {free:.0f} GiB free, {needed:.0f} are needed")
    try:
        with tempfile.TemporaryDirectory(prefix="fullsize", dir=args.out) as folder:
            if args.file is None:
                args.file, began = Path(folder) / "flux1-dev.safetensors", time.perf_counter()
                write_checkpoint(args.file)
                print(f"{args.file.stat().st_size:,} bytes written in {time.perf_counter() - began:.0f} s")
            print("python bench/fullsize.py", *(sys.argv[1:] if argv is None else argv))
            print("| what | s | resident, GiB | anonymous | of files | at most |\n|---|---|---|---|---|---|")
            for row in args.only:
                print(measure(row, args, Path(folder)), flush=True)
    finally:
        with suppress(OSError):  # something else is in it
            args.out.rmdir()


if __name__ == "__main__":
    main()
