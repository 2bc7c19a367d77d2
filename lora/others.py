"""Files that are no LoRA for FLUX.1, told by names and shapes: LoRAs for other models, other methods."""

import re

from torch import Tensor

from flux.formats import OTHER_FILES, WIDER_INPUT, named_model
from lora.names import find_name, flatten

# Inputs of attention, 3072 in FLUX.1; and rows of lora_B in FLUX.2-klein-4B, whose inputs are as many.
WIDTHS = {
    1536: "Stable Diffusion 3 or 3.5 medium",
    2432: "Stable Diffusion 3.5 large",
    4096: "FLUX.2-klein-9B",
    6144: "FLUX.2-dev",
}
ROWS = {("linear1", 27648): "FLUX.2-klein-4B", ("mlp_0", 18432): "FLUX.2-klein-4B"}
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
# Where a header names the base model, and how it names those that have FLUX.1's layers, or should not have.
BASE = ("base_model", "ss_sd_model_name", "modelspec.architecture", "ss_base_model_version")
OTHER_BASE = re.compile(
    r"(?i)kontext|fill|canny|depth|flux[._-]?2|sdxl|sd-xl|sd[_-]?3|stable-diffusion|chroma"
)


def base_of(metadata: dict[str, str]) -> str | None:
    """Return what a file's header calls the base model."""
    return next((metadata[key] for key in BASE if key in metadata), None)


def other_method(key: str) -> str | None:
    """Return the name of the method, other than LoRA, that a tensor's name belongs to."""
    return next((method for end, method in METHODS.items() if re.search(rf"\.({end})$", key)), None)


def other_model(modules: dict[str, dict[str, Tensor]]) -> str | None:
    """Return what a file is instead of a LoRA for FLUX.1, and how that shows; None when nothing shows it.

    modules: the tensors called A and B of each module, by its name without prefix.
    """
    for module in modules:
        layer, dot, end = module.rpartition(".")
        if end in ("weight", "bias") and find_name(layer):
            return f"a file of whole weights, not a LoRA: it has {module}"
        model = named_model(flatten(module))
        if model:
            return f"{model if model in OTHER_FILES.values() else f'a LoRA for {model}'}: it has {module}"
    shapes = {
        module: (entry["A"].shape[1], len(entry["B"]))
        for module, entry in modules.items()
        if {"A", "B"} <= entry.keys() and entry["A"].ndim == entry["B"].ndim == 2
    }
    for module, (inputs, rows) in shapes.items():
        model = WIDTHS.get(inputs) if re.search(r"attn.(qkv|(to|add)_[qkv])", module) else None
        wide = next(
            (of for (end, n), of in ROWS.items() if flatten(module).endswith(end) and rows == n), None
        )
        if model or wide:
            return f"a LoRA for {model or wide}: its {module} has {inputs} inputs and {rows} outputs"
    for module, (inputs, _) in shapes.items():
        place = find_name(module)
        if place and place[0] in ("img_in", "x_embedder") and inputs / CHANNELS in WIDER_INPUT:
            return f"a LoRA for {WIDER_INPUT[inputs / CHANNELS]}: its {module} has {inputs} inputs"
    return None
