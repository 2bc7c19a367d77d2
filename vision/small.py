"""Small judges that look at whole pictures: whose face is it, does the picture show what the prompt says?

They come with a model folder, as `judges/identity.safetensors` and `judges/prompt.safetensors`, for pictures
in which the large judges see nothing. Which words they know stands in the metadata of the latter.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from flux.checkpoint import read_tensors
from flux.errors import UserError

SIZE = 64  # pixels


def fits(height: int, width: int) -> bool:
    """Tell whether a picture has the size that the judges have learned from, in any shape."""
    return 0.7 < height * width / SIZE**2 < 1.4


class Block(nn.Module):
    """Two convolutions beside a short cut (He et al. 2015), halving the picture at stride 2."""

    def __init__(self, ins: int, outs: int, stride: int):
        super().__init__()
        # BatchNorm, frozen a constant scale: GroupNorm would weaken brightness, by which skins differ.
        self.conv1, self.norm1 = nn.Conv2d(ins, outs, 3, stride, 1, bias=False), nn.BatchNorm2d(outs)
        self.conv2, self.norm2 = nn.Conv2d(outs, outs, 3, 1, 1, bias=False), nn.BatchNorm2d(outs)
        self.short = nn.Conv2d(ins, outs, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return (self.short(x) + self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))).relu()


class Judge(nn.Module):
    """A small residual network that attends to four places of a picture, as a face may be anywhere."""

    def __init__(self, outs: int):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 5, 2, 2)
        self.blocks = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 128, 2), Block(128, 128, 1))
        self.where, self.head = nn.Conv2d(128, 4, 1), nn.Linear(4 * 128, outs)

    def forward(self, image: Tensor) -> Tensor:
        """image: (b, 3, h, w) in [-1, 1], of about 64 x 64 pixels in any shape -> (b, outs)."""
        if not fits(*image.shape[2:]):
            raise UserError(f"the judges know pictures of about {SIZE}x{SIZE}, got {tuple(image.shape[2:])}")
        x = self.blocks(self.stem(image).relu())  # (b, 128, h/8, w/8)
        where = self.where(x).flatten(2).softmax(dim=-1)  # (b, 4, hw/64)
        return self.head((where @ x.flatten(2).mT).flatten(1)).float()

    def look(self, image: Image.Image) -> Tensor:
        """Return a picture as `forward` wants it, pixel for pixel, (1, 3, h, w)."""
        pixels = torch.from_numpy(np.array(image.convert("RGB")))
        return rearrange(pixels, "h w c -> 1 c h w").to(self.head.weight) / 127.5 - 1


class IdentityNet(Judge):
    """Embed the person in a picture as a unit vector, (b, 128): cosine near 1 for the same, 0 for another."""

    def __init__(self):
        super().__init__(outs=128)

    def forward(self, image: Tensor) -> Tensor:
        return F.normalize(super().forward(image), dim=-1)

    @torch.no_grad()
    def embed_faces(self, images: Sequence[Image.Image]) -> Tensor:
        """Return unit vectors (n, 128); one by one, so pictures may differ in shape."""
        return torch.cat([self(self.look(image)) for image in images])


class PromptNet(Judge):
    """Tell each attribute in `vocabulary`, such as {"who": ["man", "woman"]}: its logits, (b, its values)."""

    def __init__(self, vocabulary: dict[str, Sequence[str]]):
        self.vocabulary = {name: [*words] for name, words in vocabulary.items()}
        self.counts = [len(words) for words in self.vocabulary.values()]
        super().__init__(outs=sum(self.counts))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.vocabulary, super().forward(image).split(self.counts, dim=-1)))

    def odds(self, image: Tensor) -> Tensor:
        """Return the probability of every word, (b, words)."""
        return torch.cat([logits.softmax(dim=-1) for logits in self(image).values()], dim=-1)

    @torch.no_grad()
    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Return the probability of every word, (n, words)."""
        return torch.cat([self.odds(self.look(image)) for image in images])

    def embed_texts(self, prompts: Sequence[str]) -> Tensor:
        """Share 1 among the words that a prompt names, (n, words): times a picture's odds, their mean."""
        shares = []
        for prompt in prompts:
            named = named_in(prompt, self.vocabulary)
            rows = [F.one_hot(torch.tensor(named[name]), n) if name in named else torch.zeros(n)
                    for name, n in zip(self.vocabulary, self.counts)]  # fmt: skip
            shares.append(torch.cat(rows) / len(named))
        return torch.stack(shares)

    def adherence(self, image: Tensor, prompt: str | Sequence[str]) -> Tensor:
        """Return the mean probability of all that the prompt names, (b,): a hidden shirt gets about 1/6."""
        prompts = [prompt] * len(image) if isinstance(prompt, str) else prompt
        if len(prompts) != len(image):
            raise UserError(f"{len(image)} pictures, but {len(prompts)} prompts")
        return (self.odds(image) * self.embed_texts(prompts).to(image)).sum(dim=-1)


def named_in(prompt: str, vocabulary: dict[str, Sequence[str]]) -> dict[str, int]:
    """Find what a prompt names, as positions: {"scene": 4, "who": 0} for "a man at night".

    Raises ValueError when it names nothing in the vocabulary, or two words for the same.
    """
    has = lambda word: re.search(rf"\b{word}\b", prompt.lower())
    said = [(name, k) for name, words in vocabulary.items() for k, word in enumerate(words) if has(word)]
    if not said or len(dict(said)) < len(said):
        known = "; ".join(f"{name}: {', '.join(words)}" for name, words in vocabulary.items())
        found = ", ".join(vocabulary[name][k] for name, k in said) or "nothing"
        raise UserError(
            f"the prompt {prompt!r} names {found}; to be judged it must name one or more of these, "
            f"of each kind one at most: {known}"
        )
    return dict(said)


def load_judges(folder: Path | str, device="cpu") -> tuple[IdentityNet, PromptNet]:
    """Load both judges, frozen, in float32; ValueError when a file is damaged or of another kind."""
    files = [Path(folder) / f"{name}.safetensors" for name in ("identity", "prompt")]
    (identity, _), (prompt, metadata) = map(read_tensors, files)
    if "vocabulary" not in metadata:
        raise UserError(f"{files[1]} does not say in its metadata which words it knows")
    judges = IdentityNet(), PromptNet(json.loads(metadata["vocabulary"]))
    for judge, state, file in zip(judges, (identity, prompt), files):
        try:
            judge.load_state_dict(state, strict=True)
        except RuntimeError as error:
            raise UserError(f"{file} does not hold this judge: {error}") from error
        judge.requires_grad_(False).eval().to(device)
    return judges
