"""The base models, as files: which parts each has, where they lie, and which repositories have them.

Code above `flux/` takes the base that a model's files show, and never asks which one it is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from flux.chat import ChatConditioner, load_chat_tokenizer
from flux.checkpoint import Checkpoint
from flux.conditioner import Conditioner, load_tokenizers
from flux.flux2 import Flux2, Flux2Sizes
from flux.formats import transformer_kind
from flux.model import Flux, FluxSizes
from flux.transformer import Transformer

# In any base's folder: it is sought before the base is known.
TRANSFORMER = (
    "flux1-*.safetensors",
    "flux1-*.sft",
    "flux-2-*.safetensors",
    "transformer",
    "flux*.safetensors",
)


@dataclass(frozen=True)
class Base:
    """What the files of a base model are; its parts are called as in `flux.loading.LOADERS`."""

    name: str
    kind: type[Transformer]
    sizes: type
    packed: bool  # are the autoencoder's latents packed?
    conditioner: type[nn.Module]  # takes the text encoders by their names, and `tokenizers`
    load_tokenizers: Callable  # of folders (a tuple) and of the tokens per prompt, None for the usual number
    # Where a part lies in a model's folder, the best place first. A name without a dot is a folder, which may
    # hold shards.
    places: dict[str, tuple[str, ...]]
    # The tokenizers' folders and the files in them; of each tuple one is enough.
    tokenizers: dict[str, tuple[tuple[str, ...], ...]]
    # Free repositories with the same, one per folder, for those who have the weights as single files.
    free_tokenizers: dict[str, tuple[str, ...]]
    variables: dict[str, str]  # of the environment
    # Repositories on the hub by their names, grouped by the width of the text: those of a group have the same
    # autoencoder and text encoders. What another model lacks is taken from the first of its group.
    models: dict[int, dict[str, str]]
    few_steps: dict[str, float] | None = None  # how a distilled model is sampled, if the base has any

    @property
    def encoders(self) -> list[str]:
        """Return the names of the text encoders."""
        return [part for part in self.places if part not in ("transformer", "autoencoder")]

    @property
    def parts(self) -> list[str]:
        return [*self.places, "tokenizers"]

    def folders(self, tokenizers: Path | tuple[Path, ...]) -> tuple[Path, ...]:
        """Return the tokenizers' folders: those in a model's folder, or these."""
        if isinstance(tokenizers, tuple):
            return tokenizers
        return tuple(tokenizers / name for name in self.tokenizers)

    @property
    def tokenizer_files(self) -> list[tuple[str, ...]]:
        """Return the files of all tokenizers in a model's folder; of each tuple one is enough."""
        groups = ((name, group) for name, groups in self.tokenizers.items() for group in groups)
        return [tuple(f"{name}/{file}" for file in group) for name, group in groups]

    def relatives(self, model: str | int) -> list[str]:
        """Return the repositories of the group that holds this one, or whose text has this width.

        With only one group it is that, whatever the width; else there may be none.
        """
        groups = [group for width, group in self.models.items() if model in (width, *group.values())]
        groups = groups or [*self.models.values()] * (len(self.models) == 1)
        return [repo for group in groups for repo in group.values()]


FLUX1 = Base(
    name="FLUX.1",
    kind=Flux,
    sizes=FluxSizes,
    packed=False,
    conditioner=Conditioner,
    load_tokenizers=load_tokenizers,
    places={
        "transformer": TRANSFORMER,
        "autoencoder": ("ae.safetensors", "ae.sft", "vae"),
        "clip": ("text_encoder",),
        "t5": ("text_encoder_2",),
    },
    tokenizers={
        "tokenizer": (("vocab.json",), ("merges.txt",), ("tokenizer_config.json",)),
        "tokenizer_2": (("tokenizer.json", "spiece.model"), ("tokenizer_config.json",)),
    },
    free_tokenizers={
        "openai/clip-vit-large-patch14": ("vocab.json", "merges.txt", "tokenizer_config.json"),
        "google/t5-v1_1-xxl": ("spiece.model", "tokenizer_config.json"),
    },
    variables={
        "autoencoder": "FLUX_AE",
        "clip": "FLUX_CLIP_L",
        "t5": "FLUX_T5",
        "tokenizers": "FLUX_TOKENIZERS",
    },
    models={
        4096: {
            "flux-dev": "black-forest-labs/FLUX.1-dev",
            "flux-schnell": "black-forest-labs/FLUX.1-schnell",
            "flux-krea-dev": "black-forest-labs/FLUX.1-Krea-dev",
        },
    },
)
FLUX2 = Base(
    name="FLUX.2",
    kind=Flux2,
    sizes=Flux2Sizes,
    packed=True,
    conditioner=ChatConditioner,
    load_tokenizers=lambda folders, length=None: load_chat_tokenizer(*folders, length),
    places={
        "transformer": TRANSFORMER,
        "autoencoder": ("flux2-vae.safetensors", "ae.safetensors", "vae"),
        "qwen3": ("text_encoder",),
    },
    tokenizers={"tokenizer": (("tokenizer.json",),)},
    free_tokenizers={"Qwen/Qwen3-4B": ("tokenizer.json",)},
    variables={"autoencoder": "FLUX2_AE", "qwen3": "FLUX_QWEN3", "tokenizers": "FLUX2_TOKENIZERS"},
    models={
        7680: {
            "klein-4b": "black-forest-labs/FLUX.2-klein-base-4B",
            "klein-4b-distilled": "black-forest-labs/FLUX.2-klein-4B",
        },
        12288: {
            "klein-9b": "black-forest-labs/FLUX.2-klein-base-9B",
            "klein-9b-distilled": "black-forest-labs/FLUX.2-klein-9B",
        },
    },
    few_steps={"steps": 4, "cfg": 1.0},
)
BASES = {base.kind: base for base in (FLUX1, FLUX2)}


def base_of(transformer: Path | str) -> Base:
    """Return the base of a transformer's file or folder, by the names of its tensors."""
    return BASES[transformer_kind(Checkpoint.open(transformer).header)]
