"""People personalized side by side are as `personalize` makes them one by one, in float32."""

from collections.abc import Iterator

import pytest
import torch
from compare import factors

import flux
from family.side_by_side import personalize_together
from flux.transformer import Transformer
from metalora import clip_slots, eject
from personalize import EncodedCrop, Personalization, add_adapters, draw_batches, personalize
from run.settings import Training

SETTINGS = Personalization(method="lora", rank=2, steps=6, batch=2)
CPU = torch.device("cpu")
TRAINING = Training(lr=1e-2, clip_grad=0.05)  # which clips
SHAPES = ((32, 32), (32, 64))  # in pixels, of each person's two crops


@pytest.fixture(scope="module", params=["model", "klein"])
def transformer(request) -> Transformer:
    (file,) = request.getfixturevalue(request.param).glob("flux*.safetensors")
    return flux.load_transformer(file, dtype=torch.float32)


def person(model: Transformer, seed: int) -> tuple[list[EncodedCrop], dict[str, torch.Tensor]]:
    """Return random crops of a person and a random prompt."""
    generator = torch.Generator().manual_seed(seed)
    # Of FLUX.1 a token is 2 x 2 latents, of FLUX.2 one.
    pixels, channels = (4, model.sizes.in_channels // 4) if isinstance(model, flux.Flux) else (8, 16)
    crops = []
    for height, width in SHAPES:
        shape = channels, height // pixels, width // pixels
        entries = [torch.randn(shape, generator=generator) for _ in range(4)]
        mean, std, mirrored, other = entries
        posterior, mirrored = {"mean": mean, "std": std.abs()}, {"mean": mirrored, "std": other.abs()}
        crops.append(EncodedCrop((height, width), posterior, mirrored))
    prompt = {"txt": torch.randn(16, model.sizes.txt_size, generator=generator)}
    if isinstance(model, flux.Flux):
        prompt["pooled"] = torch.randn(model.sizes.pooled_size, generator=generator)
    return crops, prompt


def batches(model: Transformer, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    return draw_batches(*person(model, seed), SETTINGS, TRAINING, seed, CPU, torch.float32)


def alone(model: Transformer, seed: int) -> list[torch.Tensor]:
    """Return mid and up of every layer."""
    personalize(model, None, *person(model, seed), SETTINGS, TRAINING, seed, CPU, torch.float32)
    trained = factors(model, "mid", "up")
    eject(model)
    return [factor[0] for factor in trained]


def together(
    model: Transformer, seeds: list[int], people=None, steps=range(1, SETTINGS.steps + 1)
) -> tuple[list[torch.Tensor], list[list[int]]]:
    personal = add_adapters(model, None, SETTINGS.rank, "all", seeds)
    people = people or [batches(model, seed) for seed in seeds]
    updates = personalize_together(model, personal, people, steps, TRAINING, CPU)
    learning = [slots for _, slots in updates]
    trained = factors(model, "mid", "up")
    eject(model)
    return trained, learning


def test_side_by_side_is_as_alone(transformer, monkeypatch):
    clipped = []

    def watched(params, most):
        before = params.grad.norm()
        clip_slots(params, most)
        clipped.append(params.grad.norm() < 0.9 * before)

    monkeypatch.setattr("family.side_by_side.clip_slots", watched)
    ours, learning = together(transformer, [3, 4, 5])
    assert learning == [[0, 1, 2]] * SETTINGS.steps and any(clipped)
    for slot, seed in enumerate((3, 4, 5)):
        theirs = alone(transformer, seed)
        for factor, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(factor[slot], expected, atol=1e-5, rtol=1e-5)
        assert max(factor.abs().max() for factor in theirs[1::2]) > 1e-2  # up, which starts at zero
    assert not torch.allclose(ours[1][0], ours[1][1], atol=1e-3)


def test_a_slot_whose_loss_is_not_finite_is_dropped(transformer):
    def spoilt(batches, at: int):
        for step, batch in enumerate(batches, 1):
            yield batch | {"noise": batch["noise"] * (float("inf") if step == at else 1)}

    for steps, at, seen in (
        (range(1, 7), 3, [[0, 1, 2]] * 2 + [[0, 2]] * 4),
        ([6], 3, [[0, 2]]),  # noticed a step late
        ([6], 6, [[0, 2]]),  # but in time for the last item
    ):
        people = [batches(transformer, 3), spoilt(batches(transformer, 4), at), batches(transformer, 5)]
        ours, learning = together(transformer, [3, 4, 5], people, steps)
        assert learning == seen
        for slot, seed in ((0, 3), (2, 5)):
            for factor, expected in zip(ours, alone(transformer, seed), strict=True):
                torch.testing.assert_close(factor[slot], expected, atol=1e-5, rtol=1e-5)
    people = [spoilt(batches(transformer, 3), at=2), spoilt(batches(transformer, 4), at=1)]
    assert together(transformer, [3, 4], people)[1] == [[0], []]
