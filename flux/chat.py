"""Turn prompts into what FLUX.2 klein is conditioned on: hidden states of Qwen3, given the chat form.

The tokenizer is read from `tokenizer.json` in a model's `tokenizer/`. The form and the tokens are those of
transformers' `apply_chat_template` for one turn of the user, with the generation prompt, thinking off.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from flux.conditioner import damage_named, find
from flux.errors import UserError
from flux.qwen3 import Qwen3

START = "<|im_start|>user\n"
END = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"  # an empty thought: thinking is off
PAD = "<|endoftext|>"
MARKERS = ("<|im_start|>", "<|im_end|>", "<think>", "</think>", PAD)  # a token each
LENGTH = 512  # what FLUX.2 was trained with


class ChatConditioner(nn.Module):
    """Qwen3 with its tokenizer; the counterpart of `flux.conditioner.Conditioner`."""

    def __init__(self, qwen3: Qwen3, tokenizers: "ChatTokenizer"):
        super().__init__()
        self.qwen3, self.tokenizers = qwen3, tokenizers

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """Return txt (b, l, 3 d), padding included and unmasked for the transformer, as it was trained."""
        device = self.qwen3.model.embed_tokens.weight.device
        tokens, mask = self.tokenizers(prompts)
        return {"txt": self.qwen3(tokens.to(device), mask.to(device))}


@dataclass(frozen=True)
class ChatTokenizer:
    """Turn prompts into rows of equal length: the chat form around the prompt, then padding."""

    tokenizer: Tokenizer
    length: int

    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Return tokens and mask, both (b, length); the mask is False at padding.

        Markers such as <|im_end|> within a prompt are markers, as in transformers. What is too long is cut as
        diffusers cuts it, the end of the form first, with a warning that quotes what the prompt loses.
        """
        pad = self.tokenizer.token_to_id(PAD)
        end = len(self.encode(END))  # the same tokens after any prompt, for END begins with a marker
        rows, masks = [], []
        for prompt in prompts:
            tokens = self.encode(START + prompt + END)
            if len(tokens) > self.length:
                lost = self.tokenizer.decode(tokens[self.length : -end])[:80].strip()
                seen = f"Qwen3 sees {self.length} of {len(tokens)} tokens"
                warnings.warn(f"{seen}, not {lost!r}", stacklevel=2)
            tokens = tokens[: self.length]
            padding = self.length - len(tokens)
            rows.append(tokens + [pad] * padding)
            masks.append([True] * len(tokens) + [False] * padding)
        return torch.tensor(rows), torch.tensor(masks)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, with nothing before or after it."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids


def load_chat_tokenizer(folder: Path, length: int | None = None) -> ChatTokenizer:
    """Read the tokenizer in a folder; rows have `length` tokens, 512 unless given.

    Raises FileNotFoundError when there is none, UserError when it is damaged or lacks a marker of Qwen3's.
    """
    file = find(folder, "Qwen3", "tokenizer.json")
    with damage_named(folder):
        tokenizer = Tokenizer.from_file(str(file))
    missing = [marker for marker in MARKERS if tokenizer.token_to_id(marker) is None]
    if missing:
        raise UserError(f"{folder} is no tokenizer of Qwen3: it lacks {', '.join(missing)}")
    tokenizer.no_truncation()  # transformers writes into the file how it was last used
    tokenizer.no_padding()
    return ChatTokenizer(tokenizer, length or LENGTH)
