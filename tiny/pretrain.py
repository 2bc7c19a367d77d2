"""Train a whole FLUX.1 or FLUX.2 klein at toy scale, from nothing: tokenizers, autoencoder, transformer.

    python tiny/pretrain.py --out tiny/weights --work /tmp/tiny

With `--family flux2` it is a FLUX.2 klein base; `tiny/families.py` has what differs. The pictures are of
synthetic people (`tiny/people.py`) or read from a folder (`--data`). The result has the names, the formats
and the folder layout of the real model, in 16 bit, so everything else reads it like that. A stage whose
result exists is skipped; one that was interrupted continues from its last save.
"""

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script from anywhere

from flux import layers
from flux.autoencoder import AutoEncoder
from flux.sampling import add_noise, denoise, draw_noise, to_pixels, velocity_target
from flux.texts import read_text
from flux.transformer import Prompt
from people.crops import ASPECT_RATIOS, fit_shape, to_tensor
from people.photos import PHOTO_SUFFIXES, Size, read_photo
from run.files import atomic, sort_header
from tiny.families import FAMILIES, Family
from tiny.people import STYLES, training_pictures

# --- Optimizer ---------------------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates for matrices and convolutions (Jordan et al. 2024, "Muon")."""

    def __init__(self, params: list[Tensor], lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalise(p.grad.lerp(buffer, group["momentum"]).flatten(1))
                scale = max(1, update.shape[0] / update.shape[1]) ** 0.5
                p.add_(update.view_as(p), alpha=-group["lr"] * scale)


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """Bring all singular values near 1 by a quintic Newton-Schulz iteration, in bfloat16."""
    x = matrix.bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return (x.mT if tall else x).type_as(matrix)


class Optimizer:
    """Muon on the matrices that `is_matrix` picks, AdamW on the rest; the rates fall linearly at the end."""

    def __init__(
        self,
        named: Iterable[tuple[str, Tensor]],
        is_matrix: Callable[[str, Tensor], bool],
        muon: float,
        adamw: float,
        steps: int,
    ):
        named = list(named)
        matrices = [p for name, p in named if is_matrix(name, p)]
        rest = [p for name, p in named if not is_matrix(name, p)]
        self.parts = [
            Muon(matrices, muon),
            torch.optim.AdamW(rest, adamw, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.rates, self.steps = [muon, adamw], steps

    def step(self, step: int) -> None:
        decay = min(1, step / 200) * min(1, 2 * (1 - step / self.steps))
        for part, rate in zip(self.parts, self.rates):
            part.param_groups[0]["lr"] = rate * decay
            part.step()
            part.zero_grad()

    def state_dict(self) -> list:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list) -> None:
        for part, state in zip(self.parts, states):
            part.load_state_dict(state)


def train(
    name: str,
    steps: int,
    loss: Callable[[int, torch.Generator], Tensor],
    optimizer: Optimizer,
    kept: dict[str, nn.Module],
    args: argparse.Namespace,
    saved: Callable[[int], None] | None = None,
) -> None:
    """Run `steps` updates; at intervals save `kept` (modules by name) to the work folder, and log a line.

    `loss` gets the step and a generator seeded by it, so that an interrupted run continues with new data.
    """
    file, start = args.work / f"{name}.pt", 0
    if file.exists():
        state = torch.load(file, weights_only=True)
        start = state["step"]
        optimizer.load_state_dict(state["optimizer"])
        for key, module in kept.items():
            module.load_state_dict(state[key])
    began, average = time.time(), None
    bar = tqdm(range(start, steps), name, initial=start, total=steps, mininterval=5)
    for step in bar:
        value = loss(step, torch.Generator().manual_seed(args.seed * 1_000_003 + step))
        value.backward()
        optimizer.step(step)
        if "ema" in kept:
            beta = min(0.999, (step + 1) / (step + 10))
            averaged, live = kept["ema"].state_dict().values(), kept["live"].state_dict().values()
            torch._foreach_lerp_(list(averaged), list(live), 1 - beta)
        average = value.item() if average is None else 0.99 * average + 0.01 * value.item()
        bar.set_postfix(loss=f"{average:.4f}", refresh=False)
        if (step + 1) % args.save_every == 0 or step + 1 == steps:
            states = {key: module.state_dict() for key, module in kept.items()}
            with atomic(file) as temporary:
                torch.save({"step": step + 1, "optimizer": optimizer.state_dict(), **states}, temporary)
            line = {
                "stage": name,
                "step": step + 1,
                "loss": round(average, 5),
                "seconds": round(time.time() - began),
            }
            with (args.out / "pretrain.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            if saved:
                saved(step + 1)


# --- Data --------------------------------------------------------------------------------------------------


def shapes(size: int, multiple: int) -> list[Size]:
    """The picture shapes to learn, the square first: appendix D's aspect ratios at an area of size ** 2."""
    ratios = sorted(ASPECT_RATIOS, key=lambda ratio: ratio[0] != ratio[1])
    return [fit_shape((100 * down, 100 * across), size, multiple) for across, down in ratios]


def read_pictures(
    shape: Size, count: int, seed: int, args: argparse.Namespace
) -> tuple[np.ndarray, list[str]]:
    """Return pictures (count, 3, *shape) uint8, mapped from the work folder, and their captions."""
    name = f"{shape[0]}x{shape[1]}"
    file, captions = args.work / f"pictures_{name}.npy", args.work / f"captions_{name}.json"
    if not captions.exists():
        pictures = np.lib.format.open_memmap(file, "w+", dtype=np.uint8, shape=(count, 3, *shape))
        folder, texts = sorted(args.data.glob("**/*.txt")) if args.data else None, []
        if folder == []:
            raise SystemExit(
                f"--data {args.data}: no captions; beside each picture lies a .txt of the same name"
            )
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the renderer's tensors are too small to share
        for at in tqdm(range(0, count, 512), f"pictures {name}", mininterval=5):
            generator = torch.Generator().manual_seed(seed + at)
            n = min(512, count - at)
            images, new = read_folder(folder, at, n, shape) if folder else generate(n, shape, generator)
            pictures[at : at + n] = ((images + 1) * 127.5).round().clamp(0, 255).byte().numpy()
            texts += [with_spare_word(text, generator) for text in new]
        torch.set_num_threads(threads)
        pictures.flush()
        with atomic(captions) as temporary:
            temporary.write_text(json.dumps(texts))
    return np.load(file, mmap_mode="r"), json.loads(captions.read_text())


def generate(n: int, shape: Size, generator: torch.Generator) -> tuple[Tensor, list[str]]:
    """Generate pictures of n people; other shapes than squares are cut out of squares, near the face."""
    height, width = shape
    side = max(shape)
    images, captions, boxes = training_pictures(n, generator, side)
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2 + side / 8 * (2 * torch.rand(n, 2, generator=generator) - 1)
    corner = (middle - torch.tensor([width, height]) / 2).long()
    corner = corner.clamp(min=torch.tensor(0), max=torch.tensor([side - width, side - height])).tolist()
    images = [image[:, y : y + height, x : x + width] for image, (x, y) in zip(images, corner)]
    return torch.stack(images), captions


def with_spare_word(caption: str, generator: torch.Generator) -> str:
    """Put a meaningless word into one caption of fourteen: unknown words then do little harm in a prompt."""

    def pick(low: int, high: int, *size: int) -> int | list[int]:
        return torch.randint(low, high, size, generator=generator).tolist()

    if torch.rand((), generator=generator) > 0.07:
        return caption
    letters, words = pick(97, 123, pick(2, 9)), caption.split()
    words.insert(pick(0, len(words) + 1), bytes(letters).decode())
    return " ".join(words)


def read_folder(captions: list[Path], at: int, count: int, shape: Size) -> tuple[Tensor, list[str]]:
    """Read `count` captioned pictures from position `at` on, starting again at the end; cut to the shape."""
    images, texts = [], []
    for k in range(at, at + count):
        text = captions[k % len(captions)]
        picture = next(f for f in sorted(text.parent.glob(f"{text.stem}.*")) if f.suffix in PHOTO_SUFFIXES)
        images.append(to_tensor(read_photo(picture), shape))
        texts.append(read_text(text).strip())
    return torch.stack(images), texts


def batch_of(pictures: np.ndarray, indices: Tensor) -> Tensor:
    """Pictures by index -> float32 (b, 3, h, w) in [-1, 1]."""
    return torch.from_numpy(pictures[indices.numpy()]).float() / 127.5 - 1


# --- Autoencoder -------------------------------------------------------------------------------------------


def train_autoencoder(pictures: np.ndarray, args: argparse.Namespace) -> AutoEncoder:
    """Train on crops of half the side, then on whole pictures; write `ae.safetensors` and its constants."""
    torch.manual_seed(args.seed)
    ae = AutoEncoder(args.family.ae)
    crop_steps, half = int(0.65 * args.ae_steps), args.size // 2

    def loss(step: int, generator: torch.Generator) -> Tensor:
        on_crops = step < crop_steps
        image = batch_of(pictures, torch.randint(len(pictures), (8 if on_crops else 4,), generator=generator))
        if on_crops:
            y, x = torch.randint(half + 1, (2,), generator=generator).tolist()
            image = image[:, :, y : y + half, x : x + half]
        with torch.autocast("cpu", torch.bfloat16):
            mean, logvar = ae.encoder(image).float().chunk(2, dim=1)
            z = mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=generator)
            decoded = ae.decoder(z).float()
        edges = sum(F.l1_loss(decoded.diff(dim=dim), image.diff(dim=dim)) for dim in (-1, -2))
        divergence = (mean.square() + logvar.exp() - 1 - logvar).mean() / 2
        return F.l1_loss(decoded, image) + edges + 1e-3 * divergence

    ends = ("conv_in", "conv_out", "quant_conv")
    is_matrix = lambda name, p: p.dim() == 4 and not any(end in name for end in ends)
    optimizer = Optimizer(ae.named_parameters(), is_matrix, muon=0.02, adamw=2e-3, steps=args.ae_steps)
    train("autoencoder", args.ae_steps, loss, optimizer, {"model": ae}, args)
    return ae.requires_grad_(False).eval()


@torch.no_grad()
def encode_pictures(ae: AutoEncoder, pictures: np.ndarray, args: argparse.Namespace) -> Tensor:
    """Return what becomes latents of pictures, unscaled (n, z, h, w) bfloat16; kept in the work folder."""
    file = args.work / f"latents_{pictures.shape[2]}x{pictures.shape[3]}.pt"
    if not file.exists():
        latents = []
        for at in tqdm(range(0, len(pictures), 64), file.stem, mininterval=5):
            image = batch_of(pictures, torch.arange(at, min(at + 64, len(pictures))))
            with torch.autocast("cpu", torch.bfloat16):
                mean, logvar = ae.encoder(image).float().chunk(2, dim=1)
            latents.append(args.family.draw(mean, logvar, torch.Generator().manual_seed(at)).bfloat16())
        with atomic(file) as temporary:
            torch.save(torch.cat(latents), temporary)
    return torch.load(file, weights_only=True)


def finish_autoencoder(ae: AutoEncoder, latents: Tensor, args: argparse.Namespace) -> AutoEncoder:
    """Measure the latents, that they may have unit variance; write file and constants, print the error."""
    finished, constants = args.family.finish(ae, latents[:10_000].float())
    write_json({**args.family.config, "sample_size": args.size, **constants}, args.out / "config.json")
    export(finished, args.out / "ae.safetensors")
    held_out = training_pictures(64, torch.Generator().manual_seed(args.seed), args.size)[0]
    with torch.no_grad():
        error = (finished.decode(finished.encode(held_out)) - held_out).square().mean(dim=(1, 2, 3))
    print(f"autoencoder: held-out PSNR {(10 * (4 / error).log10()).mean():.1f} dB; {constants}")
    return finished.requires_grad_(False).eval()


def export(module: nn.Module, path: Path, **metadata: str) -> None:
    """Write a module in float16, which keeps more of these small weights than bfloat16."""
    state = {name: tensor.cpu().contiguous() for name, tensor in module.state_dict().items()}
    tensors = {name: x.half() if x.is_floating_point() else x for name, x in state.items()}
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise ValueError(f"{path.name}: some weights are not finite in float16")
    path.parent.mkdir(exist_ok=True)
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", **metadata})
        sort_header(temporary)


def write_json(values: dict, path: Path) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n")


# --- Text encoders and transformer -------------------------------------------------------------------------


def build(args: argparse.Namespace) -> nn.ModuleDict:
    """Return fresh text encoders and transformer, in the parts that become files."""
    torch.manual_seed(args.seed)
    parts = nn.ModuleDict(args.family.build(args.out, args.hidden_size))
    # AdaLN, output (DiT) and what the many layers of Qwen3 add start at zero, embeddings small.
    zero = ("_mod.lin", "modulation", "final_layer.linear", ".o_proj", ".down_proj")
    for name, p in parts.named_parameters():
        if any(key in name for key in zero):
            nn.init.zeros_(p)
        elif "embed" in name or "shared" in name:
            nn.init.normal_(p, std=0.1 if "embedding" in name else 0.3)
    return parts


def cpu_attention(q: Tensor, k: Tensor, v: Tensor, pe: Tensor) -> Tensor:
    """`flux.layers.attention` for training on a CPU in bfloat16.

    Written out with two plain products because the CPU's fused attention takes half of a bfloat16 step for
    its backward.
    """
    with torch.autocast("cpu", enabled=False):
        turned_q, turned_k, values = (
            x.bfloat16().transpose(1, 2) for x in (layers.rotate(q, pe), layers.rotate(k, pe), v)
        )
        scores = (turned_q @ turned_k.mT).float() / math.sqrt(q.shape[-1])
        x = scores.softmax(dim=-1).bfloat16() @ values
    return rearrange(x.to(v.dtype), "b h l d -> b l (h d)")


def velocity(
    parts: nn.ModuleDict, x: Tensor, t: Tensor, text: tuple[Tensor, ...], guidance: Tensor, family: Family
) -> Tensor:
    """Run text encoders and transformer: x_t (b, c, h, w), a family's tokens -> velocity (b, c, h, w)."""
    with torch.autocast("cpu", torch.bfloat16):
        return parts["flux"].velocity(x, t, guidance, **family.encode(parts, text)).float()


def train_transformer(
    latents: list[Tensor], captions: list[list[str]], ae: AutoEncoder, args: argparse.Namespace
) -> nn.ModuleDict:
    """Train text encoders and transformer on flow matching, then teach the guidance input; return the EMA.

    latents and captions: one entry per shape. FLUX.1-dev is distilled: its guidance input does in one pass
    what guided sampling does in two. So ours: first the input is a random number without meaning, then the
    target is the frozen model's velocity, led away from that of an earlier, weaker self that was not told the
    prompt (Ho and Salimans 2022; Karras et al. 2024, with a bad version of itself).
    In a sheet of 16 pictures the weaker self mended faces that guidance by the model itself left broken.
    A model without that input is done before.
    """
    family = args.family
    texts = {text: i for i, text in enumerate(dict.fromkeys(text for some in captions for text in some))}
    text_of = [torch.tensor([texts[text] for text in some]) for some in captions]
    tokens, empty = family.tokens(args.out, list(texts)), family.tokens(args.out, [""])
    # People are learned from photos, so these come three times as often as pictures of another style.
    styles = [phrase for style, phrase in STYLES.items() if style != "photo"]
    weights = [
        torch.tensor([1.0 if any(s in text for s in styles) else 3.0 for text in some]) for some in captions
    ]
    share = torch.stack([some.sum() for some in weights])
    parts = build(args)
    ema = copy.deepcopy(parts).requires_grad_(False)
    layers.attention = cpu_attention

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...], Tensor]:
        shape = int(torch.multinomial(share, 1, generator=generator))
        chosen = torch.multinomial(weights[shape], args.batch, replacement=True, generator=generator)
        x = family.latents(ae, latents[shape][chosen].float())
        noise = torch.randn(x.shape, generator=generator)
        t = torch.randn(args.batch, generator=generator).sigmoid()
        untold = torch.rand(args.batch, 1, generator=generator) < 0.07
        told = text_of[shape][chosen]
        text = tuple(torch.where(untold, none, some[told]) for none, some in zip(empty, tokens))
        return x, noise, t, text, 1 + 5 * torch.rand(args.batch, generator=generator)

    def flow_loss(step: int, generator: torch.Generator) -> Tensor:
        x, noise, t, text, guidance = batch(generator)
        predicted = velocity(parts, add_noise(x, noise, t), t, text, guidance, family)
        return F.mse_loss(predicted, velocity_target(x, noise))

    def guidance_loss(step: int, generator: torch.Generator) -> Tensor:
        x, noise, t, text, guidance = batch(generator)
        x = add_noise(x, noise, t)
        with torch.no_grad():
            told = velocity(teacher, x, t, text, guidance, family)
            nothing = tuple(none.expand(len(x), -1) for none in empty)
            untold = velocity(weak, x, t, nothing, guidance, family)
        target = untold + guidance.view(-1, 1, 1, 1) * (told - untold)
        return F.mse_loss(velocity(parts, x, t, text, guidance, family), target)

    def run(name: str, steps: int, loss: Callable, muon: float) -> None:
        is_matrix = lambda name, p: "_blocks" in name and p.dim() == 2 and "mod" not in name
        optimizer = Optimizer(parts.named_parameters(), is_matrix, muon=muon, adamw=muon / 6, steps=steps)

        def saved(step: int) -> None:
            sample_sheet(ema, ae, args).save(args.work / f"{name}.png")
            if guided and not weak_file.exists() and step >= 3 / 8 * steps:
                with atomic(weak_file) as temporary:
                    torch.save(ema.state_dict(), temporary)

        train(name, steps, loss, optimizer, {"live": parts, "ema": ema}, args, saved)

    weak_file, guided = args.work / "weak.pt", parts["flux"].sizes.guidance
    teacher, weak = copy.deepcopy(ema), copy.deepcopy(ema)
    if args.compile:
        for model in (parts, teacher, weak):
            for block in [*model["flux"].double_blocks, *model["flux"].single_blocks]:
                block.compile(dynamic=False)
    run("transformer", args.steps, flow_loss, muon=0.012)
    if not guided:
        return ema
    parts.load_state_dict(ema.state_dict())
    teacher.load_state_dict(ema.state_dict())
    weak.load_state_dict(torch.load(weak_file, weights_only=True))
    run("guidance", args.guidance_steps, guidance_loss, muon=0.003)
    return ema


PROMPTS = (
    "a photo of a woman at the beach wearing a red shirt",
    "a photo of a man in the city in a blue shirt",
    "a painting of a woman",
    "a sketch of a man wearing a green shirt",
    "a neon picture of a woman at night",
    "a photo of a man in the forest wearing a yellow shirt",
    "a photo of a woman",
    "a man",
)


def sample_sheet(
    parts: nn.ModuleDict, ae: AutoEncoder, args: argparse.Namespace, seeds: int = 12
) -> Image.Image:
    """Sample a row per prompt, with the same seeds in every row."""
    base = args.family.base
    encoders = {name: parts[name] for name in base.encoders}
    conditioner = base.conditioner(**encoders, tokenizers=args.family.tokenizers(args.out))
    side = args.size // ae.sizes.reduction
    noise = draw_noise(list(range(seeds)), ae.sizes.latent_channels, side, side)
    settings = base.kind.SAMPLER | {"steps": 12}
    rows = []

    def encoded(prompt: str) -> Prompt:
        return {name: x.expand(seeds, *x.shape[1:]) for name, x in conditioner.encode([prompt]).items()}

    for prompt in PROMPTS:
        with torch.no_grad():
            latents = denoise(parts["flux"], noise, encoded(prompt), negative=encoded(""), **settings)
            rows.append(rearrange(to_pixels(ae.decode(latents)), "n h w c -> h (n w) c"))
    sheet = Image.fromarray(torch.cat(rows).numpy())
    return sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.BICUBIC)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--family", choices=FAMILIES, default="flux1", help="what kind of model to train")
    places = " or ".join(family.folder for family in FAMILIES.values())
    parser.add_argument("--out", type=Path, help=f"model folder to write; default: {places}, by the family")
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for pictures, latents and training states (2 GB)"
    )
    parser.add_argument(
        "--data", type=Path, help="pictures with captions (.txt) to learn from instead of synthetic people"
    )
    parser.add_argument("--pictures", type=int, default=120_000, help="size of the training set")
    parser.add_argument("--size", type=int, default=64, help="side of a picture in pixels")
    parser.add_argument(
        "--hidden-size", type=int, default=160, help="width of the transformer, a multiple of 32"
    )
    parser.add_argument("--ae-steps", type=int, default=10_000, help="updates of the autoencoder")
    parser.add_argument("--steps", type=int, default=8000, help="updates of text encoders and transformer")
    parser.add_argument(
        "--guidance-steps", type=int, default=700, help="updates that teach FLUX.1's guidance input"
    )
    parser.add_argument("--batch", type=int, default=64, help="pictures in an update of the transformer")
    parser.add_argument("--save-every", type=int, default=500, help="updates between saved states")
    parser.add_argument(
        "--compile", action="store_true", help="compile the blocks: 1.5 times faster, needs a C++ compiler"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    family = args.family = FAMILIES[args.family]
    args.out = args.out or Path(family.folder)
    for folder in (args.out, args.work):
        folder.mkdir(parents=True, exist_ok=True)

    # The square has three fifths of the pictures, the other shapes share the rest.
    data = []
    for k, shape in enumerate(shapes(args.size, family.ae.token_pixels)):
        count = args.pictures * 3 // 5 if k == 0 else args.pictures // 10
        data.append(read_pictures(shape, count, seed=args.seed * 1_000_003 + (k + 1) * 10_000_000, args=args))
    pictures, captions = zip(*data)
    if not (family.base.folders(args.out)[-1] / "tokenizer_config.json").exists():
        family.make_tokenizers(captions[0], args.out)
    ae = train_autoencoder(pictures[0], args)
    latents = [encode_pictures(ae, some, args) for some in pictures]
    ae = finish_autoencoder(ae, latents[0], args)
    parts = train_transformer(latents, captions, ae, args)

    export(parts["flux"], args.out / family.file)
    for part in family.base.encoders:
        folder = args.out / family.base.places[part][0]
        export(parts[part], folder / "model.safetensors")
        if part in family.encoder_configs:
            write_json(family.encoder_configs[part], folder / "config.json")
    settings = {key: value for key, value in vars(args).items() if not isinstance(value, (Path, Family))}
    write_json(settings, args.out / "pretrain.json")
    with atomic(args.out / "samples.png") as temporary:
        sample_sheet(parts, ae, args).save(temporary)


if __name__ == "__main__":
    main()
