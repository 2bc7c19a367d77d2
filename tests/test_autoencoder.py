"""The autoencoder against diffusers' AutoencoderKL, on random weights."""

import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from compare import difference, header, randomize, shapes_of
from diffusers import AutoencoderKL
from torch import Tensor

from flux import autoencoder
from flux.autoencoder import AutoEncoder, AutoEncoderSizes

TOLERANCE = 1e-5
SIZES = {
    "like FLUX": AutoEncoderSizes(ch=32, ch_mult=(1, 2, 4), z_channels=4),
    "four levels": AutoEncoderSizes(
        ch=32, ch_mult=(1, 2, 2, 2), encoder_blocks=1, decoder_blocks=2, z_channels=16
    ),
    "flat, no encoder blocks": AutoEncoderSizes(
        ch=64, ch_mult=(1, 1, 1), encoder_blocks=0, decoder_blocks=1, z_channels=8
    ),
}
TO_DIFFUSERS = [
    (r"down\.(\d)\.block", r"down_blocks.\1.resnets"),
    (r"down\.(\d)\.downsample", r"down_blocks.\1.downsamplers.0"),
    (r"up\.(\d)\.block", r"up_blocks.\1.resnets"),
    (r"up\.(\d)\.upsample", r"up_blocks.\1.upsamplers.0"),
    (r"mid\.block_1", "mid_block.resnets.0"),
    (r"mid\.block_2", "mid_block.resnets.1"),
    (r"attn_1\.norm", "attn_1.group_norm"),
    (r"attn_1\.([qkv])\.", r"attn_1.to_\1."),
    (r"attn_1\.proj_out", "attn_1.to_out.0"),
    (r"mid\.attn_1", "mid_block.attentions.0"),
    (r"nin_shortcut", "conv_shortcut"),
    (r"norm_out", "conv_norm_out"),
]


def to_diffusers(state: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    result = {}
    for name, tensor in state.items():
        for pattern, replacement in TO_DIFFUSERS:
            name = re.sub(pattern, replacement, name)
        # Ours are stored from fine to coarse, theirs in the order they run.
        name = re.sub(r"up_blocks\.(\d)", lambda match: f"up_blocks.{levels - 1 - int(match[1])}", name)
        result[name] = tensor[:, :, 0, 0] if "attentions" in name and tensor.ndim == 4 else tensor
    return result


def pair(sizes: AutoEncoderSizes) -> tuple[AutoEncoder, AutoencoderKL]:
    levels = len(sizes.ch_mult)
    ours = randomize(AutoEncoder(sizes))
    theirs = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=[sizes.ch * mult for mult in sizes.ch_mult],
        layers_per_block=sizes.encoder_blocks,
        latent_channels=sizes.z_channels,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
    theirs.load_state_dict(to_diffusers(ours.state_dict(), levels))
    return ours, theirs


@torch.no_grad()
def differences(ours: AutoEncoder, theirs: AutoencoderKL) -> dict[str, float]:
    """Return the largest difference of each result, all on the scale of latents or of the image."""
    generator = torch.Generator().manual_seed(1)
    reduction, scale, shift = ours.sizes.reduction, 0.3611, 0.1159
    image = torch.rand(2, 3, 6 * reduction, 4 * reduction, generator=generator) * 2 - 1
    latents = torch.randn(2, ours.sizes.z_channels, 6, 4, generator=generator)
    posterior = theirs.encode(image).latent_dist
    image_of_theirs = theirs.decode(latents / scale + shift).sample
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(7))
    sample = posterior.mean + posterior.std * noise
    mean, std = ours.encode_moments(image)
    assert torch.equal(ours.encode(image), mean)
    return {
        "mean": difference(mean, scale * (posterior.mean - shift)),
        "std": difference(std, scale * posterior.std),
        "sample": difference(ours.encode(image, torch.Generator().manual_seed(7)), scale * (sample - shift)),
        "decoder": difference(ours.decoder(latents / scale + shift), image_of_theirs),
        "decode": difference(ours.decode(latents), image_of_theirs.clamp(-1, 1)),
    }


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_equals_diffusers(sizes):
    found = differences(*pair(sizes))
    assert max(found.values()) < TOLERANCE, found


def swap_q_and_k(ours, monkeypatch):
    for attention in (ours.encoder.mid.attn_1, ours.decoder.mid.attn_1):
        attention.q, attention.k = attention.k, attention.q


def pad_left_and_above(ours, monkeypatch):
    monkeypatch.setattr(autoencoder.Downsample, "forward", lambda self, x: self.conv(F.pad(x, (1, 0, 1, 0))))


def change_scale(ours, monkeypatch):
    ours.sizes = replace(ours.sizes, scale_factor=0.3621)


def change_shift(ours, monkeypatch):
    ours.sizes = replace(ours.sizes, shift_factor=0.1169)


@pytest.mark.parametrize(
    "broken, results",
    [
        (swap_q_and_k, {"mean", "std", "sample", "decoder", "decode"}),
        (pad_left_and_above, {"mean", "sample"}),
        (change_scale, {"mean", "std", "sample", "decode"}),
        (change_shift, {"mean", "sample", "decode"}),
    ],
)
def test_a_broken_model_is_noticed(broken, results, monkeypatch):
    ours, theirs = pair(SIZES["like FLUX"])
    broken(ours, monkeypatch)
    found = differences(ours, theirs)
    assert all(found[result] > 20 * TOLERANCE for result in results), found


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_sizes_are_read_from_shapes(sizes):
    assert AutoEncoderSizes.from_shapes(shapes_of(AutoEncoder(sizes)), {}) == sizes


def test_published_file():
    shapes = header("ae")
    sizes = AutoEncoderSizes.from_shapes(shapes, {})
    assert sizes == AutoEncoderSizes()
    with torch.device("meta"):
        assert shapes_of(AutoEncoder(sizes)) == shapes


def test_config_gives_scale_and_shift():
    shapes = shapes_of(AutoEncoder(SIZES["like FLUX"]))
    sizes = AutoEncoderSizes.from_shapes(shapes, {"scaling_factor": 0.5, "shift_factor": 0.25})
    assert (sizes.scale_factor, sizes.shift_factor) == (0.5, 0.25)


def test_same_seed_same_sample():
    ours, image = randomize(AutoEncoder(SIZES["like FLUX"])), torch.zeros(1, 3, 8, 8)
    draw = [ours.encode(image, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])


def test_bfloat16_weights_give_float32_results():
    ours = randomize(AutoEncoder(SIZES["like FLUX"]))
    image = torch.rand(1, 3, 16, 8) * 2 - 1
    expected = ours.encode(image)
    ours.bfloat16()
    latents = ours.encode(image)
    assert latents.dtype == ours.decode(latents).dtype == torch.float32
    assert difference(latents, expected) < 0.05 * expected.abs().max()


def test_wrong_input_is_refused():
    ours = AutoEncoder(SIZES["like FLUX"])
    with pytest.raises(ValueError, match="16x6.*multiples of 4"):
        ours.encode(torch.zeros(1, 3, 16, 6))
    with pytest.raises(ValueError, match="encoder_blocks 0"):
        AutoEncoderSizes(ch_mult=(1, 2), encoder_blocks=0)
    with pytest.raises(ValueError, match="not a FLUX autoencoder"):
        AutoEncoderSizes.from_shapes({"decoder.up_blocks.0.resnets.0.conv1.weight": (1,)}, {})
