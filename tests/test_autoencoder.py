"""The autoencoder against diffusers' AutoencoderKL, on random weights."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compare import difference, header, randomize, shapes_of
from diffusers import AutoencoderKL
from einops import rearrange
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.memory import Tracker
from flux import autoencoder, load_autoencoder
from flux.autoencoder import AutoEncoder, AutoEncoderSizes
from run.models import SHIPPED

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


def attention_ran(model: AutoEncoder) -> set[str]:
    """Return which kernels of attention run when a model decodes."""
    ran = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            ran.update({op.name()} if "attention" in op.name() else ())
            return op(*args, **kwargs or {})

    with Watch(), torch.no_grad():
        model.decode(torch.zeros(1, model.sizes.z_channels, 4, 6))
    return ran


def test_attention_is_fused(monkeypatch):
    ours = AutoEncoder(SIZES["like FLUX"])
    assert attention_ran(ours) == {"aten::_scaled_dot_product_flash_attention_for_cpu"}
    monkeypatch.setattr(Tensor, "contiguous", lambda x: x)
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" not in attention_ran(ours)


@torch.no_grad()
def test_channels_last_gives_the_same(tmp_path):
    ours = randomize(AutoEncoder(SIZES["like FLUX"]))
    save_file(ours.state_dict(), tmp_path / "ae.safetensors")
    loaded = load_autoencoder(tmp_path / "ae.safetensors", dtype=torch.float32)
    assert loaded.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    latents = torch.randn(2, 4, 6, 4, generator=torch.Generator().manual_seed(1))
    image = ours.decode(latents)
    assert difference(loaded.decode(latents), image) < TOLERANCE
    assert difference(loaded.encode(image), ours.encode(image)) < TOLERANCE
    loaded.decoder.conv_in.weight.data *= 1.01
    assert difference(loaded.decode(latents), image) > TOLERANCE


# --- Tiles -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped() -> tuple[AutoEncoder, Tensor, Tensor]:
    """Return the toy model's autoencoder, latents of a sheet of pictures, and the image decoded whole."""
    ours = load_autoencoder(SHIPPED["tiny"] / "ae.safetensors", dtype=torch.float32)
    with Image.open(SHIPPED["tiny"] / "samples.png") as sheet:
        image = torch.from_numpy(np.array(sheet.convert("RGB").crop((0, 0, 256, 192))))
    with torch.inference_mode():
        latents = ours.encode(rearrange(image / 127.5 - 1, "h w c -> 1 c h w"))
        return ours, latents, ours.decode(latents)


def root_mean_square(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


@torch.inference_mode()
@pytest.mark.parametrize("tile", [16, 24, 32])
def test_tiles_are_as_near_as_those_of_diffusers(tile, shipped):
    ours, latents, whole = shipped
    _, theirs = pair(ours.sizes)
    theirs.load_state_dict(to_diffusers(ours.state_dict(), len(ours.sizes.ch_mult)))
    theirs.enable_tiling()
    theirs.tile_latent_min_size, theirs.tile_sample_min_size = tile, tile * ours.sizes.reduction
    z = latents / ours.sizes.scale_factor + ours.sizes.shift_factor
    error = root_mean_square(ours.decode(latents, tile) - whole)
    assert 0 < error < root_mean_square(theirs.decode(z).sample.clamp(-1, 1) - whole) < 0.03


@torch.inference_mode()
def test_tiles_that_hold_all_change_nothing(shipped):
    ours, latents, whole = shipped
    for tile in (64, 1000):
        assert difference(ours.decode(latents, tile), whole) < 1e-6
    assert difference(ours.decode(latents, 63), whole) > 1e-6


@torch.inference_mode()
def test_seams_are_blended(shipped, monkeypatch):
    """Tiles side by side, without overlap, are further off."""
    ours, latents, whole = shipped
    error = root_mean_square(ours.decode(latents, 16) - whole)
    monkeypatch.setattr(autoencoder, "starts", lambda length, tile: range(0, length, tile))
    assert root_mean_square(ours.decode(latents, 16) - whole) > 1.5 * error


@pytest.mark.parametrize("length, tile, expected", [(8, 8, [0]), (9, 8, [0, 1]), (20, 8, [0, 6, 12])])
def test_where_tiles_start(length, tile, expected):
    assert autoencoder.starts(length, tile) == expected


@torch.inference_mode()
def test_memory_of_tiles_is_as_documented():
    ours, tile = AutoEncoder(SIZES["like FLUX"]), 8

    def peak(side: int, *tile: int) -> int:
        latents = torch.zeros(1, ours.sizes.z_channels, side, side)
        with Tracker() as tracker:
            ours.decode(latents, *tile)
        return tracker.peak

    most = peak(tile) + 4 * 4 * (32 * ours.sizes.reduction) ** 2
    assert 0.9 * most < peak(32, tile) < 1.05 * most < 0.5 * peak(32)


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
    with pytest.raises(ValueError, match="tiles of 3 latent pixels, must be 4 or more"):
        ours.decode(torch.zeros(1, 4, 8, 8), tile=3)
