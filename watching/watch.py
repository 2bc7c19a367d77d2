"""What --watch does: every so many updates make pictures, score them, and write all that was seen so far."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from tqdm import tqdm

import flux
from flux.memory import release
from flux.sampling import generate
from flux.transformer import Prompt, Transformer
from metalora import export_lora
from people.crops import fit_shape
from people.encoding import stack_prompts
from run.files import atomic, beside
from run.pictures import save_sheet
from scoring.tables import TITLES
from watching.judge import Judge
from watching.sheet import State, lay_out_sheet

SIDE = 512  # pixels at most: a quarter of FLUX's area
EULER_STEPS = 12  # at most


def watched_steps(every: int, steps: int) -> list[int]:
    """Return the numbers of updates that are watched: 0, those after every so many, and the last."""
    return [*range(0, steps, every), steps]


def list_files(out: Path, every: int, steps: int, keep: bool) -> list[Path]:
    """List what is written beside the LoRA file `out`: sheet, table and, to keep, each trained state."""
    kept = [f"_{step}.safetensors" for step in watched_steps(every, steps)[1:] if keep]
    return [beside(out, ending) for ending in ("_watch.png", "_watch.csv", *kept)]


@dataclass
class Watch:
    """Look at the adapter as it is, whenever called with one of the watched numbers of updates.

    Pictures have few pixels and few steps. The training's random numbers have generators of their own, and
    the model is as before when a call returns, so that the training is the same as without.
    """

    model: Transformer
    out: Path  # the LoRA file, beside which all is written
    steps: list[int]  # those watched
    judge: Judge
    photo: Image.Image
    prompts: dict[str, Prompt]
    autoencoder: Path  # in memory only while pictures are made
    resolution: int  # of the training
    seed: int  # of all pictures
    sampler: dict
    about: dict | None  # what a LoRA file says of itself; None: the states are not kept
    form: str  # of these files
    seen: list[State] = field(default_factory=list)

    def __call__(self, step: int) -> None:
        """Write the LoRA, the sheet and the table, if the number of updates `step` is watched."""
        # After a number that is not finite the training says which loss it was.
        if step not in self.steps or not self.model.factors.personal.isfinite().all():
            return
        if self.about and step:
            path = beside(self.out, f"_{step}.safetensors")
            export_lora(self.model, path, self.about | {"steps": step}, form=self.form)
        pictures = self.generate()
        self.seen.append(State(step, pictures, self.judge.score(pictures)))
        save_sheet(lay_out_sheet(self.photo, self.seen, [*self.prompts]), beside(self.out, "_watch.png"))
        write_table(self.seen, beside(self.out, "_watch.csv"))
        means = [f"{TITLES[metric]} {value:.3f}" for metric, value in self.seen[-1].means.items()]
        tqdm.write(f"step {step}: {', '.join([*means, f'{len(pictures)} pictures'])}")

    def generate(self) -> list[Image.Image]:
        """Make a picture of each prompt, all with the same seed."""
        device, dtype = self.model.img_in.weight.device, self.model.img_in.weight.dtype
        autoencoder = flux.load_autoencoder(self.autoencoder, device, dtype)
        side = min(self.resolution, SIDE)
        size = fit_shape((side, side), side, autoencoder.sizes.token_pixels)
        sampler = self.sampler | {"steps": min(self.sampler["steps"], EULER_STEPS)}
        prompts, seeds = stack_prompts([*self.prompts.values()]), [self.seed] * len(self.prompts)
        # In one batch, so that a streamed model is read once a step.
        pictures = generate(self.model, autoencoder, prompts, seeds, size, **sampler)
        del autoencoder
        release(device)
        return pictures


def write_table(states: Sequence[State], path: Path) -> None:
    """Write the mean scores of each state as CSV: step, facesim, clip-t; empty if unknown."""
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ("step", "facesim", "clip-t"), restval="", lineterminator="\n")
        writer.writeheader()
        for state in states:
            means = {metric: f"{value:.4f}" for metric, value in state.means.items()}
            writer.writerow({"step": state.step} | means)
