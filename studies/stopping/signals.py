"""What can be seen of a training without a judge: losses at fixed times and noises, the size of the update.

They are taken of the LoRA files that the benchmark wrote at several steps, so nothing is trained for them.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

import personalize
from flux.sampling import draw_noise, flow_loss, spread_times
from flux.transformer import Transformer
from lora.names import Lora
from lora.reading import read_lora
from metalora import adapters, eject, inject_loras, linear_names, use_slots
from metaphd.benchmark import Benchmark, Run
from people.encoding import stack_prompts
from people.photos import read_photo
from run.settings import Training

TIMES = 8  # at which the losses are taken, each with a noise of its own; the same for every state
SIGNALS = ("photo", "mirror", "norm", "change", "ratio")


def look(benchmark: Benchmark, run: Run) -> Iterator[dict]:
    """Yield a row per person and state, step 0 first.

    photo, mirror: the loss of the photo that is learned and of its mirror image, which is not. norm: of the
    products lora_B lora_A of all layers together. change: the norm of what changed in them since the state
    before, relative to `norm`. ratio: of a product's norm to that of the layer's weight, a mean over layers.
    """
    model, people, training = benchmark.model, benchmark.subjects, Training.of(benchmark.args, lr=run.lr)
    latents = encode_photos(benchmark)
    prompt = stack_prompts([benchmark.texts[person.caption] for person in people])
    prompt = {name: part.to(benchmark.device, benchmark.dtype) for name, part in prompt.items()}
    before = [None] * len(people)
    for step in (0, *run.steps):
        loras, weights = [None] * len(people), {}
        if step:
            loras = [read_lora(benchmark.lora(run.system(step), person), model)[0] for person in people]
            inject_loras(model, [[(lora, 1.0)] for lora in loras])
            weights = weight_norms(model)
        losses = {name: fixed_loss(model, part, prompt, training) for name, part in latents.items()}
        eject(model)
        for slot, person in enumerate(people):
            seen = {name: loss[slot].item() for name, loss in losses.items()}
            seen |= sizes(loras[slot], before[slot], weights)
            row = {"method": run.method, "steps": step, "person": person.name}
            yield row | {name: f"{seen[name]:.6g}" for name in SIGNALS}
        before = loras


def sizes(lora: Lora | None, before: Lora | None, weights: dict[str, Tensor]) -> dict[str, float]:
    """Return norm, change and ratio; before: the LoRA of the state before. None is the base model's, zero."""
    if lora is None:
        return {"norm": 0.0, "change": float("nan"), "ratio": 0.0}
    squares = inner(lora, lora)
    norm, change = squares.sum().sqrt(), squares
    if before is not None:
        change = squares + inner(before, before) - 2 * inner(lora, before)
    ratio = squares.sqrt() / torch.stack([weights[part] for part in lora])
    change = change.sum().clamp(min=0).sqrt() / norm
    return {"norm": norm.item(), "change": change.item(), "ratio": ratio.mean().item()}


def inner(first: Lora, second: Lora) -> Tensor:
    """Return the inner product of the products lora_B lora_A of each layer, (layers,), from the factors."""
    products = []
    for part, (a, b) in first.items():
        a, b, other_a, other_b = (factor.float() for factor in (a, b, *second[part]))
        products.append(((b.mT @ other_b) * (a @ other_a.mT)).sum())
    return torch.stack(products)


def weight_norms(model: Transformer) -> dict[str, Tensor]:
    """Return the norm of the base's weight of each layer that is adapted, by its diffusers name."""
    norms = {}
    for name, parts in linear_names(model):
        layer = adapters(model)[name]
        norms |= {part: weight.norm() for part, weight in zip(parts, layer.base.weight.split(layer.parts))}
    return norms


def encode_photos(benchmark: Benchmark) -> dict[str, Tensor]:
    """Return everyone's reference photo and its mirror image as latents, (people, z, h, w)."""
    crops, resolution = [], benchmark.training_resolution
    for person in benchmark.subjects:
        path = person.photos[0]
        photo = read_photo(path)
        whole = [(path, (0, 0, *photo.size))]
        crops += personalize.encode_crops({path: photo}, whole, benchmark.autoencoder, resolution, True)
    posteriors = {
        "photo": [crop.posterior for crop in crops],
        "mirror": [crop.mirrored for crop in crops],
    }
    means = {name: torch.stack([part["mean"] for part in parts]) for name, parts in posteriors.items()}
    return {name: mean.float().to(benchmark.device) for name, mean in means.items()}


@torch.inference_mode()
def fixed_loss(model: Transformer, latents: Tensor, prompt: dict[str, Tensor], training: Training) -> Tensor:
    """Return the loss of each person, (people,), a mean over times that cover their distribution."""
    use_slots(model, torch.arange(len(latents), device=latents.device))
    losses = []
    for seed, t in enumerate(spread_times(TIMES, 0.0, training.t_mean, training.t_std)):
        noise = draw_noise([seed], *latents.shape[1:]).to(latents.device).expand_as(latents)
        t = t.to(latents.device).expand(len(latents))
        loss = flow_loss(model, latents, noise, t, training.train_guidance, reduction="none", **prompt)
        losses.append(loss.flatten(1).mean(dim=1))
    return torch.stack(losses).mean(dim=0)
