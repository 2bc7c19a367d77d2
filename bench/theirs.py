"""diffusers' FLUX.1 with peft's LoRA, which bench/step.py and bench/gpu.py compare with."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig
from torch import Tensor

from flux.model import Flux, FluxSizes, pack, position_ids
from metalora import linear_names


def their_transformer(sizes: FluxSizes, rank: int = 0) -> FluxTransformer2DModel:
    """Return their frozen transformer of random weights; rank: of peft's LoRA in the layers that we adapt."""
    model = FluxTransformer2DModel(
        in_channels=sizes.in_channels,
        num_layers=sizes.depth,
        num_single_layers=sizes.depth_single,
        attention_head_dim=sizes.head_dim,
        num_attention_heads=sizes.num_heads,
        joint_attention_dim=sizes.txt_size,
        pooled_projection_dim=sizes.pooled_size,
        guidance_embeds=sizes.guidance,
        axes_dims_rope=sizes.axes,
    ).requires_grad_(False)
    if rank:
        with torch.device("meta"):
            names = [part for _, parts in linear_names(Flux(sizes)) for part in parts]
        model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=names))
    return model


def their_forward(model: FluxTransformer2DModel, given: dict[str, Tensor]) -> Tensor:
    """Return the velocity; given: the arguments of our `Flux.forward` by name."""
    return model(
        hidden_states=given["img"],
        encoder_hidden_states=given["txt"],
        pooled_projections=given["pooled"],
        timestep=given["t"],
        img_ids=given["img_ids"][0],
        txt_ids=given["txt_ids"][0],
        guidance=given["guidance"],
        return_dict=False,
    )[0]


def their_training(
    model: FluxTransformer2DModel, latents: Tensor, txt: Tensor, pooled: Tensor
) -> Callable[[], float]:
    """Return a training step as in diffusers' scripts, with their activation checkpointing.

    latents (1, c, h, w), txt (1, l, d) and pooled (1, d), on the model's device in its dtype.
    """
    model.enable_gradient_checkpointing()
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 4e-4, fused=True)
    img_ids, txt_ids = position_ids(1, *latents.shape[2:], txt.shape[1], latents.device)
    given = {"img": pack(latents), "img_ids": img_ids, "txt": txt, "txt_ids": txt_ids, "pooled": pooled}
    given |= dict.fromkeys(("t", "guidance"), torch.full((1,), 0.5, device=latents.device))

    def step() -> float:
        target = torch.randn(given["img"].shape, device=latents.device)
        loss = F.mse_loss(their_forward(model, given).float(), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def their_sampling(
    model: FluxTransformer2DModel, txt: Tensor, pooled: Tensor, side: int, steps: int
) -> Callable:
    """Return a function that makes the latents of a picture by their pipeline."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    others = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipeline = FluxPipeline(scheduler=scheduler, transformer=model.eval(), **others)
    pipeline.set_progress_bar_config(disable=True)
    given = {"prompt_embeds": txt, "pooled_prompt_embeds": pooled, "height": side, "width": side}
    return lambda: pipeline(**given, num_inference_steps=steps, guidance_scale=3.5, output_type="latent")
