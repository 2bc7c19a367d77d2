"""The sampler: golden numbers, pinned layouts, and the whole loop against diffusers' FluxPipeline."""

from dataclasses import replace

import pytest
import test_autoencoder
import test_model
import torch
from compare import difference
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flux import model
from flux.model import Flux, pack, position_ids, unpack
from flux.sampling import (
    add_noise,
    denoise,
    draw_noise,
    euler_step,
    generate,
    spread_times,
    to_pixels,
    velocity_target,
)
from flux.transformer import Prompt

TOLERANCE = 1e-4
HEIGHT, WIDTH, STEPS, LENGTH = 24, 40, 5, 7  # 6 x 10 latents, 3 x 5 tokens
DEV = replace(test_model.DEV, in_channels=16)  # 4 of the autoencoder's channels x 2 x 2
SCHNELL = replace(DEV, guidance=False)


@pytest.mark.parametrize(
    "sizes, height, width, expected",
    [
        (DEV, 128, 128, [1, 0.904531, 0.759511, 0.512844, 0]),
        (DEV, 32, 128, [1, 0.849235, 0.652489, 0.384945, 0]),
        (SCHNELL, 128, 128, [1, 0.75, 0.5, 0.25, 0]),
    ],
)
def test_times(sizes, height, width, expected):
    """Numbers worked out from black-forest-labs/flux `src/flux/sampling.py`."""
    with torch.device("meta"):
        flux = Flux(sizes)
    with torch.device("cpu"):
        assert flux.times(4, height, width) == pytest.approx(expected, abs=1e-6)


def test_pack():
    """Feature c * 4 + ph * 2 + pw of token row * columns + column."""
    latents = torch.randn(2, 3, 4, 6)
    img = pack(latents)
    assert img.shape == (2, 6, 12)
    for c, y, x in [(0, 0, 0), (1, 0, 1), (1, 1, 0), (2, 3, 4), (2, 2, 5)]:
        token, feature = y // 2 * 3 + x // 2, c * 4 + y % 2 * 2 + x % 2
        assert torch.equal(img[:, token, feature], latents[:, c, y, x])
    assert torch.equal(unpack(img, 4, 6), latents)


def test_position_ids():
    img_ids, txt_ids = position_ids(batch=2, height=4, width=6, txt_length=5)
    expected = [[0, row, column] for row in range(2) for column in range(3)]
    assert img_ids.tolist() == [expected, expected]
    assert txt_ids.shape == (2, 5, 3) and not txt_ids.any()


def test_position_ids_are_made_on_the_device():
    """No tensor of theirs is made elsewhere and copied, which would make the host wait."""
    devices = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            result = op(*args, **kwargs or {})
            devices.update(part.device.type for part in tree_leaves(result) if isinstance(part, Tensor))
            return result

    with Watch():
        position_ids(2, 4, 6, 5, "meta")
    assert devices == {"meta"}


def test_a_seed_gives_the_same_noise_in_any_batch():
    batch = draw_noise([3, 4, 3], channels=16, height=4, width=6)
    assert batch.shape == (3, 16, 4, 6) and batch.dtype == torch.float32
    assert torch.equal(batch[1:2], draw_noise([4], 16, 4, 6))
    assert torch.equal(batch[0], batch[2]) and not torch.equal(batch[0], batch[1])


def test_a_step_along_the_target_undoes_the_noise():
    latents, noise, t = torch.randn(2, 4, 6, 6), torch.randn(2, 4, 6, 6), torch.tensor([0.8, 0.3])
    noisy = add_noise(latents, noise, t)
    assert difference(noisy[1], 0.7 * latents[1] + 0.3 * noise[1]) < 1e-6
    assert difference(euler_step(noisy[0], velocity_target(latents, noise)[0], 0.8, 0.0), latents[0]) < 1e-6
    assert torch.equal(add_noise(latents, noise, torch.ones(2)), noise)


def test_a_step_is_not_rounded_to_the_velocitys_precision():
    step = euler_step(torch.zeros(1), torch.ones(1).bfloat16(), 0.3, 0.1)  # -0.2 is -0.2002 in bfloat16
    assert step.item() == pytest.approx(-0.2, abs=1e-7)


def test_to_pixels_rounds():
    image = torch.tensor([-1.2, -1, 0, 0.999, 1.5]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    pixels = to_pixels(image)
    assert pixels.shape == (1, 1, 5, 3) and pixels.dtype == torch.uint8
    assert pixels[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]


def prompts() -> list[Prompt]:
    """Return a positive and a negative prompt, for two pictures each."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"txt": (2, LENGTH, DEV.txt_size), "pooled": (2, DEV.pooled_size)}
    return [
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for _ in range(2)
    ]


@torch.no_grad()
def error(sizes, cfg: float = 1.0) -> float:
    """Return how far latents and pictures are from those of FluxPipeline."""
    flux, their_flux = test_model.pair(sizes)
    autoencoder, their_autoencoder = test_autoencoder.pair(test_autoencoder.SIZES["like FLUX"])
    their_autoencoder.register_to_config(scaling_factor=0.3611, shift_factor=0.1159)
    scheduler = FlowMatchEulerDiscreteScheduler(  # as in FLUX.1's scheduler_config.json
        shift=3.0 if sizes.guidance else 1.0,
        use_dynamic_shifting=sizes.guidance,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    pipeline = FluxPipeline(scheduler, their_autoencoder, None, None, None, None, their_flux)
    pipeline.set_progress_bar_config(disable=True)
    noise = draw_noise([3, 4], 4, HEIGHT // 4, WIDTH // 4)
    prompt, negative = prompts()
    given = dict(
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=STEPS,
        guidance_scale=3.5,
        true_cfg_scale=cfg,
        latents=pack(noise),
        prompt_embeds=prompt["txt"],
        pooled_prompt_embeds=prompt["pooled"],
        negative_prompt_embeds=negative["txt"],
        negative_pooled_prompt_embeds=negative["pooled"],
    )
    their_latents = pipeline(**given, output_type="latent").images
    their_image = pipeline(**given, output_type="pt").images
    latents = denoise(flux, noise, prompt, steps=STEPS, guidance=3.5, cfg=cfg, negative=negative)
    image = autoencoder.decode(latents) / 2 + 0.5
    return max(difference(pack(latents), their_latents), difference(image, their_image))


@pytest.mark.parametrize("sizes, cfg", [(DEV, 1), (DEV, 2), (SCHNELL, 1)], ids=["dev", "cfg", "schnell"])
def test_equals_diffusers(sizes, cfg):
    assert error(sizes, cfg) < TOLERANCE


def forget_the_shift(monkeypatch):
    monkeypatch.setattr(Flux, "times", lambda self, steps, *_: torch.linspace(1, 0, steps + 1).tolist())


def pack_by_columns(monkeypatch):
    monkeypatch.setattr(model, "unpack", lambda img, height, width: unpack(img, width, height).mT)


@pytest.mark.parametrize("broken", [forget_the_shift, pack_by_columns])
def test_a_broken_sampler_is_noticed(broken, monkeypatch):
    broken(monkeypatch)
    assert error(DEV) > 20 * TOLERANCE


def test_cfg_needs_a_negative_prompt():
    flux, _ = test_model.pair(DEV)
    with pytest.raises(ValueError, match="cfg 2 needs a negative prompt"):
        denoise(flux, draw_noise([0], 4, 6, 10), prompts()[0], cfg=2)


def test_progress_and_precision():
    flux, done = test_model.pair(DEV)[0].bfloat16(), []
    latents = denoise(flux, draw_noise([3, 4], 4, 6, 10), prompts()[0], steps=3, progress=done.append)
    assert latents.dtype == torch.float32 and latents.shape == (2, 4, 6, 10)
    assert done == [1, 2, 3]


def test_pictures_are_decoded_in_tiles(monkeypatch):
    flux, _ = test_model.pair(DEV)
    autoencoder, _ = test_autoencoder.pair(test_autoencoder.SIZES["like FLUX"])
    seen, decoder = [], autoencoder.decoder.forward
    monkeypatch.setattr(autoencoder.decoder, "forward", lambda z: seen.append(z.shape[-2:]) or decoder(z))
    prompt = {name: part[:1] for name, part in prompts()[0].items()}
    for tile in (None, 6):
        (picture,) = generate(flux, autoencoder, prompt, [3], (HEIGHT, WIDTH), tile, steps=1)
        assert picture.size == (WIDTH, HEIGHT)
    assert seen == [(6, 10), (6, 6), (6, 6)]


@pytest.mark.parametrize("n", [7, 50, 375])
def test_spread_times_have_the_distribution_and_less_chance(n):
    """Logit-normal as `draw_times`; however many are used, every quantile is met to within 2 / n."""
    times = spread_times(400, start=0.3, mean=0.5, std=1.2)[:n].double()
    quantiles = torch.special.ndtr((times.logit() - 0.5) / 1.2).sort().values
    even = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    assert (quantiles - even).abs().max() < 2.0 / n
    by_chance = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64).sort().values
    assert n < 50 or (by_chance - even).abs().max() > 2.0 / n
