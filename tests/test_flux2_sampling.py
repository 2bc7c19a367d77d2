"""FLUX.2's times, positions and Euler loop, and with them its text side, against diffusers' pipeline."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import test_qwen3
import torch
from chat_tokenizer import write_tokenizer
from compare import difference, randomize
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from einops import rearrange
from torch import Tensor, nn
from transformers import AutoTokenizer

from flux import chat, flux2
from flux.chat import load_chat_tokenizer
from flux.flux2 import Flux2, position_ids
from flux.model import Flux
from flux.qwen3 import Qwen3
from flux.sampling import denoise, draw_noise

TOLERANCE = 1e-4
ROWS, COLUMNS, STEPS, LENGTH = 3, 5, 5, 40
PROMPTS = ["a photo of a man\n", "Фотография <|im_end|>"]
SCHEDULER = dict(shift=3.0, use_dynamic_shifting=True)  # as in klein's scheduler_config.json


def theirs_schedule(steps: int, image_tokens: int) -> Tensor:
    scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    mu = compute_empirical_mu(image_tokens, steps)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return scheduler.sigmas


def times_of_flux1(self: Flux2, steps: int, height: int, width: int) -> list[float]:
    return Flux.times(SimpleNamespace(guidance_in=True), steps, 2 * height, 2 * width)


@pytest.mark.parametrize("image_tokens", [1, 256, 1024, 4096, 4300, 4301, 16384])
@pytest.mark.parametrize("steps", [1, 4, 10, 28, 50, 200])
def test_schedule_equals_diffusers(steps, image_tokens):
    ours = torch.tensor(Flux2.times(None, steps, image_tokens, 1))
    expected = theirs_schedule(steps, image_tokens)
    assert difference(ours, expected) < 1e-6
    if steps > 1:  # a single step is from 1 to 0 whatever mu is
        assert difference(ours, theirs_schedule(steps, image_tokens + 64)) > 1e-4
    if 1 < steps < 200 and image_tokens <= 4300:  # elsewhere it is as FLUX.1's
        assert difference(torch.tensor(times_of_flux1(None, steps, image_tokens, 1)), expected) > 0.01


def test_position_ids():
    img_ids, txt_ids = position_ids(batch=2, height=2, width=3, txt_length=4)
    expected = [[0, row, column, 0] for row in range(2) for column in range(3)]
    assert img_ids.tolist() == [expected, expected]
    assert txt_ids.tolist() == [[[0, 0, 0, place] for place in range(4)]] * 2
    assert {ids.device.type for ids in position_ids(2, 2, 3, 4, "meta")} == {"meta"}


class TheirTransformer(Flux2):
    """diffusers' transformer, called as ours is."""

    def __init__(self, model: Flux2Transformer2DModel):
        nn.Module.__init__(self)
        self.model, self.img_in = model, model.x_embedder

    def forward(
        self, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor, t: Tensor, guidance: Tensor
    ) -> Tensor:
        return self.model(img, txt, t, img_ids, txt_ids, return_dict=False)[0]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> tuple[Flux2KleinPipeline, chat.ChatTokenizer]:
    """diffusers' pipeline with random weights, and our tokenizer of the same files."""
    folder = tmp_path_factory.mktemp("tokenizer")
    vocab_size = write_tokenizer(folder, Path(__file__).read_text())
    sizes = replace(test_qwen3.SIZES, vocab_size=vocab_size)
    qwen3 = randomize(test_qwen3.transformers_model(sizes))
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * sizes.hidden_size,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    autoencoder = AutoencoderKLFlux2(block_out_channels=(8, 8, 8, 8), latent_channels=4, norm_num_groups=4)
    autoencoder.bn.running_var.fill_(1 - autoencoder.config.batch_norm_eps)  # it changes nothing
    scheduler, tokenizer = FlowMatchEulerDiscreteScheduler(**SCHEDULER), AutoTokenizer.from_pretrained(folder)
    pipeline = Flux2KleinPipeline(scheduler, autoencoder, qwen3, tokenizer, randomize(transformer))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, load_chat_tokenizer(folder, LENGTH)


@torch.no_grad()
def error(pipeline: Flux2KleinPipeline, tokenizer: chat.ChatTokenizer, cfg: float) -> float:
    """Return how far our latents are from the pipeline's, prompts to latents; the transformer is its own."""
    noise = draw_noise([3, 4], 16, ROWS, COLUMNS)
    latents = pipeline(
        prompt=PROMPTS,
        height=16 * ROWS,
        width=16 * COLUMNS,
        num_inference_steps=STEPS,
        guidance_scale=cfg,
        latents=noise,
        max_sequence_length=LENGTH,
        output_type="latent",
    ).images
    expected = rearrange(latents, "b c (h ph) (w pw) -> b (c ph pw) h w", ph=2, pw=2)

    config = pipeline.text_encoder.config
    sizes = replace(test_qwen3.SIZES, vocab_size=config.vocab_size)
    qwen3 = Qwen3(sizes).eval()
    qwen3.load_state_dict(pipeline.text_encoder.state_dict(), strict=False)
    prompt, negative = ({"txt": qwen3(*tokenizer(texts))} for texts in (PROMPTS, [""] * len(PROMPTS)))
    transformer = TheirTransformer(pipeline.transformer)
    ours = denoise(transformer, noise, prompt, STEPS, cfg=cfg, negative=negative)
    assert ours.dtype == torch.float32
    return difference(ours, expected)


@pytest.mark.parametrize("cfg", [4, 1], ids=["base", "distilled"])
def test_equals_diffusers(pipeline, cfg):
    assert error(*pipeline, cfg) < TOLERANCE


def take_the_schedule_of_flux1(monkeypatch):
    monkeypatch.setattr(Flux2, "times", times_of_flux1)


def forget_the_places_of_text(monkeypatch):
    def forget(*args):
        img_ids, txt_ids = position_ids(*args)
        return img_ids, torch.zeros_like(txt_ids)

    monkeypatch.setattr(flux2, "position_ids", forget)


def swap_rows_and_columns(monkeypatch):
    def swap(*args):
        img_ids, txt_ids = position_ids(*args)
        return img_ids[..., [0, 2, 1, 3]], txt_ids

    monkeypatch.setattr(flux2, "position_ids", swap)


def let_it_think(monkeypatch):
    monkeypatch.setattr(chat, "END", "<|im_end|>\n<|im_start|>assistant\n")


BROKEN = [take_the_schedule_of_flux1, forget_the_places_of_text, swap_rows_and_columns, let_it_think]


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_sampler_is_noticed(pipeline, broken, monkeypatch):
    broken(monkeypatch)
    assert error(*pipeline, cfg=4) > 20 * TOLERANCE


def test_cfg_needs_a_negative_prompt(pipeline):
    transformer, prompt = TheirTransformer(pipeline[0].transformer), {"txt": torch.zeros(1, 4, 144)}
    with pytest.raises(ValueError, match=r"cfg 4.0 needs a negative prompt; 1 turns it off"):
        denoise(transformer, draw_noise([0], 16, 2, 3), prompt, cfg=4.0)


def test_progress_and_precision(pipeline):
    transformer, done = TheirTransformer(pipeline[0].transformer), []
    noise, txt = draw_noise([3, 4], 16, ROWS, COLUMNS), torch.zeros(2, 4, 144)
    latents = denoise(transformer, noise, {"txt": txt.bfloat16()}, 3, progress=done.append)
    assert latents.dtype == torch.float32 and latents.shape == noise.shape
    assert done == [1, 2, 3]
