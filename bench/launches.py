"""How many operations a step dispatches, and how long the host takes for it: what a fast GPU waits for.

    python bench/launches.py                    # half a minute on two cores

The model has the 57 blocks of FLUX.1-dev at a toy width, so that almost all time goes into dispatching.
Views, which start no kernel on a GPU, are not counted. diffusers + peft takes its steps in turns with ours.
"""

import argparse
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script from anywhere

from bench.step import inputs, measure, our_model, theirs_training
from flux.memory import checkpoint_blocks
from metalora import inject
from run.settings import Training
from scoring.tables import markdown
from train_meta import MetaLearner

# FLUX.1-dev has a hidden size of 3,072, and 4,608 tokens at 1024 x 1024.
SIZES = {"hidden_size": 128, "depth": 19, "depth_single": 38, "tokens": 16, "txt_tokens": 8, "txt_size": 32}
SIZES |= {"batch": 1, "device": "cpu", "dtype": torch.float32}


class OperationCounter(TorchDispatchMode):
    """Counts the operations that compute or copy something."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        starts_nothing = op.is_view or op.name().startswith(("aten::empty", "aten::_unsafe_view"))
        self.count += not starts_nothing
        return op(*args, **kwargs or {})


def operations(function: Callable) -> int:
    """Return how many operations a call dispatches, the second time."""
    function()
    with OperationCounter() as counter:
        function()
    return counter.count


def stage2_step(args: Namespace, adapted: bool = True) -> Callable:
    """Return forward and backward of stage 2; without adapters the gradient is that of the input alone."""
    model, given = our_model(args), inputs(args)
    trained = given["img"].requires_grad_(not adapted)
    if adapted:
        trained = inject(model, 128, 1, 1).factors.personal
        for p in model.factors.meta_down:
            p.requires_grad_(False)
    checkpoint_blocks(model, args.recomputed)
    return lambda: torch.autograd.grad(model(**given).float().square().mean(), trained)


def stage1_updates(args: Namespace) -> Callable:
    """Return clipping and both optimizers of a step of stage 1."""
    model = inject(our_model(args), 8, 1, 4)
    learner, slots, finite = MetaLearner(model, Training()), torch.tensor([0, 2]), torch.tensor(True)
    for p in model.factors.parameters():
        p.grad = torch.ones_like(p)

    def update() -> None:
        learner.step_mid_and_up(slots, finite)
        learner.step_meta_down(torch.ones(()), finite)

    return update


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10, help="times that everything is timed")
    rounds = parser.parse_args().rounds
    lines = [["what", "ours", "relative to", "ratio"]]
    for recomputed in ("none", "all"):
        args = Namespace(**SIZES, recomputed=recomputed)
        title = f"stage 2, {recomputed} recomputed"
        ours, frozen = (operations(stage2_step(args, adapted)) for adapted in (True, False))
        against = f"{frozen:,} without adapters"
        lines.append([f"{title}: operations", f"{ours:,}", against, f"{ours / frozen:.2f}"])
        steps = {"ours": stage2_step(args), "theirs": theirs_training(args, 1, recomputed)}
        ours, theirs = (1000 * torch.tensor(times) for times in measure(steps, rounds, "cpu").values())
        against = f"{theirs.median():.0f} ms with diffusers + peft, rank 1"
        ratio = (ours / theirs).median()
        lines.append([f"{title}: host time", f"{ours.median():.0f} ms", against, f"{ratio:.2f}"])
    updates = operations(stage1_updates(args))
    lines.append(["stage 1, clipping and optimizers: operations", f"{updates:,}", "", ""])
    print(f"python {' '.join(sys.argv)}\n\n{markdown(lines)}")


if __name__ == "__main__":
    main()
