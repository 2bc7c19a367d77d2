"""The base models whose LoRAs are read and written, and how a file shows which of them it is for."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from flux.flux2 import Flux2, Flux2Sizes
from flux.formats import ACCEPTED
from flux.model import Flux, FluxSizes


@dataclass(frozen=True)
class Base:
    """What LoRA files and messages about them call a base model, and the sizes that only its layers have."""

    name: str
    models: str  # that share its layers
    usual: str  # that LoRAs are for, unless their header says otherwise
    header: re.Pattern  # of a header that names it
    implementation: str  # as ModelSpec has it
    version: Callable[..., tuple[str, str]]  # sizes to ModelSpec's architecture and ss_base_model_version
    ratios: dict[str, float]  # of outputs to inputs, of layers that other bases call the same
    widths: tuple[int, ...] = ()  # that no other base has


def flux1_version(sizes: FluxSizes) -> tuple[str, str]:
    """Return what kohya's sd-scripts call FLUX.1-dev, which has a guidance input, and schnell."""
    return f"flux-1-{'dev' if sizes.guidance else 'schnell'}", "flux1"


def flux2_version(sizes: Flux2Sizes) -> tuple[str, str]:
    """Return what kohya's musubi-tuner and ai-toolkit call FLUX.2-dev, with a guidance input, and klein."""
    if sizes.guidance:
        return "Flux.2-dev", "flux2"
    size = "9b" if sizes.hidden_size > 3072 else "4b"
    return f"Flux.2-klein-{size}", f"flux2_klein_{size}"


BASES = {  # by the class of the transformer; a LoRA that fits several of them is for the first
    Flux: Base(
        name="FLUX.1",
        models=ACCEPTED,
        usual="FLUX.1-dev",
        header=re.compile(r"(?i)flux[._-]?1"),
        implementation="https://github.com/black-forest-labs/flux",
        version=flux1_version,
        ratios={"mlp_0": 4, "mlp_2": 1 / 4, "linear1": 7, "linear2": 1 / 5},
    ),
    Flux2: Base(
        name="FLUX.2",
        models="FLUX.2 klein and dev",
        usual="FLUX.2",
        header=re.compile(r"(?i)flux[._-]?2"),
        implementation="https://github.com/black-forest-labs/flux2",
        version=flux2_version,
        ratios={"mlp_0": 6, "mlp_2": 1 / 3, "linear1": 9, "linear2": 1 / 4},
        widths=(4096, 6144),  # of klein-9B and dev; klein-4B is as wide as FLUX.1
    ),
}
