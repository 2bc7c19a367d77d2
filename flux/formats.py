"""The names under which other programs store FLUX's weights, and how to recognise other models.

Our modules carry the names of the original files. One table per model holds diffusers' names where they
differ; beside them are ComfyUI's prefixes and its scaled fp8. `translate` reads headers only, no weights.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from flux.autoencoder import AutoEncoder
from flux.clip import CLIPText
from flux.errors import UserError
from flux.flux2 import Flux2
from flux.model import Flux
from flux.qwen3 import Qwen3
from flux.t5 import T5
from flux.transformer import Transformer

Shape = tuple[int, ...]
Header = dict[str, tuple[Shape, str]]  # of a safetensors file: shape and dtype, such as "BF16", of each name
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
FP8 = ("F8_E4M3", "F8_E5M2")

# Our names to diffusers'. {} is a number, and .weight or .bias follows. Several names: their rows, in this
# order, are the rows of ours. Names that are not here are the same in both.
EMBEDDERS = {"time": "timestep", "vector": "text", "guidance": "guidance"}
LAYERS = {"in": "1", "out": "2"}
FLUX = {
    **{
        f"{ours}_in.{layer}_layer": (f"time_text_embed.{theirs}_embedder.linear_{number}",)
        for ours, theirs in EMBEDDERS.items()
        for layer, number in LAYERS.items()
    },
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "double_blocks.{}.img_mod.lin": ("transformer_blocks.{}.norm1.linear",),
    "double_blocks.{}.txt_mod.lin": ("transformer_blocks.{}.norm1_context.linear",),
    "double_blocks.{}.img_attn.qkv": tuple(f"transformer_blocks.{{}}.attn.to_{x}" for x in "qkv"),
    "double_blocks.{}.txt_attn.qkv": tuple(f"transformer_blocks.{{}}.attn.add_{x}_proj" for x in "qkv"),
    "double_blocks.{}.img_attn.norm.query_norm.scale": ("transformer_blocks.{}.attn.norm_q",),
    "double_blocks.{}.img_attn.norm.key_norm.scale": ("transformer_blocks.{}.attn.norm_k",),
    "double_blocks.{}.txt_attn.norm.query_norm.scale": ("transformer_blocks.{}.attn.norm_added_q",),
    "double_blocks.{}.txt_attn.norm.key_norm.scale": ("transformer_blocks.{}.attn.norm_added_k",),
    "double_blocks.{}.img_attn.proj": ("transformer_blocks.{}.attn.to_out.0",),
    "double_blocks.{}.txt_attn.proj": ("transformer_blocks.{}.attn.to_add_out",),
    "double_blocks.{}.img_mlp.0": ("transformer_blocks.{}.ff.net.0.proj",),
    "double_blocks.{}.img_mlp.2": ("transformer_blocks.{}.ff.net.2",),
    "double_blocks.{}.txt_mlp.0": ("transformer_blocks.{}.ff_context.net.0.proj",),
    "double_blocks.{}.txt_mlp.2": ("transformer_blocks.{}.ff_context.net.2",),
    "single_blocks.{}.modulation.lin": ("single_transformer_blocks.{}.norm.linear",),
    "single_blocks.{}.linear1": (
        *(f"single_transformer_blocks.{{}}.attn.to_{x}" for x in "qkv"),
        "single_transformer_blocks.{}.proj_mlp",
    ),
    "single_blocks.{}.norm.query_norm.scale": ("single_transformer_blocks.{}.attn.norm_q",),
    "single_blocks.{}.norm.key_norm.scale": ("single_transformer_blocks.{}.attn.norm_k",),
    "single_blocks.{}.linear2": ("single_transformer_blocks.{}.proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}
ALIKE = r"(img|txt)_in|double_blocks\..*_attn\..*|single_blocks\..*\.norm\..*|final_layer\..*"  # in both
FLUX2 = {
    **{ours: theirs for ours, theirs in FLUX.items() if re.fullmatch(ALIKE, ours)},
    **{
        f"{ours}_in.{layer}_layer": (f"time_guidance_embed.{EMBEDDERS[ours]}_embedder.linear_{number}",)
        for ours in ("time", "guidance")
        for layer, number in LAYERS.items()
    },
    "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
    "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear",),
    "single_stream_modulation.lin": ("single_stream_modulation.linear",),
    "double_blocks.{}.img_mlp.0": ("transformer_blocks.{}.ff.linear_in",),
    "double_blocks.{}.img_mlp.2": ("transformer_blocks.{}.ff.linear_out",),
    "double_blocks.{}.txt_mlp.0": ("transformer_blocks.{}.ff_context.linear_in",),
    "double_blocks.{}.txt_mlp.2": ("transformer_blocks.{}.ff_context.linear_out",),
    "single_blocks.{}.linear1": ("single_transformer_blocks.{}.attn.to_qkv_mlp_proj",),
    "single_blocks.{}.linear2": ("single_transformer_blocks.{}.attn.to_out",),
}
SWAPPED = "final_layer.adaLN_modulation.1"  # shift above scale in ours, scale above shift in theirs

RES_BLOCKS = {
    "encoder.down.{}.block.{}": "encoder.down_blocks.{}.resnets.{}",
    "decoder.up.{}.block.{}": "decoder.up_blocks.{}.resnets.{}",
    "encoder.mid.block_1": "encoder.mid_block.resnets.0",
    "encoder.mid.block_2": "encoder.mid_block.resnets.1",
    "decoder.mid.block_1": "decoder.mid_block.resnets.0",
    "decoder.mid.block_2": "decoder.mid_block.resnets.1",
}
RES_BLOCK = {x: x for x in ("norm1", "conv1", "norm2", "conv2")} | {"nin_shortcut": "conv_shortcut"}
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
AUTOENCODER = {
    **{f"{a}.{x}": (f"{b}.{y}",) for a, b in RES_BLOCKS.items() for x, y in RES_BLOCK.items()},
    **{
        f"{half}.mid.attn_1.{x}": (f"{half}.mid_block.attentions.0.{y}",)
        for half in ("encoder", "decoder")
        for x, y in ATTENTION.items()
    },
    "encoder.down.{}.downsample.conv": ("encoder.down_blocks.{}.downsamplers.0.conv",),
    "decoder.up.{}.upsample.conv": ("decoder.up_blocks.{}.upsamplers.0.conv",),
    "encoder.norm_out": ("encoder.conv_norm_out",),
    "decoder.norm_out": ("decoder.conv_norm_out",),
    "encoder.quant_conv": ("quant_conv",),
    "decoder.post_quant_conv": ("post_quant_conv",),
}

TABLES = {Flux: FLUX, Flux2: FLUX2, AutoEncoder: AUTOENCODER}

# Before the names of a part of a ComfyUI checkpoint; the longer one first.
PREFIXES = {
    Flux: ("model.diffusion_model.", "diffusion_model."),
    Flux2: ("model.diffusion_model.", "diffusion_model."),
    AutoEncoder: ("vae.", "first_stage_model."),
    CLIPText: ("text_encoders.clip_l.transformer.", "text_encoders.clip_l."),
    T5: ("text_encoders.t5xxl.transformer.", "text_encoders.t5xxl."),
    Qwen3: ("text_encoders.qwen3_4b.transformer.", "text_encoders.qwen3_8b.transformer."),
}
# What transformers leaves out in front of some names when it stores a part of a larger model.
OMITTED = {
    CLIPText: ("text_model.", ("embeddings.", "encoder.", "final_layer_norm.")),
    Qwen3: ("model.", ("embed_tokens.", "layers.", "norm.")),
}
# How the classes begin that diffusers and transformers name in a config.json.
CLASSES = {
    Flux: "FluxTransformer",
    Flux2: "Flux2Transformer",
    AutoEncoder: "Autoencoder",
    CLIPText: "CLIP",
    T5: "T5",
    Qwen3: "Qwen3",
}
# FLUX has no use for them: CLIP's half that looks at pictures, T5's decoder, what is above layer 26 of Qwen3,
# counted from 0. The scales of fp8 inputs are for multiplying in fp8, which we do not.
IGNORED = {
    CLIPText: re.compile(r"logit_scale|(text|visual)_projection\.weight|vision_model\..+"),
    T5: re.compile(r"logit_scale|decoder\..+|lm_head\.weight"),
    Qwen3: re.compile(r"lm_head\.weight|model\.norm\.weight|model\.layers\.(2[7-9]|[3-9]\d|\d{3,})\..+"),
}
NO_WEIGHTS = re.compile(r"scaled_fp8|.+\.(scale_input|input_scale|comfy_quant)")
SCALE = re.compile(r"(.+)\.(scale_weight|weight_scale)")  # ComfyUI's older and its newer name

ACCEPTED = (
    "FLUX.1 dev, schnell, Krea-dev and Kontext-dev, FLUX.1-lite, flux-mini, FLUX.2 klein, and what was made "
    "from them"
)
MARKS = {Flux2: "double_stream_modulation_img.lin"}  # within a name that no other transformer has
SIGNS = {  # how names of a part begin, and of no other part
    Flux: ("a transformer", r"(double_|transformer_)blocks\."),
    Flux2: ("a transformer", r"(double_|transformer_)blocks\."),
    AutoEncoder: ("an autoencoder", r"(en|de)coder\.(conv_in|mid|up|down)"),
    CLIPText: ("CLIP's text encoder", r"text_model\.(embeddings|encoder\.layers)\."),
    T5: ("T5", r"(text_model\.)?(en|de)coder\.block\."),
    Qwen3: ("Qwen3 or a relative", r"model\.(embed_tokens|layers\.\d+\.self_attn)\."),
}
QUANTIZED = {  # names that only such files have
    r".+\.(nested_)?(absmax|quant_map)|.+\.quant_state\..+": "quantized to 4 bits by bitsandbytes (NF4)",
    r".+\.(SCB|weight_format)": "quantized to int8 by bitsandbytes",
    r".+\.(wscales|smooth_factor|proj_down)": "quantized to 4 bits by SVDQuant",
    r".+\.(qweight|qzeros|g_idx)": "quantized to 4 bits by SVDQuant, GPTQ or AWQ",
    r".+\.weight_scale_2": "quantized to NVFP4",
    r".+\.weight\._(data|scale)": "quantized by quanto",
    r".+\.scales": "quantized by MLX",
}
INTEGERS = ("I8", "U8", "F4", "F8_E8M0")  # of matrices
OTHER_MODELS = {  # how a name begins, with underscores for dots, that FLUX.1 does not have
    r"distilled_guidance_layer_": "Chroma",
    r".*(_stream_modulation|to_qkv_mlp_proj|ff(_context)?_linear_(in|out))": "FLUX.2",
    r"transformer_blocks_\d+_attn1_": "PixArt",
    r"joint_blocks_|pos_embed_proj_|transformer_blocks_\d+_attn2_": "Stable Diffusion 3",
    r"(input|output|middle|down|up|mid)_blocks?_": "Stable Diffusion 1, 2 or XL",
    r"(double|single)_blocks_\d+_\w*fc[12]|txt_in_individual_token_refiner": "HunyuanVideo",
    r"transformer_blocks_\d+_(img|txt)_(mlp|mod)_": "Qwen-Image",
    r"blocks_\d+_(self|cross)_attn_": "Wan",
    r"double_stream_blocks_": "HiDream",
    r"layers_\d+_attention_|(noise|context)_refiner_": "Z-Image or Lumina",
}
OTHER_FILES = {
    r"redux_": "FLUX.1-Redux, an image encoder",
    r"controlnet_|input_hint_": "a ControlNet",
    r".*ip_adapter": "an IP-Adapter",
}
LORA = re.compile(r"lora_unet_|.*\.(lora_(A|B|down|up)|lokr_\w+|hada_\w+|dora_scale)\b|.*processor\.\w+_lora")
WIDER_INPUT = {  # of img_in as a multiple of the latents: what else goes in
    2: "FLUX.1-Canny or FLUX.1-Depth, which want a control image",
    6: "FLUX.1-Fill, which wants a masked image",
}


@dataclass(frozen=True)
class Source:
    """How one of our tensors is made: tensors of the file, scaled, stacked by rows, then `change`d."""

    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    dtypes: tuple[str, ...]
    scales: tuple[str | None, ...]  # name of the factor on each of them, for weights in scaled fp8
    change: str = ""  # "swap": exchange the halves; "1x1": make a matrix the weight of a 1x1 convolution

    @property
    def shape(self) -> Shape:
        rows = sum(shape[0] for shape in self.shapes) if len(self.shapes) > 1 else None
        shape = self.shapes[0] if rows is None else (rows, *self.shapes[0][1:])
        return (*shape, 1, 1) if self.change == "1x1" else shape

    @property
    def is_plain(self) -> bool:
        """Tell whether it is a single tensor of the file with its values unchanged."""
        return len(self.names) == 1 and self.scales == (None,) and self.change != "swap"

    @property
    def fits_together(self) -> bool:
        """Tell whether the tensors can be stacked: q, k and v of one shape, and the MLP as wide."""
        return len(set(self.shapes[:3])) == 1 and len({shape[1:] for shape in self.shapes}) == 1


def transformer_kind(names: Iterable[str]) -> type[Transformer]:
    """Tell a transformer's class by its tensors' names, in either naming: `Flux` without another's mark."""
    return next((kind for kind, mark in MARKS.items() if any(mark in name for name in names)), Flux)


def kinds_inside(names: list[str]) -> set[type[nn.Module]]:
    """Return the models of which a ComfyUI checkpoint holds the weights."""
    kinds = {kind for kind, prefixes in PREFIXES.items() if any(name.startswith(prefixes) for name in names)}
    return kinds - ({Flux, *MARKS} - {transformer_kind(names)})


def is_config_of(kind: type[nn.Module], config: dict) -> bool:
    """Tell whether a `config.json` is of this kind of model, or names no kind.

    Beside single files of several models in one folder, it may be another's. FLUX's 24 heads taken for CLIP's
    would go unnoticed, and the pictures would be wrong.
    """
    architectures = config.get("architectures")
    names = [config.get("_class_name"), *(architectures if isinstance(architectures, list) else [])]
    classes = [name for name in names if isinstance(name, str)]
    return not classes or any(name.startswith(CLASSES.get(kind, "")) for name in classes)


def translate(kind: type[nn.Module], header: Header) -> tuple[dict[str, Source], list[str]]:
    """Return how our tensors are made of a file's, and what is wrong with these.

    Raises UserError with the model's name when the file is of another known model.
    """
    ours = _without_prefix(kind, header)  # to the names in the file
    _refuse_quantized(ours, header)
    _refuse_other_parts(kind, ours)
    if kind is Flux:
        _refuse_others(ours, header)
    ignored = {
        *getattr(kind, "IGNORED", ()),
        *(x for x in ours if kind in IGNORED and IGNORED[kind].fullmatch(x)),
    }
    if kind is T5 and "shared.weight" not in ours and "encoder.embed_tokens.weight" in ours:
        ours["shared.weight"] = ours.pop("encoder.embed_tokens.weight")  # two names of one table
    scales = {f"{m[1]}.weight": ours[m[0]] for m in map(SCALE.fullmatch, ours) if m and m[0] not in ignored}
    is_scaled = bool(scales) or "scaled_fp8" in ours
    weights = [x for x in ours if x not in ignored and not SCALE.fullmatch(x) and not NO_WEIGHTS.fullmatch(x)]

    sources, problems = {}, []
    for weight in weights:
        name, parts, change = _lookup(kind, weight, ours)
        if weight != next(part for part in parts if part in ours):
            continue  # done with the first of its parts
        if name in sources:
            problems.append(f"{name} is there twice, as {sources[name].names[0]} and as {ours[weight]}")
            continue
        absent = [part for part in parts if part not in ours]
        if absent:
            prefix = ours[weight].removesuffix(weight)
            problems += [f"missing {prefix}{part}, a part of {name}" for part in absent]
            parts = tuple(part for part in parts if part in ours)
        names = tuple(ours[part] for part in parts)
        shapes, dtypes = zip(*(header[x] for x in names))
        if change == "1x1" and len(shapes[0]) == 4:
            change = ""
        source = Source(names, shapes, dtypes, tuple(scales.pop(part, None) for part in parts), change)
        has_rows = len(shapes) == 1 or () not in shapes
        if not has_rows or not absent and not source.fits_together:
            listed = ", ".join(f"{x} {shape}" for x, shape in zip(names, shapes))
            problems.append(f"{name} cannot be made of {listed}")
            if not has_rows:
                continue
        for x, shape, dtype, scale in zip(names, shapes, dtypes, source.scales):
            if is_scaled and dtype in FP8 and len(shape) == 2 and scale is None:
                problems.append(f"missing the scale of {x}, which is {dtype} in a file of scaled fp8")
            if scale is not None and header[scale][0] not in ((), (1,)):
                problems.append(f"{scale} is {header[scale][0]}, must be one number")
        sources[name] = source
    problems += [f"unexpected {scale}: it has no weight" for scale in scales.values()]
    return sources, problems


def _without_prefix(kind: type[nn.Module], header: Header) -> dict[str, str]:
    """Return the names without the prefix of this kind's part, and each one's whole name.

    Other parts of a ComfyUI checkpoint are left out. What belongs to no part stays, to be refused later.
    """
    prefixes, others = PREFIXES.get(kind, ()), ()
    if prefixes and any(name.startswith(prefixes) for name in header):
        others = sum((theirs for theirs in PREFIXES.values() if theirs != prefixes), ())
    result = {}
    for name in header:
        if others and name.startswith(others):
            continue
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        short = name.removeprefix(prefix)
        omitted, starts = OMITTED.get(kind, ("", ()))
        if short.startswith(starts):
            short = omitted + short
        if short in result:
            raise UserError(f"{result[short]} and {name} are the same tensor")
        result[short] = name
    return result


def _lookup(kind: type[nn.Module], name: str, names: dict[str, str]) -> tuple[str, tuple[str, ...], str]:
    """Return our name for a tensor, all the tensors that ours is made of, and what is to be changed."""
    for pattern, ours, parts in PATTERNS.get(kind, ()):
        match = pattern.fullmatch(name)
        if match is None:
            continue
        *numbers, suffix = match.groups()
        parts = tuple(f"{part.format(*numbers)}.{suffix}" for part in parts)
        if ours.startswith("decoder.up."):  # ours are stored from fine to coarse, theirs as they run
            levels = len({x.split(".")[2] for x in names if x.startswith("decoder.up_blocks.")})
            numbers[0] = levels - 1 - int(numbers[0])
        change = "swap" if ours == SWAPPED else ""
        if suffix == "weight" and ".attn_1." in ours and not ours.endswith("norm"):
            change = "1x1"
        ours = ours.format(*numbers)
        return ours if ours.endswith(".scale") else f"{ours}.{suffix}", parts, change
    return name, (name,), ""


def _pattern(part: str) -> re.Pattern:
    return re.compile(re.escape(part).replace(r"\{\}", r"(\d{1,4})") + r"\.(weight|bias)")


PATTERNS = {
    kind: [(_pattern(part), ours, parts) for ours, parts in table.items() for part in parts]
    for kind, table in TABLES.items()
}


def _refuse_quantized(ours: dict[str, str], header: Header) -> None:
    take = "take the same weights in bf16, fp16 or fp8"
    for pattern, how in QUANTIZED.items():
        name = next((stored for name, stored in ours.items() if re.fullmatch(pattern, name)), None)
        if name:
            raise UserError(f"it is {how}, as {name} shows; {take}")
    for stored in ours.values():
        shape, dtype = header[stored]
        if dtype in INTEGERS and len(shape) == 2:
            raise UserError(f"it is quantized: {stored} is of {dtype}; {take}")


def _refuse_other_parts(kind: type[nn.Module], ours: dict[str, str]) -> None:
    parts = [part for part, (_, sign) in SIGNS.items() if any(re.match(sign, name) for name in ours)]
    if kind in SIGNS and parts and kind not in parts:
        raise UserError(f"this is {SIGNS[parts[0]][0]}")
    if kind is AutoEncoder and "quant_conv.weight" in ours and "bn.running_mean" not in ours:
        # Stable Diffusion 1, 2 and XL; FLUX.2's has both
        raise UserError(f"this is another model's autoencoder: it has {ours['quant_conv.weight']}")


def named_model(name: str) -> str | None:
    """Return the other model, or kind of file, that a name without prefix shows; None if it shows none."""
    flat = name.replace(".", "_")
    return next(
        (model for pattern, model in (OTHER_MODELS | OTHER_FILES).items() if re.match(pattern, flat)), None
    )


def _refuse_others(ours: dict[str, str], header: Header) -> None:
    for name, stored in ours.items():
        model = "a LoRA" if LORA.match(name) else named_model(name)
        if model:
            raise UserError(f"this is {model}: it has {stored}; accepted are {ACCEPTED}")
    shapes = {name: header[stored][0] for name, stored in ours.items()}
    first = shapes.get("img_in.weight", shapes.get("x_embedder.weight", ()))
    last = shapes.get("final_layer.linear.weight", shapes.get("proj_out.weight", ()))
    if len(first) == len(last) == 2:
        inputs, outputs = first[1], max(1, last[0])
        model = WIDER_INPUT.get(inputs / outputs)
        if model:
            sizes = f"{inputs} channels go in, {outputs} come out"
            raise UserError(f"this is {model}: {sizes}; accepted are {ACCEPTED}")
