"""A small tokenizer of Qwen3's kind."""

import json
from pathlib import Path

from compare import DATA
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

# Qwen3's, in its order. OTHERS are no special tokens, but single tokens all the same.
SPECIAL = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>"),
    *("<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
]
OTHERS = [
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
]
# Where Qwen's byte-level BPE splits a text first.
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
WORDS += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def write_tokenizer(folder: Path, text: str) -> int:
    """Write a tokenizer with Qwen3's rules and markers, and up to 400 words of a text; return its size."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=656, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text, "user\n\n\n"], trainer)
    tokenizer.add_special_tokens([AddedToken(x, normalized=False, special=True) for x in SPECIAL])
    tokenizer.add_tokens([AddedToken(x, normalized=False, special=False) for x in OTHERS])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(x)): {"content": x, "normalized": False, "special": x in SPECIAL}
            for x in SPECIAL + OTHERS
        },
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": (DATA / "qwen3_chat_template.jinja").read_text(),
        "model_max_length": 131072,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer.get_vocab_size()
