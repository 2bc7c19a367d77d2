"""The time of a step relative to diffusers + peft; both run in turns in one process, since only ratios count.

    python bench/step.py                    # a minute or two on two cores
    python bench/step.py --device cuda --hidden-size 3072 --depth 2 --depth-single 4 --dtype bf16

Both sides have the same sizes, batch and activation checkpointing, and random weights. peft adapts the same
layers, with one LoRA for the whole batch; ours has another identity in each sample. Below 1 ours is faster.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script from anywhere

from bench.theirs import their_forward, their_transformer
from flux.memory import checkpoint_blocks
from flux.model import Flux, FluxSizes, position_ids
from metalora import collapse, export_lora, inject, load_lora, use_slots
from scoring.tables import markdown


def model_sizes(args: argparse.Namespace) -> FluxSizes:
    return FluxSizes(
        in_channels=64,
        out_channels=64,
        pooled_size=768,
        txt_size=args.txt_size,
        hidden_size=args.hidden_size,
        mlp_size=4 * args.hidden_size,
        num_heads=args.hidden_size // 128,
        depth=args.depth,
        depth_single=args.depth_single,
        guidance=True,
        axes=(16, 56, 56),
        theta=10_000,
    )


def our_model(args: argparse.Namespace) -> Flux:
    torch.manual_seed(0)
    return Flux(model_sizes(args)).to(args.device, args.dtype).requires_grad_(False)


def their_model(args: argparse.Namespace, rank: int = 0) -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return their_transformer(model_sizes(args), rank).to(args.device, args.dtype)


def inputs(args: argparse.Namespace) -> dict[str, Tensor]:
    """Return what both models take, under our names: square pictures of `args.tokens` tokens."""
    b, side = args.batch, round(args.tokens**0.5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=args.device, dtype=args.dtype)

    img_ids, txt_ids = position_ids(b, 2 * side, 2 * side, args.txt_tokens, args.device)
    given = {"img": draw(b, side**2, 64), "img_ids": img_ids, "txt": draw(b, args.txt_tokens, args.txt_size)}
    given |= {"txt_ids": txt_ids, "t": torch.rand(b, device=args.device), "pooled": draw(b, 768)}
    return given | {"guidance": torch.ones(b, device=args.device)}


def ours_training(args: argparse.Namespace, r1: int) -> Callable:
    """Return a step of stage 1, after the warm-up, with another identity in each sample."""
    model, given = our_model(args), inputs(args)
    inject(model, r1, 1, args.batch)
    model.factors.personal.data.normal_(std=1e-3)
    checkpoint_blocks(model)
    use_slots(model, torch.arange(args.batch, device=args.device))
    trained = list(model.factors.parameters())
    return lambda: torch.autograd.grad(model(**given).float().square().mean(), trained)


def theirs_training(args: argparse.Namespace, rank: int, recomputed: str = "all") -> Callable:
    model, given = their_model(args, rank), inputs(args)
    if recomputed == "all":
        model.enable_gradient_checkpointing()
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    return lambda: torch.autograd.grad(their_forward(model, given).float().square().mean(), trained)


def floor(args: argparse.Namespace) -> Callable:
    """Return a step that computes the gradient of the input alone, which any training has to compute."""
    model, given = our_model(args), inputs(args)
    checkpoint_blocks(model)
    given["img"].requires_grad_()
    return lambda: torch.autograd.grad(model(**given).float().square().mean(), given["img"])


def ours_denoising(args: argparse.Namespace) -> Callable:
    """Return a denoising step with a LoRA that `load_lora` merged."""
    trained = inject(our_model(args), None, 16, 1)
    trained.factors.personal.data.normal_(std=1e-3)
    assert collapse(trained)
    file = args.work / "bench.safetensors"
    export_lora(trained, file, {})
    model, given = our_model(args), inputs(args)
    load_lora(model, file)
    return torch.inference_mode()(lambda: model(**given))


def theirs_denoising(args: argparse.Namespace) -> Callable:
    model, given = their_model(args, 16).eval(), inputs(args)
    return torch.inference_mode()(lambda: their_forward(model, given))


def measure(cases: dict[str, Callable], rounds: int, device: str) -> dict[str, list[float]]:
    """Time all cases in turns; return the seconds of every round but the first."""
    seconds = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, step in cases.items():
            began = time.perf_counter()
            step()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if number:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden-size", type=int, default=256, help="a multiple of 128")
    parser.add_argument("--depth", type=int, default=4, help="double blocks")
    parser.add_argument("--depth-single", type=int, default=8, help="single blocks")
    parser.add_argument("--tokens", type=int, default=256, help="of the picture, a square number")
    parser.add_argument("--txt-tokens", type=int, default=64)
    parser.add_argument("--txt-size", type=int, default=256, help="width of the text's embeddings")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15, help="times that everything is timed")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--work", type=Path, default=Path("out"), help="folder for a LoRA file")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    args.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]

    cases = {
        "ours, r1 128": ours_training(args, 128),
        "peft, rank 1": theirs_training(args, 1),
        "peft, rank 128": theirs_training(args, 128),
        "floor": floor(args),
        "ours, denoising": ours_denoising(args),
        "peft, denoising": theirs_denoising(args),
    }
    seconds = measure(cases, args.rounds, args.device)
    pairs = [
        ("training step, r1 128, relative to peft rank 1", "ours, r1 128", "peft, rank 1"),
        ("training step, r1 128, relative to peft rank 128", "ours, r1 128", "peft, rank 128"),
        ("training step, r1 128, relative to input gradients alone", "ours, r1 128", "floor"),
        ("denoising step, LoRA merged, relative to peft unmerged", "ours, denoising", "peft, denoising"),
    ]
    lines = [["what", "ratio (median)", "from", "to (80 % of rounds)"]]
    for title, ours, theirs in pairs:
        ratios = torch.tensor(seconds[ours]) / torch.tensor(seconds[theirs])
        lines.append([title, *(f"{x:.2f}" for x in ratios.quantile(torch.tensor([0.5, 0.1, 0.9])).tolist())])
    print(f"python {' '.join(sys.argv)}\n\n{markdown(lines)}")


if __name__ == "__main__":
    main()
