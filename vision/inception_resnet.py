"""Inception-ResNet-v1 (Szegedy et al. 2017): embed faces as unit vectors, to recognise people.

The networks are those of davidsandberg/facenet under the names that timesler/facenet-pytorch gave their
tensors (`models/inception_resnet_v1.py`); the paper's FaceSim uses the one trained on VGGFace2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from flux.checkpoint import load
from flux.errors import UserError
from flux.hub import check_sha256
from flux.sizes import Shapes, shape_of

Box = tuple[int, int, int, int]

# The hub has it too, as facenet_20180402_114759_vggface2.pth in py-feat/facenet; its hash there is not known.
FILE = "20180402-114759-vggface2.pt"
URL = f"https://github.com/timesler/facenet-pytorch/releases/download/v2.2.9/{FILE}"
# Not computed by us: the hash that several public projects pin for this file of 111,898,327 bytes.
SHA256 = "281cebca8662831adb987a874bdcb36e73f5b1c6dc5ee5878f305e985625d99b"

SIZE = 160  # pixels, both sides


@dataclass(frozen=True)
class InceptionResnetSizes:
    """The width of the output: 128 for facenet's networks of 2017, 512 for those of 2018 (VGGFace2).

    For the older ones each face is standardised by its own mean and deviation, for the newer ones by fixed
    numbers. Their crops differ, too, see `crop_face`.
    """

    embedding_size: int

    @classmethod
    def from_shapes(cls, shapes: Shapes, config: dict) -> Self:
        """Read the width from a checkpoint's header; UserError unless it is 128 or 512."""
        embedding_size, _ = shape_of(shapes, "last_linear.weight", 2)
        if embedding_size not in (128, 512):
            raise UserError(f"it embeds a face in {embedding_size} numbers, known are 128 and 512")
        return cls(embedding_size)

    @property
    def fixed(self) -> bool:
        """Whether faces are standardised by fixed numbers."""
        return self.embedding_size == 512


class InceptionResnet(nn.Module):
    """The network without the layer that classified the people of the training set."""

    IGNORED = ("logits.weight", "logits.bias")

    def __init__(self, sizes: InceptionResnetSizes):
        super().__init__()
        self.sizes = sizes
        self.conv2d_1a = Conv(3, 32, 3, stride=2)
        self.conv2d_2a = Conv(32, 32, 3)
        self.conv2d_2b = Conv(32, 64, 3, padding=1)
        self.maxpool_3a = nn.MaxPool2d(3, 2)
        self.conv2d_3b = Conv(64, 80, 1)
        self.conv2d_4a = Conv(80, 192, 3)
        self.conv2d_4b = Conv(192, 256, 3, stride=2)
        self.repeat_1 = nn.Sequential(*(block35() for _ in range(5)))
        self.mixed_6a = Branches(
            Conv(256, 384, 3, stride=2),
            nn.Sequential(Conv(256, 192, 1), Conv(192, 192, 3, padding=1), Conv(192, 256, 3, stride=2)),
            nn.MaxPool2d(3, 2),
        )
        self.repeat_2 = nn.Sequential(*(block17() for _ in range(10)))
        self.mixed_7a = Branches(
            nn.Sequential(Conv(896, 256, 1), Conv(256, 384, 3, stride=2)),
            nn.Sequential(Conv(896, 256, 1), Conv(256, 256, 3, stride=2)),
            nn.Sequential(Conv(896, 256, 1), Conv(256, 256, 3, padding=1), Conv(256, 256, 3, stride=2)),
            nn.MaxPool2d(3, 2),
        )
        self.repeat_3 = nn.Sequential(*(block8(scale=0.2) for _ in range(5)))
        self.block8 = block8(scale=1.0, last=True)
        self.last_linear = nn.Linear(1792, sizes.embedding_size, bias=False)
        self.last_bn = nn.BatchNorm1d(sizes.embedding_size, eps=1e-3)

    def forward(self, faces: Tensor) -> Tensor:
        """faces: (b, 3, 160, 160), standardised -> unit vectors (b, embedding_size)"""
        x = self.conv2d_2b(self.conv2d_2a(self.conv2d_1a(faces)))  # (b, 64, 77, 77)
        x = self.conv2d_4a(self.conv2d_3b(self.maxpool_3a(x)))  # (b, 192, 36, 36)
        x = self.repeat_1(self.conv2d_4b(x))  # (b, 256, 17, 17)
        x = self.repeat_2(self.mixed_6a(x))  # (b, 896, 8, 8)
        x = self.block8(self.repeat_3(self.mixed_7a(x)))  # (b, 1792, 3, 3)
        x = self.last_bn(self.last_linear(x.mean(dim=(2, 3))))
        return F.normalize(x, dim=-1)

    @torch.no_grad()
    def embed_faces(self, images: Sequence[Image.Image], boxes: Sequence[Box]) -> Tensor:
        """Embed one face of each image as unit vectors (n, embedding_size), all in one batch."""
        crops = [crop_face(image, box, self.sizes) for image, box in zip(images, boxes, strict=True)]
        faces = torch.stack([standardize(crop, self.sizes) for crop in crops])
        return self(faces.to(self.last_linear.weight)).float()


class Conv(nn.Module):
    def __init__(
        self,
        ins: int,
        outs: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ):
        super().__init__()
        self.conv = nn.Conv2d(ins, outs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outs, eps=1e-3)  # TensorFlow's default

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()


class Branches(nn.Module):
    """Run `branch0`, `branch1`, .. on the same input and concatenate their channels."""

    def __init__(self, *branches: nn.Module):
        super().__init__()
        self.count = len(branches)
        for i, branch in enumerate(branches):
            setattr(self, f"branch{i}", branch)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([getattr(self, f"branch{i}")(x) for i in range(self.count)], dim=1)


class Residual(Branches):
    """Add the output of the branches, scaled down: without the scale the authors' training diverged."""

    def __init__(self, *branches: nn.Module, ins: int, outs: int, scale: float, last: bool = False):
        super().__init__(*branches)
        self.conv2d = nn.Conv2d(ins, outs, 1)
        self.scale, self.last = scale, last

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale * self.conv2d(super().forward(x))
        return x if self.last else x.relu()


def block35() -> Residual:
    """The names of these three blocks are the sides of their feature maps at the original input size."""
    return Residual(
        Conv(256, 32, 1),
        nn.Sequential(Conv(256, 32, 1), Conv(32, 32, 3, padding=1)),
        nn.Sequential(Conv(256, 32, 1), Conv(32, 32, 3, padding=1), Conv(32, 32, 3, padding=1)),
        ins=96,
        outs=256,
        scale=0.17,
    )


def block17() -> Residual:
    row, column = Conv(128, 128, (1, 7), padding=(0, 3)), Conv(128, 128, (7, 1), padding=(3, 0))
    return Residual(
        Conv(896, 128, 1), nn.Sequential(Conv(896, 128, 1), row, column), ins=256, outs=896, scale=0.1
    )


def block8(scale: float, last: bool = False) -> Residual:
    row, column = Conv(192, 192, (1, 3), padding=(0, 1)), Conv(192, 192, (3, 1), padding=(1, 0))
    return Residual(
        Conv(1792, 192, 1),
        nn.Sequential(Conv(1792, 192, 1), row, column),
        ins=384,
        outs=1792,
        scale=scale,
        last=last,
    )


def crop_face(image: Image.Image, box: Box, sizes: InceptionResnetSizes) -> Image.Image:
    """Cut a face out and scale it to 160 x 160, bilinear; UserError when the box lies outside the image.

    For VGGFace2's network the crop is the box itself, as with facenet-pytorch's default margin 0, which has
    another detector. For the older networks it is a square around the box, 10 % larger. The part of a crop
    outside the image is left out, and the rest is stretched to a square.
    """
    x0, y0, x1, y1 = box
    if not sizes.fixed:
        x, y, half = (x0 + x1) / 2, (y0 + y1) / 2, 1.1 * max(x1 - x0, y1 - y0) / 2
        x0, y0, x1, y1 = round(x - half), round(y - half), round(x + half), round(y + half)
    x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1, image.width), min(y1, image.height)
    if x0 >= x1 or y0 >= y1:
        raise UserError(f"the face {box} lies outside the image of {image.width} x {image.height} pixels")
    return image.convert("RGB").crop((x0, y0, x1, y1)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)


def standardize(crop: Image.Image, sizes: InceptionResnetSizes) -> Tensor:
    """Turn a crop into the network's input, (3, 160, 160) float32."""
    x = torch.from_numpy(rearrange(np.array(crop, np.float32), "h w c -> c h w"))
    if sizes.fixed:
        return (x - 127.5) / 128
    floor = x.numel() ** -0.5  # avoids a division by zero for a crop of one colour
    return (x - x.mean()) / x.std(correction=0).clamp(min=floor)


def load_recognizer(
    path: Path | None = None, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> InceptionResnet:
    """Load a network, frozen, from safetensors or a pickled .pt or .pth file; without a path the paper's.

    Raises OSError when there is no file or the download fails, and UserError when the download does not have
    the pinned SHA-256, or when tensors do not fit: it lists them.
    """
    return load(InceptionResnet, InceptionResnetSizes, path or _download(), device, dtype)


def place() -> Path:
    """Return where VGGFace2's weights are, once downloaded: in torch's cache, as facenet-pytorch's."""
    return Path(torch.hub.get_dir()).with_name("checkpoints") / FILE


def _download() -> Path:
    """Return VGGFace2's weights, downloaded if they are not there."""
    file = place()
    if not file.is_file():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL, str(file))
        except OSError as error:
            raise OSError(
                f"could not download the face recogniser ({type(error).__name__}). "
                f"Fetch {FILE} (112 MB) from\n"
                f"  {URL}\n"
                "or its mirror on the hub, https://huggingface.co/py-feat/facenet, "
                "and pass it as --recognizer FILE"
            ) from error
    return check_sha256(file, SHA256)
