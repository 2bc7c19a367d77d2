"""T5 and CLIP against transformers, on random weights, and the published headers."""

import pytest
import torch
import torch.nn.functional as F
from compare import difference, header, randomize, shapes_of
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel
from transformers.models.t5.modeling_t5 import T5Attention

from flux import t5
from flux.clip import CLIPSizes, CLIPText
from flux.t5 import T5, T5Sizes, relative_buckets

T5_TOLERANCE, CLIP_TOLERANCE = 1e-4, 1e-5
# The heads' 4 x 8 channels are not the hidden 48, which T5 allows.
T5_SIZES = T5Sizes(vocab_size=60, hidden_size=48, head_dim=8, num_heads=4, mlp_size=80, depth=3)
CLIP_SIZES = CLIPSizes(vocab_size=60, max_length=20, hidden_size=48, num_heads=3, mlp_size=80, depth=3)
END = CLIP_SIZES.vocab_size - 1


@torch.no_grad()
def t5_case() -> tuple[T5, Tensor, Tensor]:
    """Return our model, tokens, and what transformers makes of them with the same weights."""
    ours = randomize(T5(T5_SIZES))
    theirs = T5EncoderModel(
        T5Config(
            vocab_size=T5_SIZES.vocab_size,
            d_model=T5_SIZES.hidden_size,
            d_kv=T5_SIZES.head_dim,
            num_heads=T5_SIZES.num_heads,
            d_ff=T5_SIZES.mlp_size,
            num_layers=T5_SIZES.depth,
            feed_forward_proj="gated-gelu",
            attn_implementation="eager",  # written out, not the fused kernel that ours calls
        )
    ).eval()
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert set(missing) <= {"encoder.embed_tokens.weight"}  # tied to shared.weight
    assert not unexpected
    tokens = torch.randint(1, 60, (2, 300), generator=torch.Generator().manual_seed(1))  # beyond distance 128
    tokens[0, 200:] = 0  # padding, which is not masked
    return ours, tokens, theirs(tokens).last_hidden_state


@torch.no_grad()
def clip_case() -> tuple[CLIPText, Tensor, Tensor]:
    ours = randomize(CLIPText(CLIP_SIZES))
    theirs = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=CLIP_SIZES.vocab_size,
            max_position_embeddings=CLIP_SIZES.max_length,
            hidden_size=CLIP_SIZES.hidden_size,
            num_attention_heads=CLIP_SIZES.num_heads,
            intermediate_size=CLIP_SIZES.mlp_size,
            num_hidden_layers=CLIP_SIZES.depth,
            bos_token_id=None,
            eos_token_id=2,  # as in FLUX's config.json: the end is where the largest token is
            attn_implementation="eager",
        )
    ).eval()
    prefix = "" if any(name.startswith("text_model.") for name in theirs.state_dict()) else "text_model."
    theirs.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in ours.state_dict().items()})
    tokens = torch.randint(1, END, (3, 20), generator=torch.Generator().manual_seed(1))
    for row, end in enumerate((2, 11, 19)):
        tokens[row, end:] = END  # padded with the end token
    return ours, tokens, theirs(tokens).pooler_output


def test_t5_equals_transformers():
    ours, tokens, expected = t5_case()
    assert difference(ours(tokens), expected) < T5_TOLERANCE


def swap_t5_q_and_k(ours, monkeypatch):
    attention = ours.encoder.block[1].layer[0].SelfAttention
    attention.q, attention.k = attention.k, attention.q


def scale_t5_scores(ours, monkeypatch):
    attend = F.scaled_dot_product_attention  # divides by sqrt(head_dim) unless told otherwise
    name = "scaled_dot_product_attention"
    monkeypatch.setattr(F, name, lambda q, k, v, attn_mask, scale: attend(q, k, v, attn_mask))


def mirror_t5_buckets(ours, monkeypatch):
    monkeypatch.setattr(t5, "relative_buckets", lambda *args: relative_buckets(*args).T)


def swap_t5_gate(ours, monkeypatch):
    mlp = ours.encoder.block[0].layer[1].DenseReluDense
    mlp.wi_0, mlp.wi_1 = mlp.wi_1, mlp.wi_0


@pytest.mark.parametrize("broken", [swap_t5_q_and_k, scale_t5_scores, mirror_t5_buckets, swap_t5_gate])
def test_a_broken_t5_is_noticed(broken, monkeypatch):
    ours, tokens, expected = t5_case()
    broken(ours, monkeypatch)
    assert difference(ours(tokens), expected) > 100 * T5_TOLERANCE


def test_clip_equals_transformers():
    ours, tokens, expected = clip_case()
    assert difference(ours(tokens), expected) < CLIP_TOLERANCE


def swap_clip_q_and_k(ours, monkeypatch):
    attention = ours.text_model.encoder.layers[1].self_attn
    attention.q_proj, attention.k_proj = attention.k_proj, attention.q_proj


def take_the_last_end(ours, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "argmax", lambda x, dim: torch.full(x.shape[:1], x.shape[dim] - 1))


def take_the_token_before_the_end(ours, monkeypatch):
    argmax = torch.Tensor.argmax
    monkeypatch.setattr(torch.Tensor, "argmax", lambda x, dim: argmax(x, dim=dim) - 1)


def see_the_future(ours, monkeypatch):
    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, is_causal: attend(q, k, v))


def use_exact_gelu(ours, monkeypatch):
    monkeypatch.setattr(torch, "sigmoid", lambda x: torch.special.ndtr(x / 1.702))  # then x * this is GELU


@pytest.mark.parametrize(
    "broken",
    [swap_clip_q_and_k, take_the_last_end, take_the_token_before_the_end, see_the_future, use_exact_gelu],
)
def test_a_broken_clip_is_noticed(broken, monkeypatch):
    ours, tokens, expected = clip_case()
    broken(ours, monkeypatch)
    assert difference(ours(tokens), expected) > 100 * CLIP_TOLERANCE


def test_relative_buckets():
    """Values worked out from the definition, and transformers' at every distance."""
    row = relative_buckets(300)[150]  # of the query at 150
    behind = {-149: 15, -128: 15, -64: 14, -20: 10, -9: 8, -7: 7, -1: 1, 0: 0}
    ahead = {1: 17, 7: 23, 8: 24, 20: 26, 64: 30, 127: 31}
    for offset, bucket in (behind | ahead).items():
        assert row[150 + offset] == bucket, offset
    position = torch.arange(600)
    offsets = position[None] - position[:, None]
    theirs = T5Attention._relative_position_bucket(offsets, num_buckets=32, max_distance=128)
    assert torch.equal(relative_buckets(600), theirs)


def test_relative_buckets_are_made_once(monkeypatch):
    """For all prompts of a length; and what inference has made serves training too."""
    model, made = randomize(T5(T5_SIZES)), []
    log = torch.log
    monkeypatch.setattr(torch, "log", lambda x: made.append(x.shape) or log(x))
    for length in (23, 23, 29):
        with torch.inference_mode():
            model(torch.ones(1, length, dtype=torch.long))
    model(torch.ones(1, 23, dtype=torch.long)).sum().backward()
    assert made == [(23, 23), (29, 29)]
    assert model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.grad.any()


@pytest.mark.parametrize("model", [T5(T5_SIZES), CLIPText(CLIP_SIZES)], ids=["t5", "clip"])
def test_bfloat16_is_near_float32(model):
    tokens = torch.randint(1, 60, (2, 20), generator=torch.Generator().manual_seed(1))
    model = randomize(model)
    expected = model(tokens)
    result = model.bfloat16()(tokens)
    assert result.dtype == torch.bfloat16
    assert (result - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(
    "name, kind, sizes_kind, expected",
    [
        ("t5xxl", T5, T5Sizes, T5Sizes(32128, 4096, 64, 64, 10240, 24)),
        ("clip_l", CLIPText, CLIPSizes, CLIPSizes(49408, 77, 768, 12, 3072, 12)),
        ("clip_vit_b32", CLIPText, CLIPSizes, CLIPSizes(49408, 77, 512, 8, 2048, 12)),
    ],
)
def test_published_files(name, kind, sizes_kind, expected):
    shapes = header(name)
    sizes = sizes_kind.from_shapes(shapes, {})
    assert sizes == expected
    with torch.device("meta"):
        model = kind(sizes)
    assert shapes_of(model) == {
        key: shape
        for key, shape in shapes.items()
        if key not in kind.IGNORED and not key.startswith(("vision_model", "visual", "text_proj", "logit"))
    }


def test_sizes_are_read_from_shapes():
    assert T5Sizes.from_shapes(shapes_of(T5(T5_SIZES)), {}) == T5_SIZES
    shapes = shapes_of(CLIPText(CLIP_SIZES))
    assert CLIPSizes.from_shapes(shapes, {"num_attention_heads": 3}) == CLIP_SIZES
    assert CLIPSizes.from_shapes(shapes, {"text_config": {"num_attention_heads": 3}}) == CLIP_SIZES


def test_too_many_tokens_are_refused():
    with pytest.raises(ValueError, match="21 tokens given, CLIP takes at most 20"):
        CLIPText(CLIP_SIZES)(torch.ones(1, 21, dtype=torch.long))
