"""Turn prompts into what FLUX.1 is conditioned on: T5 features and CLIP's pooled vector.

The tokenizers are built from the files in `tokenizer/` (CLIP) and `tokenizer_2/` (T5) of a model folder and
give the same tokens as transformers' CLIPTokenizer and T5Tokenizer.
"""

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor, nn

from flux.checkpoint import read_json
from flux.clip import CLIPText
from flux.errors import UserError
from flux.t5 import T5

LENGTHS = {"CLIP": 77, "T5": 512}  # FLUX.1's, where a config is silent, as google/t5-v1_1-xxl's
UNLIMITED = int(1e30)  # what transformers writes for that


class Conditioner(nn.Module):
    """Both text encoders with their tokenizers; a module, so that the encoders move to a device together."""

    def __init__(self, t5: T5, clip: CLIPText, tokenizers: "Tokenizers"):
        super().__init__()
        self.t5, self.clip, self.tokenizers = t5, clip, tokenizers

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """Return txt (b, l, d), padding included and unmasked as FLUX was trained, and pooled (b, d)."""
        device = self.t5.shared.weight.device
        txt = self.t5(self.tokenizers.t5(prompts).to(device))
        pooled = self.clip(self.tokenizers.clip(prompts).to(device))
        return {"txt": txt, "pooled": pooled}


@dataclass(frozen=True)
class PromptTokenizer:
    """Turn prompts into rows of equal length: `start`, the text, `end`, padding."""

    name: str
    encode: Callable[[str], list[int]]  # neither start nor end
    decode: Callable[[list[int]], str]
    length: int
    start: list[int]
    end: int
    pad: int

    def __call__(self, prompts: list[str]) -> Tensor:
        """Return tokens (b, length); what is too long is cut before `end`, with a warning that quotes it."""
        room = self.length - len(self.start) - 1
        rows = []
        for prompt in prompts:
            tokens = self.encode(prompt)
            if len(tokens) > room:
                lost = self.decode(tokens[room:])[:80].strip()
                warnings.warn(f"{self.name} sees {room} of {len(tokens)} tokens, not {lost!r}", stacklevel=2)
            row = [*self.start, *tokens[:room], self.end]
            rows.append(row + [self.pad] * (self.length - len(row)))
        return torch.tensor(rows)


@dataclass(frozen=True)
class Tokenizers:
    clip: PromptTokenizer
    t5: PromptTokenizer

    @property
    def length(self) -> int:
        """Return the tokens of `txt`, which are T5's."""
        return self.t5.length


def load_tokenizers(place: Path | str | tuple[Path, Path], t5_length: int | None = None) -> Tokenizers:
    """Read both tokenizers of a model's folder, or of two folders; lengths are the files' unless given.

    Raises FileNotFoundError that names the missing file, and UserError that names a damaged one.
    """
    clip, t5 = place if isinstance(place, tuple) else (Path(place) / x for x in ("tokenizer", "tokenizer_2"))
    return Tokenizers(clip_tokenizer(clip), t5_tokenizer(t5, t5_length))


def clip_tokenizer(folder: Path) -> PromptTokenizer:
    """Build CLIP's byte-level BPE (openai/CLIP `simple_tokenizer.py`, without its repair of broken text)."""
    vocabulary, merges = (find(folder, "CLIP", name) for name in ("vocab.json", "merges.txt"))
    start, end = "<|startoftext|>", "<|endoftext|>"
    with damage_named(folder):
        bpe = models.BPE.from_file(str(vocabulary), str(merges), end_of_word_suffix="</w>", unk_token=end)
    tokenizer = Tokenizer(bpe)
    tokenizer.add_special_tokens([start, end])
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    # White space is in no word, so there is no need to normalise it first.
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " ")])
    start, end = tokenizer.token_to_id(start), tokenizer.token_to_id(end)
    return PromptTokenizer(
        name="CLIP",
        encode=lambda text: tokenizer.encode(text).ids,
        decode=tokenizer.decode,
        length=max_length(folder, "CLIP"),
        start=[start],
        end=end,
        pad=end,
    )


def t5_tokenizer(folder: Path, length: int | None = None) -> PromptTokenizer:
    """Load T5's unigram tokenizer from `tokenizer.json`, else from `spiece.model` with sentencepiece."""
    file = find(folder, "T5", "tokenizer.json", "spiece.model")
    if file.name == "tokenizer.json":
        with damage_named(folder):
            tokenizer = Tokenizer.from_file(str(file))

        def encode(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False).ids

        decode = tokenizer.decode
    else:
        encode, decode = sentencepiece(file)
    return PromptTokenizer("T5", encode, decode, length or max_length(folder, "T5"), start=[], end=1, pad=0)


def sentencepiece(file: Path) -> tuple[Callable[[str], list[int]], Callable[[list[int]], str]]:
    """Return encode and decode of a `spiece.model`, which lacks T5's special tokens: they are added here."""
    from sentencepiece import SentencePieceProcessor  # only needed where tokenizer.json is missing

    with damage_named(file.parent):
        pieces = SentencePieceProcessor(model_file=str(file))
    special = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    special |= {f"<extra_id_{i}>": len(pieces) + 99 - i for i in range(100)}  # counted from the end
    splitter = re.compile(f"({'|'.join(map(re.escape, special))})")

    def encode(text: str) -> list[int]:
        parts = ([special[part]] if part in special else pieces.encode(part) for part in splitter.split(text))
        return [token for part in parts for token in part]

    return encode, lambda tokens: pieces.decode([token for token in tokens if token < len(pieces)])


def max_length(folder: Path, kind: str) -> int:
    """Return the tokens per prompt that a tokenizer's config tells, or FLUX.1's; UserError for no number."""
    file = find(folder, kind, "tokenizer_config.json")
    length = read_json(file).get("model_max_length", LENGTHS[kind])
    if length == UNLIMITED:
        return LENGTHS[kind]
    if type(length) is not int or length < 1:
        raise UserError(f"{file}: model_max_length {length!r}, must be a whole number above 0")
    return length


def find(folder: Path, kind: str, *accepted: str) -> Path:
    """Return the first of the accepted files that is there; FileNotFoundError names them."""
    for name in accepted:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"the {kind} tokenizer needs {' or '.join(accepted)} in {folder}")


@contextmanager
def damage_named(folder: Path) -> Iterator[None]:
    """Raise UserError that names the folder when a library cannot read a tokenizer's file."""
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:  # tokenizers raises plain Exception, sentencepiece RuntimeError
        raise UserError(f"{folder} is no whole tokenizer ({error})") from error
