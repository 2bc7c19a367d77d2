"""CLIP ViT-B/32 against transformers: both towers on random weights, preprocessing, the published header."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compare import difference, header, randomize, shapes_of
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel

from flux.clip import CLIPSizes
from vision import clip_vit
from vision.clip_vit import CLIPViT, CLIPViTSizes, find_clip_vit, load_clip_vit, preprocess

try:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
except ImportError:  # before version 5
    from transformers import CLIPImageProcessor as CLIPImageProcessorPil

TOLERANCE = 1e-5
TEXT = CLIPSizes(vocab_size=60, max_length=12, hidden_size=48, num_heads=3, mlp_size=80, depth=2)
SIZES = CLIPViTSizes(
    text=TEXT,
    hidden_size=40,
    num_heads=5,
    mlp_size=72,
    depth=3,
    patch_size=8,
    image_size=24,
    embedding_size=20,
)


def photo(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


IMAGES = [photo(24, 24), photo(60, 31, seed=1), photo(25, 90, seed=2)]


@pytest.fixture(scope="module")
def theirs() -> CLIPModel:
    text = {
        "vocab_size": TEXT.vocab_size,
        "max_position_embeddings": TEXT.max_length,
        "hidden_size": TEXT.hidden_size,
        "num_attention_heads": TEXT.num_heads,
        "intermediate_size": TEXT.mlp_size,
        "num_hidden_layers": TEXT.depth,
        "bos_token_id": None,
        "eos_token_id": 2,  # as in the published config: the end is where the largest token is
    }
    vision = {
        "hidden_size": SIZES.hidden_size,
        "num_attention_heads": SIZES.num_heads,
        "intermediate_size": SIZES.mlp_size,
        "num_hidden_layers": SIZES.depth,
        "patch_size": SIZES.patch_size,
        "image_size": SIZES.image_size,
    }
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=SIZES.embedding_size)
    return randomize(CLIPModel._from_config(config, attn_implementation="eager"))


@pytest.fixture
def folder(theirs, tmp_path):
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    theirs.config.to_json_file(tmp_path / "config.json")
    return tmp_path


@pytest.fixture
def tokens() -> torch.Tensor:
    tokens = torch.randint(1, 59, (3, 12), generator=torch.Generator().manual_seed(1))
    for row, end in enumerate((2, 7, 11)):
        tokens[row, end:] = 59
    return tokens


@torch.no_grad()
def expected(theirs: CLIPModel, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = torch.stack([preprocess(image, SIZES.image_size) for image in IMAGES])
    output = theirs(input_ids=tokens, pixel_values=pixels)
    return output.image_embeds, output.text_embeds


def test_both_towers_equal_transformers(folder, theirs, tokens):
    ours = load_clip_vit(folder)
    assert ours.sizes == SIZES
    images, texts = expected(theirs, tokens)
    assert difference(ours.embed_images(IMAGES), images) < TOLERANCE
    assert difference(ours.embed_texts(tokens), texts) < TOLERANCE
    lengths = torch.cat([ours.embed_images(IMAGES), ours.embed_texts(tokens)]).norm(dim=1)
    assert difference(lengths, torch.ones(6)) < TOLERANCE


def swap_q_and_k(ours, monkeypatch):
    for tower in (ours.text_model, ours.vision_model):
        attention = tower.encoder.layers[1].self_attn
        attention.q_proj, attention.k_proj = attention.k_proj, attention.q_proj


def swap_causal_and_not(ours, monkeypatch):
    attend = F.scaled_dot_product_attention
    name = "scaled_dot_product_attention"
    monkeypatch.setattr(F, name, lambda q, k, v, is_causal: attend(q, k, v, is_causal=not is_causal))


def use_exact_gelu(ours, monkeypatch):
    monkeypatch.setattr(torch, "sigmoid", lambda x: torch.special.ndtr(x / 1.702))


def forget_the_last_norm(ours, monkeypatch):
    ours.vision_model.post_layernorm = ours.text_model.final_layer_norm = torch.nn.Identity()


@pytest.mark.parametrize("broken", [swap_q_and_k, swap_causal_and_not, use_exact_gelu, forget_the_last_norm])
def test_a_broken_tower_is_noticed(broken, folder, theirs, tokens, monkeypatch):
    ours = load_clip_vit(folder)
    images, texts = expected(theirs, tokens)
    broken(ours, monkeypatch)
    assert difference(ours.embed_images(IMAGES), images) > 100 * TOLERANCE
    assert difference(ours.embed_texts(tokens), texts) > 100 * TOLERANCE


def no_first_norm(ours):
    ours.vision_model.pre_layrnorm = torch.nn.Identity()


def class_embedding_at_the_second_position(ours):
    positions = ours.vision_model.embeddings.position_embedding.weight
    positions.data = positions[[1, 0, *range(2, len(positions))]]


def patches_turned(ours):
    patches = ours.vision_model.embeddings.patch_embedding.weight
    patches.data = patches.mT.contiguous()


@pytest.mark.parametrize("broken", [no_first_norm, class_embedding_at_the_second_position, patches_turned])
def test_a_broken_vision_tower_is_noticed(broken, folder, theirs, tokens):
    ours = load_clip_vit(folder)
    broken(ours)
    assert difference(ours.embed_images(IMAGES), expected(theirs, tokens)[0]) > 100 * TOLERANCE


PHOTO_SIZES = [(224, 224), (640, 480), (333, 517), (1, 1), (3, 7), (223, 500), (2048, 1501), (3000, 260)]


@pytest.mark.parametrize("width, height", PHOTO_SIZES)
def test_preprocessing_equals_transformers(width, height):
    for mode in ("RGB", "L"):
        image = photo(width, height, mode)
        theirs = CLIPImageProcessorPil()(image, return_tensors="pt")["pixel_values"][0]
        assert difference(preprocess(image), theirs) == 0


def test_another_rounding_is_noticed(monkeypatch):
    theirs = CLIPImageProcessorPil()(photo(333, 517), return_tensors="pt")["pixel_values"][0]
    monkeypatch.setattr(clip_vit, "int", round, raising=False)
    assert difference(preprocess(photo(333, 517)), theirs) > 0.1


def test_published_file():
    shapes = header("clip_vit_b32")
    assert set(CLIPViT.IGNORED) <= shapes.keys()
    sizes = CLIPViTSizes.from_shapes(shapes, {})
    text = CLIPSizes(49408, 77, 512, 8, 2048, 12)
    assert sizes == CLIPViTSizes(text, 768, 12, 3072, 12, patch_size=32, image_size=224, embedding_size=512)
    with torch.device("meta"):
        model = CLIPViT(sizes)
    assert shapes_of(model) == {name: shape for name, shape in shapes.items() if name not in CLIPViT.IGNORED}


def test_a_pickled_file_gives_the_same(folder, theirs):
    expected = load_clip_vit(folder).embed_images(IMAGES)
    (folder / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
    assert torch.equal(load_clip_vit(folder).embed_images(IMAGES), expected)


@pytest.mark.parametrize(
    "name, tensor, message",
    [
        ("vision_model.embeddings.patch_embedding.weight", None, "it lacks vision_model.*patch_embedding"),
        ("vision_model.embeddings.position_embedding.weight", torch.ones(10), "must have 2 axes"),
        ("vision_model.encoder.layers.0.mlp.fc1.weight", torch.ones(0, 40), "none of them empty"),
        ("visual_projection.weight", torch.ones(()), "must have 2 axes"),
    ],
)
def test_damaged_sizes_are_named(name, tensor, message, folder, theirs):
    tensors = {key: stored for key, stored in theirs.state_dict().items() if key != name}
    save_file(tensors if tensor is None else tensors | {name: tensor}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"not a CLIPViT checkpoint: .*{message}"):
        load_clip_vit(folder)


@pytest.mark.parametrize("vision", [None, "ViT", {"num_attention_heads": "5"}, {"num_attention_heads": 3}])
def test_damaged_configs_are_named(vision, folder, theirs):
    config = theirs.config.to_dict() | {"vision_config": vision}
    (folder / "config.json").write_text(json.dumps(config, default=str))
    with pytest.raises(
        ValueError, match="not a CLIPViT checkpoint: .*(vision_config|num_attention_heads|3 att)"
    ):
        load_clip_vit(folder)


def test_without_weights_the_message_says_what_to_do(tmp_path):
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(FileNotFoundError, match="--clip .*model.safetensors or pytorch_model.bin"):
            load_clip_vit(path)


@pytest.mark.parametrize("cached", [None, "pytorch_model.bin"])
def test_the_hubs_file_is_held_to_its_hash(cached, tmp_path, monkeypatch):
    asked = {}

    def download(repository, name, revision):
        asked[name] = revision
        (tmp_path / name).touch()
        return tmp_path / name

    monkeypatch.setattr(clip_vit, "hub_file", download)
    is_cached = lambda repository, name, revision: name if name == cached else None
    monkeypatch.setattr(clip_vit, "try_to_load_from_cache", is_cached)
    name = cached or "model.safetensors"
    revision, sha256 = clip_vit.WEIGHTS[name]
    with pytest.raises(ValueError, match=f"{name} has SHA-256 e3b0c44.*, not {sha256}"):
        find_clip_vit()
    assert asked == dict.fromkeys((name, *clip_vit.BESIDE), revision)
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    monkeypatch.setitem(clip_vit.WEIGHTS, name, (revision, empty))
    assert find_clip_vit() == tmp_path / name


def test_without_network_the_message_says_what_to_do(monkeypatch):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("flux.hub.get_hf_file_metadata", offline)
    with pytest.raises(OSError, match=r"model.safetensors, .*\n.*huggingface.co/openai/.*\n.*--clip FOLDER"):
        find_clip_vit()
