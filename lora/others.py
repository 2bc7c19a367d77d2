"""Tell by names and shapes what a file is for: one of the bases, or another model, or another method."""

import re

from torch import nn

from flux.formats import OTHER_FILES, WIDER_INPUT, named_model
from flux.model import Flux
from lora.bases import BASES
from lora.fitting import Shapes
from lora.names import find_name, flatten, kinds_with

ATTENTION = re.compile(r"attn.(qkv|(to|add)_[qkv])")
WIDTHS = {1536: "Stable Diffusion 3 or 3.5 medium", 2432: "Stable Diffusion 3.5 large"}  # inputs of attention
CHANNELS = 64  # that come out of FLUX.1; as many go in
METHODS = {  # ends of names that belong to more, or to something else, than B A
    r"dora_scale|lora_magnitude_vector.*": "DoRA",
    r"hada_\w+": "LoHa",
    r"lokr_\w+": "LoKr",
    r"b?oft_\w+(\.\w+)?": "OFT",
    r"[ab][12]\.weight": "GLoRA",
    r"on_input|ia3_l(\.\w+)?": "(IA)3",
    r"vera_lambda_\w+": "VeRA",
    r"lora_mid\.weight": "a Tucker decomposition",
    r"diff(_b)?": "a full difference",
    r"[wb]_norm": "a trained norm",
    r"(query|key)_norm\.scale|norm_(added_)?[qk]\.weight|set_weight|reshape_weight": "a replaced weight",
    r"(lora_[AB]|lora_down|lora_up)(\.[^.]+)?\.bias": "a trained bias",
}
# Where a header names the base model, and how it names those that have a base's layers, or should not have.
BASE = ("base_model", "ss_sd_model_name", "modelspec.architecture", "ss_base_model_version")
OTHER_BASE = re.compile(r"(?i)kontext|fill|canny|depth|sdxl|sd-xl|sd[_-]?3|stable-diffusion|chroma")


def named_base(metadata: dict[str, str]) -> str | None:
    """Return what a file's header calls the base model."""
    return next((metadata[key] for key in BASE if key in metadata), None)


def names_another(header: str, kind: type[nn.Module]) -> bool:
    """Tell whether a header's words for the base model mean another one than `kind`'s usual one."""
    others = [OTHER_BASE, *(base.header for other, base in BASES.items() if other is not kind)]
    return any(pattern.search(header) for pattern in others)


def find_base(shapes: Shapes, metadata: dict[str, str]) -> tuple[type[nn.Module] | None, str]:
    """Return which base the modules of a file belong to, and what shows it; None when nothing does.

    shapes: (d_out, d_in) of each module, by its name without prefix; empty when unknown.
    """
    for module in shapes:
        kinds = kinds_with(module)
        if len(kinds) == 1:
            return kinds[0], f"it has {module}"
    for module, shape in shapes.items():
        for kind in kinds_with(module) if len(shape) == 2 else ():
            rows, inputs = shape
            wide = ATTENTION.search(module) and inputs in BASES[kind].widths
            ratios = [ratio for end, ratio in BASES[kind].ratios.items() if flatten(module).endswith(end)]
            if wide or rows / max(1, inputs) in ratios:
                return kind, f"its {module} has {inputs} inputs and {rows} outputs"
    header = named_base(metadata) or ""
    for kind, base in BASES.items():
        if base.header.search(header):
            return kind, f"its header names {header}"
    return None, ""


def other_method(key: str) -> str | None:
    """Return the name of the method, other than LoRA, that a tensor's name belongs to."""
    return next((method for end, method in METHODS.items() if re.search(rf"\.({end})$", key)), None)


def other_model(shapes: Shapes, kind: type[nn.Module]) -> str | None:
    """Return what a file is instead of a LoRA for a base, and how that shows; None when nothing shows it.

    shapes: as for `find_base`.
    """
    for module in shapes:
        layer, dot, end = module.rpartition(".")
        if end in ("weight", "bias") and kinds_with(layer):
            return f"a file of whole weights, not a LoRA: it has {module}"
        model = named_model(flatten(module))
        if model and model not in [base.name for base in BASES.values()]:
            return f"{model if model in OTHER_FILES.values() else f'a LoRA for {model}'}: it has {module}"
    for module, (rows, inputs) in ((module, shape) for module, shape in shapes.items() if shape):
        if inputs in WIDTHS and ATTENTION.search(module):
            return f"a LoRA for {WIDTHS[inputs]}: its {module} has {inputs} inputs and {rows} outputs"
        place = find_name(module, kind)
        wider = WIDER_INPUT.get(inputs / CHANNELS) if kind is Flux else None
        if wider and place and place[0] in ("img_in", "x_embedder"):
            return f"a LoRA for {wider}: its {module} has {inputs} inputs"
    return None
