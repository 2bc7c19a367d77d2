"""Two small networks for pictures of 64 x 64 pixels: one recognises people, one the content of a prompt.

A model folder may bring them along, as `judges/identity.safetensors` and `judges/prompt.safetensors`, for
pictures that are too small for CLIP and Inception-ResNet. The metadata of the latter list the words it knows.
Another one that recognises people is the predictor's, `eye.safetensors`.
"""

import json
import math
import re
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from flux.checkpoint import read_tensors
from flux.errors import UserError, listed

SIZE = 64  # pixels


def fits(height: int, width: int) -> bool:
    """Tell whether a picture has about the number of pixels that the networks were trained on."""
    return 0.7 < height * width / SIZE**2 < 1.4


def shrink(image: Image.Image) -> Image.Image:
    """Return a picture of about the networks' size; UserError when this one is smaller."""
    if fits(image.height, image.width):
        return image
    factor = math.sqrt(image.height * image.width) / SIZE
    if factor < 1:
        raise UserError(
            f"it has {image.width} x {image.height} pixels, must have about {SIZE} x {SIZE} or more"
        )
    size = round(image.width / factor), round(image.height / factor)
    return image.resize(size, Image.Resampling.LANCZOS)


class Block(nn.Module):
    """Two convolutions with a residual connection (He et al. 2015); stride 2 halves height and width."""

    def __init__(self, ins: int, outs: int, stride: int):
        super().__init__()
        # Not GroupNorm: it would remove brightness, in which skins differ. Frozen, BatchNorm only scales.
        self.conv1, self.norm1 = nn.Conv2d(ins, outs, 3, stride, 1, bias=False), nn.BatchNorm2d(outs)
        self.conv2, self.norm2 = nn.Conv2d(outs, outs, 3, 1, 1, bias=False), nn.BatchNorm2d(outs)
        self.short = nn.Conv2d(ins, outs, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return (self.short(x) + self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))).relu()


class SmallNet(nn.Module):
    """A small residual network that attends to four places of a picture, as a face may be anywhere."""

    def __init__(self, outs: int):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 5, 2, 2)
        self.blocks = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 128, 2), Block(128, 128, 1))
        self.where, self.head = nn.Conv2d(128, 4, 1), nn.Linear(4 * 128, outs)

    def forward(self, image: Tensor) -> Tensor:
        """image: (b, 3, h, w) in [-1, 1], of about 64 x 64 pixels in any shape -> (b, outs)."""
        if not fits(*image.shape[2:]):
            raise UserError(f"pictures must have about {SIZE}x{SIZE} pixels, got {tuple(image.shape[2:])}")
        x = self.blocks(self.stem(image).relu())  # (b, 128, h/8, w/8)
        where = self.where(x).flatten(2).softmax(dim=-1)  # (b, 4, hw/64)
        return self.head((where @ x.flatten(2).mT).flatten(1)).float()

    def look(self, image: Image.Image) -> Tensor:
        """Turn a picture into the input of `forward`, (1, 3, h, w), without resizing."""
        pixels = torch.from_numpy(np.array(image.convert("RGB")))
        return rearrange(pixels, "h w c -> 1 c h w").to(self.head.weight) / 127.5 - 1


class IdentityNet(SmallNet):
    """Embed the person in a picture as a unit vector, (b, 128); two of one person have a cosine near 1."""

    def __init__(self):
        super().__init__(outs=128)

    def forward(self, image: Tensor) -> Tensor:
        return F.normalize(super().forward(image), dim=-1)

    @torch.no_grad()
    def embed_faces(self, images: Sequence[Image.Image]) -> Tensor:
        """Return unit vectors (n, 128). Pictures go through one by one, so their shapes may differ."""
        return torch.cat([self(self.look(image)) for image in images])


class PromptNet(SmallNet):
    """Classify a picture by each attribute of a vocabulary, such as {"who": ["man", "woman"]}.

    The output is a dictionary from attributes to logits, (b, number of its words).
    """

    def __init__(self, vocabulary: dict[str, Sequence[str]]):
        self.vocabulary = {name: [*words] for name, words in vocabulary.items()}
        self.counts = [len(words) for words in self.vocabulary.values()]
        super().__init__(outs=sum(self.counts))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.vocabulary, super().forward(image).split(self.counts, dim=-1)))

    def odds(self, image: Tensor) -> Tensor:
        """Return the probability of each word of the vocabulary, (b, words)."""
        return torch.cat([logits.softmax(dim=-1) for logits in self(image).values()], dim=-1)

    @torch.no_grad()
    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Return the probability of each word of the vocabulary, (n, words)."""
        return torch.cat([self.odds(self.look(image)) for image in images])

    def embed_texts(self, prompts: Sequence[str]) -> Tensor:
        """Return weights (n, words): 1/k for each of the k words that a prompt names, 0 for the others.

        The dot product with the probabilities of a picture is the mean probability of the named words.
        """
        starts = dict(zip(self.vocabulary, [0, *accumulate(self.counts)]))  # of the words of each attribute
        weights = torch.zeros(len(prompts), sum(self.counts))
        for row, prompt in zip(weights, prompts):
            named = named_in(prompt, self.vocabulary)
            for name, k in named.items():
                row[starts[name] + k] = 1 / len(named)
        return weights

    def adherence(self, image: Tensor, prompt: str | Sequence[str]) -> Tensor:
        """Return the mean probability of the words that the prompt names, (b,).

        image: (b, 3, h, w); prompt: one for all pictures or one for each. An attribute that the picture does
        not show counts by chance: a shirt outside the picture gets about 1/6, as there are six colours.
        """
        prompts = [prompt] * len(image) if isinstance(prompt, str) else prompt
        if len(prompts) != len(image):
            raise UserError(f"{len(image)} pictures, but {len(prompts)} prompts")
        return (self.odds(image) * self.embed_texts(prompts).to(image)).sum(dim=-1)


def named_in(prompt: str, vocabulary: dict[str, Sequence[str]]) -> dict[str, int]:
    """Find the words of the vocabulary in a prompt: {"scene": 4, "who": 0} for "a man at night".

    Raises UserError when there is none, or two of the same attribute.
    """
    positions: dict[str, int] = {}
    words_found = []
    for name, words in vocabulary.items():
        for k, word in enumerate(words):
            if re.search(rf"\b{word}\b", prompt.lower()):
                positions[name] = k
                words_found.append(word)
    if not positions or len(positions) < len(words_found):
        named = ", ".join(words_found) or "nothing"
        known = "; ".join(f"{name}: {', '.join(words)}" for name, words in vocabulary.items())
        raise UserError(
            f"the prompt {prompt!r} names {named}; to be scored it must name at "
            f"least one of these words, and at most one of each kind: {known}"
        )
    return positions


def load_judges(folder: Path | str, device: torch.device | str = "cpu") -> tuple[IdentityNet, PromptNet]:
    """Load both networks of a folder `judges`, frozen, in float32.

    Raises UserError when a file is damaged or holds another network.
    """
    file = Path(folder) / "prompt.safetensors"
    state, metadata = read_tensors(file)
    if "vocabulary" not in metadata:
        raise UserError(f"{file} does not say in its metadata which words it knows")
    prompt = _filled(PromptNet(json.loads(metadata["vocabulary"])), state, file, device)
    return load_identity(Path(folder) / "identity.safetensors", device), prompt


def load_identity(file: Path, device: torch.device | str = "cpu") -> IdentityNet:
    """Load the network that recognises people as `load_judges` does."""
    return _filled(IdentityNet(), read_tensors(file)[0], file, device)


def _filled(network: SmallNet, state: dict[str, Tensor], file: Path, device: torch.device | str) -> SmallNet:
    needed = {name: tensor.shape for name, tensor in network.state_dict().items()}
    given = {name: tensor.shape for name, tensor in state.items()}
    wrong = sorted(name for name in needed | given if needed.get(name) != given.get(name))
    if wrong:
        raise UserError(f"{file} does not hold this network: wrong are {listed(wrong, most=5)}")
    network.load_state_dict(state)
    return network.requires_grad_(False).eval().to(device)
