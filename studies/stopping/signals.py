"""What can be seen of a training without a judge, every ten updates: losses, and the size of the update."""

import zlib
from collections.abc import Iterator

import torch
from torch import Tensor

import personalize
from family.side_by_side import personalize_together
from flux.sampling import draw_noise, flow_loss, spread_times
from flux.transformer import Transformer
from lora.names import Lora
from metalora import adapters, collapse, eject, linear_names, use_slots
from metaphd.benchmark import Benchmark, Run
from people.encoding import stack_prompts
from people.photos import read_photo
from run.settings import Training

EVERY = 10  # updates between two looks
TIMES = 8  # at which the losses are taken, each with a noise of its own; the same at every look
SIGNALS = ("photo", "mirror", "norm", "change", "ratio")


def watch(benchmark: Benchmark, run: Run) -> Iterator[dict]:
    """Train everyone as the benchmark does; yield a row per person and look.

    photo, mirror: the loss at fixed times and noises, of the photo that is learned and of its mirror image,
    which is not. norm: of the products lora_B lora_A of all layers together. change: the norm of what the
    last ten updates changed in them, relative to `norm`. ratio: of a product's norm to that of the layer's
    weight, the mean over layers.
    """
    device, dtype, model = benchmark.device, benchmark.dtype, benchmark.model
    settings, training = benchmark.personalization(run), Training.of(benchmark.args, lr=run.lr)
    people = benchmark.subjects
    seeds = [benchmark.args.seed + zlib.crc32(person.name.encode()) for person in people]
    personal = benchmark.add_adapters(model, run, seeds)
    prompts = [benchmark.texts[person.caption] for person in people]
    batches = [
        personalize.draw_batches(
            benchmark.crops[run.augment, person], prompt, settings, training, seed, device, dtype
        )
        for person, prompt, seed in zip(people, prompts, seeds)
    ]
    latents = encode_photos(benchmark)
    prompt = {name: part.to(device, dtype) for name, part in stack_prompts(prompts).items()}
    weights = weight_norms(model)
    before: list[Lora] = []

    def look(step: int) -> Iterator[dict]:
        losses = {name: fixed_loss(model, part, prompt, training) for name, part in latents.items()}
        for slot, person in enumerate(people):
            lora = {part: (a.clone(), b.clone()) for part, (a, b) in collapse(model, slot).items()}
            squares = inner(lora, lora)
            seen = {name: loss[slot] for name, loss in losses.items()}
            seen["norm"] = squares.sum().sqrt()
            seen["ratio"] = (squares.sqrt() / weights).mean()
            seen["change"] = torch.tensor(torch.nan)
            if step:
                last = before[slot]
                moved = (squares + inner(last, last) - 2 * inner(lora, last)).sum().clamp(min=0).sqrt()
                seen["change"] = moved / seen["norm"]
            before[slot : slot + 1] = [lora]
            values = {name: f"{seen[name].item():.6g}" for name in SIGNALS}
            yield {"method": run.method, "steps": step, "person": person.name} | values

    yield from look(0)
    steps = range(EVERY, settings.steps + 1, EVERY)
    for step, slots in personalize_together(model, personal, batches, steps, training, device):
        if len(slots) < len(people):
            raise ValueError(f"{run.method}: a loss became infinite or NaN before step {step}")
        yield from look(step)
    eject(model)


def encode_photos(benchmark: Benchmark) -> dict[str, Tensor]:
    """Return everyone's reference photo and its mirror image as latents, (people, z, h, w)."""
    crops = []
    for person in benchmark.subjects:
        path = person.photos[0]
        photo, resolution = read_photo(path), benchmark.training_resolution
        whole = [(path, (0, 0, *photo.size))]
        crops += personalize.encode_crops({path: photo}, whole, benchmark.autoencoder, resolution, augment=True)
    stack = lambda posteriors: torch.stack([part["mean"] for part in posteriors]).float()
    latents = {
        "photo": stack([crop.posterior for crop in crops]),
        "mirror": stack([crop.mirrored for crop in crops]),
    }
    return {name: part.to(benchmark.device) for name, part in latents.items()}


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


def inner(first: Lora, second: Lora) -> Tensor:
    """Return the inner product of the products lora_B lora_A of each layer, (layers,), from the factors."""
    return torch.stack(
        [((b.mT @ other_b) * (a @ other_a.mT)).sum()
         for (a, b), (other_a, other_b) in zip(first.values(), second.values())]
    )  # fmt: skip


def weight_norms(model: Transformer) -> Tensor:
    """Return the norm of the base's weight of each layer that is adapted, (layers,), as `collapse` has them."""
    parts_of, norms = dict(linear_names(model)), []
    for name in model.factors.by_layer():
        layer = adapters(model)[name]
        norms += [weight.norm() for weight in layer.base.weight.split(layer.parts)]
        assert len(parts_of[name]) == len(layer.parts)
    return torch.stack(norms)
