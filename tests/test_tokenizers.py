"""The tokenizers, with FLUX's own vocabularies, against transformers and against recorded tokens."""

import json
import shutil

import pytest
import torch
from compare import randomize
from tokenizers import normalizers, pre_tokenizers
from transformers import CLIPTokenizer, T5Tokenizer

from flux import conditioner
from flux.clip import CLIPSizes, CLIPText
from flux.conditioner import Conditioner, clip_tokenizer, load_tokenizers, t5_tokenizer
from flux.errors import UserError
from flux.t5 import T5, T5Sizes

MORE = [
    "a  photo\u2003of\ta\r\nsks\u00a0man",
    "O'Neill's they'LL we'Re I'M 'tis rock'n'roll",
    "<|startoftext|>a cat<|endoftext|> and a dog",
    "A<|ENDOFTEXT|>B",
    "x²+y³=Ⅳ ⅕ 𝟘𝟙 ٣٤ 万",
    "e\u0301 vs \u00e9, \u1100\u1161 vs \uac00, İstanbul, ΣΊΣΥΦΟΣ",
    "🏳️‍🌈👨‍👩‍👧‍👦\ufe0f\u200d \U0001f1f9\U0001f1f7",
    "http://a.b/c?d=e&f=%20#g_h--i...",
    "<extra_id_0><extra_id_99> </s></s>a<pad> b <unk><extra_id_100>",
    "antidisestablishmentarianism" * 3,
    "\ud7ff\ue000\ufffd\x7f\x85\x1f",
    "-" * 200,
]


@pytest.fixture
def recorded(vocabularies) -> dict[str, list]:
    return json.loads((vocabularies / "golden_260.json").read_text())


@pytest.fixture
def folder(vocabularies, tmp_path):
    """A model folder's two tokenizer folders."""
    shutil.copytree(vocabularies / "clip", tmp_path / "tokenizer")
    shutil.copytree(vocabularies / "t5", tmp_path / "tokenizer_2")
    return tmp_path


def expect(theirs, strings: list[str], length: int) -> torch.Tensor:
    return theirs(
        strings, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids


@pytest.mark.filterwarnings("ignore:.*tokens, not")
def test_clip_equals_transformers(vocabularies, recorded):
    strings = recorded["strings"] + MORE
    ours, theirs = clip_tokenizer(vocabularies / "clip"), CLIPTokenizer.from_pretrained(vocabularies / "clip")
    assert len(strings) >= 200
    assert torch.equal(ours(strings), expect(theirs, strings, 77))
    assert [[*ours.start, *ours.encode(string), ours.end] for string in recorded["strings"]] == recorded[
        "clip"
    ]


@pytest.mark.filterwarnings("ignore:.*tokens, not")
@pytest.mark.parametrize("length", [None, 256, 12])
def test_t5_equals_transformers(vocabularies, recorded, length):
    strings = recorded["strings"] + MORE
    ours, theirs = t5_tokenizer(vocabularies / "t5", length), T5Tokenizer.from_pretrained(vocabularies / "t5")
    assert torch.equal(ours(strings), expect(theirs, strings, length or 512))
    assert [[*ours.encode(string), 1] for string in recorded["strings"]] == recorded["t5_json"]


@pytest.mark.filterwarnings("ignore:.*tokens, not")
def test_t5_from_spiece_model_equals_tokenizer_json(folder, recorded):
    # The control character U+0085 is a space to the package tokenizers only.
    strings = [string for string in recorded["strings"] + MORE if "\x85" not in string]
    from_json = load_tokenizers(folder).t5(strings)
    (folder / "tokenizer_2" / "tokenizer.json").unlink()
    assert torch.equal(load_tokenizers(folder).t5(strings), from_json)


@pytest.mark.parametrize("rule", ["Lowercase", "NFC", "Split"])
def test_the_strings_reach_every_rule(vocabularies, recorded, rule, monkeypatch):
    """Without one of CLIP's rules the comparison above fails; taken out of both, it would prove nothing."""
    strings = recorded["strings"]
    if rule == "Split":
        monkeypatch.setattr(
            conditioner.pre_tokenizers, "Split", lambda *_, **__: pre_tokenizers.WhitespaceSplit()
        )
    else:
        monkeypatch.setattr(conditioner.normalizers, rule, lambda *_: normalizers.Sequence([]))
    ours = clip_tokenizer(vocabularies / "clip")
    assert [[*ours.start, *ours.encode(string), ours.end] for string in strings] != recorded["clip"]


def test_what_is_cut_is_told(folder):
    tokenizers = load_tokenizers(folder, t5_length=8)
    with pytest.warns(UserWarning, match="CLIP sees 75 of 76 tokens, not 'cat'"):
        (row,) = tokenizers.clip(["very " * 75 + "cat"])
    assert row[0] == 49406 and row[-1] == 49407 and (row[1:-1] == row[1]).all()
    with pytest.warns(UserWarning, match="T5 sees 7 of .*, not 'house'"):
        (row,) = tokenizers.t5(["it is a very fine old house"])
    assert row[-1] == 1


@pytest.mark.parametrize(
    "file, said",
    [
        ("tokenizer/vocab.json", "CLIP tokenizer needs vocab.json"),
        ("tokenizer/merges.txt", "CLIP tokenizer needs merges.txt"),
        ("tokenizer/tokenizer_config.json", "CLIP tokenizer needs tokenizer_config.json"),
        ("tokenizer_2/tokenizer_config.json", "T5 tokenizer needs tokenizer_config.json"),
        ("tokenizer_2/*e*.*o*", "T5 tokenizer needs tokenizer.json or spiece.model"),
    ],
)
def test_missing_files_are_named(folder, file, said):
    for path in folder.glob(file):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=said):
        load_tokenizers(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model_max_length": "77"}', '{"model_max_length": 0}'])
@pytest.mark.parametrize(
    "file", ["tokenizer/tokenizer_config.json", "tokenizer_2/tokenizer_config.json", "tokenizer/vocab.json"]
)
def test_damaged_files_are_named(folder, file, content):
    (folder / file).write_text(content)
    with pytest.raises(UserError, match=str(folder / file).removesuffix("/vocab.json")):
        load_tokenizers(folder)


@pytest.mark.parametrize("config", ["{}", '{"model_max_length": 1000000000000000019884624838656}'])
def test_a_config_without_a_length_means_flux1s(folder, config):
    for name in ("tokenizer", "tokenizer_2"):
        (folder / name / "tokenizer_config.json").write_text(config)
    tokenizers = load_tokenizers(folder)
    assert (tokenizers.clip.length, tokenizers.t5.length) == (77, 512)


@pytest.mark.parametrize("file", ["tokenizer.json", "spiece.model"])
def test_a_damaged_t5_tokenizer_is_named(folder, file):
    for name in ("tokenizer.json", "spiece.model"):
        (folder / "tokenizer_2" / name).unlink()
    (folder / "tokenizer_2" / file).write_text("{")
    with pytest.raises(UserError, match="tokenizer_2 is no whole tokenizer"):
        load_tokenizers(folder)


def test_an_error_of_our_own_keeps_its_type(folder, monkeypatch):
    def broken(folder, kind):
        raise TypeError("a bug")

    monkeypatch.setattr(conditioner, "max_length", broken)
    with pytest.raises(TypeError, match="^a bug$"):
        load_tokenizers(folder)


def test_conditioner(folder):
    t5 = randomize(
        T5(T5Sizes(vocab_size=32128, hidden_size=16, head_dim=8, num_heads=2, mlp_size=8, depth=1))
    )
    clip = randomize(
        CLIPText(CLIPSizes(vocab_size=49408, max_length=77, hidden_size=8, num_heads=1, mlp_size=8, depth=1))
    )
    conditioner = Conditioner(t5, clip, load_tokenizers(folder, t5_length=20))
    txt, pooled = conditioner.encode(["a photo of a woman", ""]).values()
    assert txt.shape == (2, 20, 16) and pooled.shape == (2, 8)
    tokens = torch.tensor([[3, 9, 1202, 13, 3, 9, 2335, 1] + [0] * 12])
    assert torch.allclose(txt[:1], t5(tokens), atol=1e-6)
    # Without padding: nothing follows the end.
    tokens = torch.tensor([[49406, 320, 1125, 539, 320, 2308, 49407]])
    assert torch.allclose(pooled[:1], clip(tokens), atol=1e-6)
