"""Train the toy model's evaluators: whose face is in a picture, and does it show what the prompt says?

    python tiny/judges.py --out tiny/weights/judges

Both learn from synthetic people that nothing else sees, and look at whole pictures, because a generated one
comes without a face box. The networks are in `vision/small.py`.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script from anywhere

from tiny.people import IDENTITY, SCENES, SHIRTS, STYLES, VIEW, draw_identities, draw_views, render
from tiny.pretrain import Optimizer, export, write_json
from vision.small import SIZE, IdentityNet, PromptNet, load_judges

VIEWS = 8  # pictures per person
# The words that prompts are searched for; a value's place in its list is the number in a person's view.
NAMED = {
    "scene": [*SCENES],
    "shirt": [f"{colour} shirt" for colour in SHIRTS],
    "style": [*STYLES],
    "who": ["man", "woman"],
}


def generate(people: int, photos: float, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """Generate new people: pictures (people, VIEWS, 3, 64, 64) uint8 and attributes, each (people, VIEWS)."""
    identities, views = draw_identities(people, generator), draw_views(people * VIEWS, generator)
    views[torch.rand(len(views), generator=generator) < photos, VIEW.index("style")] = 0
    views = views.view(people, VIEWS, -1)
    pictures = torch.empty(people, VIEWS, 3, SIZE, SIZE, dtype=torch.uint8)
    for i in tqdm(range(0, people, 4), "generating", mininterval=5, disable=people < 1000):
        images = render(identities[i : i + 4].repeat_interleave(VIEWS, 0), views[i : i + 4].flatten(0, 1))[0]
        pictures[i : i + 4] = ((images + 1) * 127.5).round().byte().unflatten(0, (-1, VIEWS))
    labels = {name: views[..., VIEW.index(name)].long() for name in ("scene", "shirt", "style")}
    labels["who"] = identities[:, IDENTITY.index("woman"), None].long().expand(-1, VIEWS)
    labels["seen"] = views[..., VIEW.index("y")] + 1.55 * views[..., VIEW.index("width")] / 2 < 0.92
    return pictures, labels


def spoil(pictures: Tensor, generator: torch.Generator, device: torch.device) -> Tensor:
    """Turn uint8 (b, 3, h, w) into [-1, 1], each picture with its own mix of generated ones' defects."""
    n, image = len(pictures), pictures.to(device).float() / 127.5 - 1

    def rand(channels: int) -> Tensor:
        return torch.rand(n, channels, 1, 1, generator=generator).to(device)

    def noise(size: int) -> Tensor:
        return torch.randn(n, 3, size, size, generator=generator).to(device)

    def amount(most: float, channels: int = 1) -> Tensor:
        return most * rand(channels) * (rand(1) < 0.5)  # half have none

    soft = F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3, 1)
    cast = amount(0.12, 3) - amount(0.12, 3)
    blotches = amount(0.10) * F.interpolate(noise(SIZE // 4), SIZE, mode="bilinear")
    image = image.lerp(soft, amount(0.8)) * (1 - amount(0.12)) + cast + blotches
    return image + amount(0.08) * noise(SIZE)


def identity_loss(
    network: IdentityNet, pictures: Tensor, labels: dict[str, Tensor], generator: torch.Generator
) -> Tensor:
    """Find each of 128 people among the others by a second picture: InfoNCE (van den Oord et al. 2018)."""
    people = torch.randperm(len(pictures), generator=generator)[:128]
    views = torch.rand(128, VIEWS, generator=generator).argsort(dim=1)[:, :2].T
    device = network.head.weight.device
    with torch.autocast(device.type, torch.bfloat16):
        a, b = network(spoil(pictures[people, views].flatten(0, 1), generator, device)).chunk(2)
    logits, target = a @ b.mT / 0.07, torch.arange(128, device=device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.mT, target)) / 2


def prompt_loss(
    network: PromptNet, pictures: Tensor, labels: dict[str, Tensor], generator: torch.Generator
) -> Tensor:
    """Sum the cross entropies of the attributes over 256 pictures."""
    chosen = tuple(torch.randint(n, (256,), generator=generator) for n in pictures.shape[:2])
    device = network.head.weight.device
    with torch.autocast(device.type, torch.bfloat16):
        found = network(spoil(pictures[chosen], generator, device))
    return sum(F.cross_entropy(logits, labels[name][chosen].to(device)) for name, logits in found.items())


def evaluate(folder: Path, photos: float, seed: int, people: int = 200) -> dict[str, float]:
    """Measure both on people never seen; rank-1 and cosines compare everyone's first picture with others."""
    identity, prompt = load_judges(folder)
    pictures, labels = generate(people, photos, torch.Generator().manual_seed(seed))
    images = pictures.flatten(0, 1).float() / 127.5 - 1
    faces = identity(images).view(people, VIEWS, -1)
    cosines = torch.einsum("p v d, q d -> v p q", faces[:, 1:], faces[:, 0])
    own = torch.eye(people, dtype=torch.bool)
    same, different = cosines[:, own], cosines[:, ~own].flatten().sort().values
    figures = {
        "rank-1": cosines.argmax(dim=2) == torch.arange(people),
        "AUC": torch.searchsorted(different, same) / len(different),
        **{"same": same, "same, deviation": same.std()},
        **{"different": different, "different, deviation": different.std()},
    }
    for name, logits in prompt(images).items():
        right = logits.argmax(dim=1).view(people, VIEWS) == labels[name]
        figures[name] = right[labels["seen"]] if name == "shirt" else right
    return {name: round(values.float().mean().item(), 4) for name, values in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("tiny/weights/judges"), help="folder to write")
    parser.add_argument("--people", type=int, default=8000, help=f"to learn from, {VIEWS} pictures each")
    parser.add_argument("--steps", type=int, default=850, help="updates of the identity network")
    parser.add_argument("--prompt-steps", type=int, default=300, help="updates of the prompt network")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--device", default="cpu", help="cpu, cuda")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    data = generate(args.people, 0.6, torch.Generator().manual_seed(args.seed))
    identity = ("identity", IdentityNet(), identity_loss, args.steps)
    prompt = ("prompt", PromptNet(NAMED), prompt_loss, args.prompt_steps)
    for name, network, loss, steps in (identity, prompt):
        network.to(args.device, memory_format=torch.channels_last)  # three times faster in bfloat16
        is_matrix = lambda name, p: "blocks" in name and p.dim() == 4
        optimizer = Optimizer(network.named_parameters(), is_matrix, muon=0.02, adamw=2e-3, steps=steps)
        generator = torch.Generator().manual_seed(args.seed)
        bar = tqdm(range(steps), name, mininterval=5)
        for step in bar:
            value = loss(network, *data, generator)
            value.backward()
            optimizer.step(step)
            bar.set_postfix(loss=f"{value.item():.3f}", refresh=False)
        words = {"vocabulary": json.dumps(network.vocabulary)} if name == "prompt" else {}
        export(network, args.out / f"{name}.safetensors", **words)
    kinds = {"photo": 1.0, "any style": 0.0}
    figures = {kind: evaluate(args.out, photos, args.seed + 1) for kind, photos in kinds.items()}
    write_json({"settings": {**vars(args), "out": str(args.out)}, **figures}, args.out / "judges.json")


if __name__ == "__main__":
    main()
