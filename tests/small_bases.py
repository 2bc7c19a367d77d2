"""FLUX.1 and FLUX.2 at small size beside diffusers' own, for tests that run over both."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import test_flux2
import test_model
import torch
from compare import randomize
from diffusers import DiffusionPipeline, Flux2KleinPipeline, FluxPipeline
from torch import Tensor, nn

from flux.flux2 import Flux2, Flux2Sizes
from flux.model import Flux, FluxSizes

FLUX1_PARTS = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "scheduler")
FLUX2_PARTS = ("vae", "text_encoder", "tokenizer", "scheduler")


@dataclass(frozen=True)
class SmallBase:
    name: str
    kind: type[nn.Module]
    sizes: FluxSizes | Flux2Sizes
    pair: Callable[..., tuple[nn.Module, nn.Module]] = field(repr=False)  # ours, and diffusers' like it
    inputs: dict[str, Tensor | None] = field(repr=False)
    pipeline: type[DiffusionPipeline]
    others: tuple[str, ...]  # the pipeline's parts beside the transformer
    single: tuple[str, ...]  # diffusers' names of the parts of a single block's linear1
    last: str  # and of its linear2

    def model(self) -> nn.Module:
        return randomize(self.kind(self.sizes))

    def both(self) -> tuple[nn.Module, nn.Module]:
        return self.pair(self.sizes)

    def pipeline_of(self, theirs: nn.Module) -> DiffusionPipeline:
        return self.pipeline(transformer=theirs, **dict.fromkeys(self.others))

    @torch.no_grad()
    def their_velocity(self, theirs: nn.Module) -> Tensor:
        given = self.inputs
        pooled = {"pooled_projections": given["pooled"]} if "pooled" in given else {}
        return theirs(
            hidden_states=given["img"],
            img_ids=given["img_ids"][0],
            encoder_hidden_states=given["txt"],
            txt_ids=given["txt_ids"][0],
            timestep=given["t"],
            guidance=given["guidance"],
            **pooled,
        ).sample


FLUX1 = SmallBase(
    "FLUX.1",
    Flux,
    test_model.DEV,
    test_model.pair,
    test_model.inputs(test_model.DEV),
    FluxPipeline,
    FLUX1_PARTS,
    ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "proj_out",
)
FLUX2 = SmallBase(
    "FLUX.2",
    Flux2,
    test_flux2.KLEIN,
    test_flux2.pair,
    test_flux2.inputs(test_flux2.KLEIN),
    Flux2KleinPipeline,
    FLUX2_PARTS,
    ("attn.to_qkv_mlp_proj",),
    "attn.to_out",
)
BOTH = pytest.mark.parametrize("base", [FLUX1, FLUX2], ids=["flux1", "flux2"])
