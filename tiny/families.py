"""The families of toy models that `tiny/pretrain.py` trains: what differs between FLUX.1 and FLUX.2 klein."""

import json
import re
from dataclasses import replace
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Generator, Tensor, nn

from flux.autoencoder import AutoEncoder, AutoEncoderSizes
from flux.bases import FLUX1, FLUX2, Base
from flux.chat import END, MARKERS, START, ChatTokenizer
from flux.clip import CLIPSizes, CLIPText
from flux.conditioner import Tokenizers
from flux.flux2 import Flux2, Flux2Sizes
from flux.model import Flux, FluxSizes
from flux.qwen3 import LAYERS, Qwen3, Qwen3Sizes
from flux.t5 import T5, T5Sizes
from flux.transformer import Prompt
from tiny.people import SCENES, SHIRTS, STYLES

THETA = 100  # the usual 10,000 leaves three useful frequencies on an 8x8 grid
HEAD_DIM = 32  # of the transformer


class Family:
    """A toy model's parts, which are called as in `flux.bases.Base`, the transformer `flux`."""

    base: Base
    folder: str  # where it is written by default
    file: str  # of the transformer
    ae: AutoEncoderSizes
    config: dict  # what the transformer's header does not tell
    encoder_configs: dict[str, dict]  # and those of the text encoders

    def make_tokenizers(self, captions: list[str], out: Path) -> None:
        """Learn small vocabularies and write them into a model's folder, a `tokenizer_config.json` last."""
        raise NotImplementedError

    def build(self, out: Path, hidden_size: int) -> dict[str, nn.Module]:
        """Return text encoders and transformer; their vocabularies are in the model's folder."""
        raise NotImplementedError

    def tokenizers(self, out: Path) -> Tokenizers | ChatTokenizer:
        return self.base.load_tokenizers(self.base.folders(out))

    def tokens(self, out: Path, texts: list[str]) -> tuple[Tensor, ...]:
        """Return what `encode` takes, a row per text."""
        raise NotImplementedError

    def encode(self, parts: nn.ModuleDict, tokens: tuple[Tensor, ...]) -> Prompt:
        """Run the text encoders."""
        raise NotImplementedError

    def draw(self, mean: Tensor, logvar: Tensor, generator: Generator) -> Tensor:
        """Return what becomes latents, of the encoder's output: (n, z, h, w), unscaled."""
        raise NotImplementedError

    def finish(self, ae: AutoEncoder, z: Tensor) -> tuple[AutoEncoder, dict]:
        """Return an autoencoder whose latents have unit variance where z is `draw`'s, and its constants."""
        raise NotImplementedError

    def latents(self, ae: AutoEncoder, z: Tensor) -> Tensor:
        """Scale what `draw` gave."""
        raise NotImplementedError


class ToyFlux1(Family):
    base, folder, file = FLUX1, "tiny/weights", "flux1-tiny.safetensors"
    ae = AutoEncoderSizes(ch=64, ch_mult=(1, 1, 1), encoder_blocks=0, decoder_blocks=1, z_channels=8)
    config = {"theta": THETA}
    encoder_configs = {"clip": {"num_attention_heads": 4}}
    txt_length, clip_length, vocabulary = 16, 24, 320

    def make_tokenizers(self, captions: list[str], out: Path) -> None:
        """Write them in the formats of CLIP (BPE) and T5 (SentencePiece)."""
        words = vocabulary_of(captions)
        alphabet = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'\"()-"

        (out / "tokenizer").mkdir(parents=True, exist_ok=True)
        bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        trainer = trainers.BpeTrainer(
            vocab_size=1024,
            end_of_word_suffix="</w>",
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator([*words, *alphabet.lower()], trainer)
        found = json.loads(bpe.to_str())["model"]
        # Every byte also as the end of a word, and the special tokens last: CLIP looks for the largest token.
        vocabulary = list(found["vocab"])
        ends = [c + "</w>" for c in pre_tokenizers.ByteLevel.alphabet()]
        vocabulary += [end for end in ends if end not in found["vocab"]]
        vocabulary += ["<|startoftext|>", "<|endoftext|>"]
        numbered = {token: i for i, token in enumerate(vocabulary)}
        (out / "tokenizer" / "vocab.json").write_text(json.dumps(numbered))
        merges = [" ".join(pair) for pair in found["merges"]]
        (out / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
        write_length(out / "tokenizer", self.clip_length)

        (out / "tokenizer_2").mkdir(parents=True, exist_ok=True)
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(words),
            model_prefix=str(out / "tokenizer_2" / "spiece"),
            vocab_size=self.vocabulary,
            hard_vocab_limit=False,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            required_chars=alphabet,
            minloglevel=2,
        )
        (out / "tokenizer_2" / "spiece.vocab").unlink()
        write_length(out / "tokenizer_2", self.txt_length)

    def build(self, out: Path, hidden_size: int) -> dict[str, nn.Module]:
        clip = self.tokenizers(out).clip
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer_2" / "spiece.model"))
        heads = self.encoder_configs["clip"]["num_attention_heads"]
        return {
            "t5": T5(T5Sizes(len(pieces), hidden_size=64, head_dim=16, num_heads=4, mlp_size=128, depth=2)),
            "clip": CLIPText(
                CLIPSizes(clip.pad + 1, clip.length, 64, num_heads=heads, mlp_size=256, depth=2)
            ),
            "flux": Flux(
                FluxSizes(
                    in_channels=4 * self.ae.z_channels,
                    out_channels=4 * self.ae.z_channels,
                    pooled_size=64,
                    txt_size=64,
                    hidden_size=hidden_size,
                    mlp_size=4 * hidden_size,
                    num_heads=hidden_size // HEAD_DIM,
                    depth=2,
                    depth_single=4,
                    guidance=True,
                    axes=(4, 14, 14),
                    theta=THETA,
                )
            ),
        }

    def tokens(self, out: Path, texts: list[str]) -> tuple[Tensor, ...]:
        tokenizers = self.tokenizers(out)
        return tokenizers.t5(texts), tokenizers.clip(texts)

    def encode(self, parts: nn.ModuleDict, tokens: tuple[Tensor, ...]) -> Prompt:
        t5_tokens, clip_tokens = tokens
        return {"txt": parts["t5"](t5_tokens), "pooled": parts["clip"](clip_tokens)}

    def draw(self, mean: Tensor, logvar: Tensor, generator: Generator) -> Tensor:
        """Return a sample of the posterior."""
        return mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=generator)

    def finish(self, ae: AutoEncoder, z: Tensor) -> tuple[AutoEncoder, dict]:
        """Measure scale and shift."""
        scale, shift = round(1 / z.std().item(), 4), round(z.mean().item(), 4)
        finished = AutoEncoder(replace(ae.sizes, scale_factor=scale, shift_factor=shift))
        finished.load_state_dict(ae.state_dict())
        return finished, {"scaling_factor": scale, "shift_factor": shift}  # diffusers' spelling

    def latents(self, ae: AutoEncoder, z: Tensor) -> Tensor:
        return ae.sizes.scale_factor * (z - ae.sizes.shift_factor)


class ToyFlux2(Family):
    """Like klein base it has no guidance input, and is sampled with classifier-free guidance instead."""

    base, folder, file = FLUX2, "tiny/klein", "flux-2-klein-base-tiny.safetensors"
    ae = replace(ToyFlux1.ae, packed=True)
    config = {"axes_dims_rope": [HEAD_DIM // 4] * 4, "rope_theta": THETA}
    encoder_configs = {"qwen3": {"rope_theta": THETA}}
    txt_length, vocabulary = 32, 1024  # the chat form takes 12 tokens of each prompt
    # Where Qwen's byte-level BPE splits a text first.
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )

    def make_tokenizers(self, captions: list[str], out: Path) -> None:
        """Write it in the format of Qwen3, byte-level BPE, with those of its markers that the form needs."""
        (out / "tokenizer").mkdir(parents=True, exist_ok=True)
        bpe = Tokenizer(models.BPE())
        bpe.normalizer = normalizers.NFC()
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(self.words), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocabulary,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        marker = "|".join(map(re.escape, MARKERS))
        forms = (re.split(marker, START + text + END) for text in vocabulary_of(captions))
        bpe.train_from_iterator((part for form in forms for part in form), trainer)
        bpe.add_tokens([AddedToken(x, normalized=False, special="|" in x) for x in MARKERS])  # not <think>
        bpe.save(str(out / "tokenizer" / "tokenizer.json"))
        write_length(out / "tokenizer", self.txt_length)

    def build(self, out: Path, hidden_size: int) -> dict[str, nn.Module]:
        qwen3 = Qwen3Sizes(
            vocab_size=self.tokenizers(out).tokenizer.get_vocab_size(),
            hidden_size=64,
            head_dim=16,
            num_heads=4,
            num_kv_heads=2,
            mlp_size=128,
            theta=self.encoder_configs["qwen3"]["rope_theta"],
            eps=1e-6,
        )
        transformer = Flux2Sizes(
            in_channels=self.ae.latent_channels,
            out_channels=self.ae.latent_channels,
            txt_size=len(LAYERS) * qwen3.hidden_size,
            hidden_size=hidden_size,
            mlp_size=3 * hidden_size,
            num_heads=hidden_size // HEAD_DIM,
            depth=2,
            depth_single=4,
            guidance=False,
            axes=tuple(self.config["axes_dims_rope"]),
            theta=self.config["rope_theta"],
        )
        return {"qwen3": Qwen3(qwen3), "flux": Flux2(transformer)}

    def tokens(self, out: Path, texts: list[str]) -> tuple[Tensor, ...]:
        return self.tokenizers(out)(texts)

    def encode(self, parts: nn.ModuleDict, tokens: tuple[Tensor, ...]) -> Prompt:
        return {"txt": parts["qwen3"](*tokens)}

    def draw(self, mean: Tensor, logvar: Tensor, generator: Generator) -> Tensor:
        """Return the posterior's mean."""
        return mean

    def finish(self, ae: AutoEncoder, z: Tensor) -> tuple[AutoEncoder, dict]:
        """Measure mean and variance of every channel, which are in the autoencoder's file."""
        packed = F.pixel_unshuffle(z, 2)
        # Rounded as in the file, so that the transformer is trained on the latents that it will be given.
        ae.bn.running_mean.copy_(packed.mean(dim=(0, 2, 3)).half())
        ae.bn.running_var.copy_(packed.var(dim=(0, 2, 3)).half())
        return ae, {}

    def latents(self, ae: AutoEncoder, z: Tensor) -> Tensor:
        return ae.bn(z)


FAMILIES = {"flux1": ToyFlux1(), "flux2": ToyFlux2()}


def vocabulary_of(captions: list[str]) -> list[str]:
    """Return the texts from which vocabularies are learned."""
    return [*captions[:20_000], *SCENES.values(), *SHIRTS, *STYLES.values()]


def write_length(folder: Path, length: int) -> None:
    """Write the tokens per prompt into a tokenizer's folder."""
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": length}))
