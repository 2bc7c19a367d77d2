"""Is what runs on a device right? Small models against the CPU under every plan; the scripts end to end."""

import contextlib
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lora.__main__ as lora_command
import personalize
import sample
import train_meta
from flux import load_autoencoder, load_conditioner
from flux.errors import first_line
from flux.finding import find_files
from flux.memory import recomputed_blocks
from flux.model import Flux, FluxSizes
from flux.sampling import flow_loss
from metalora import inject, use_slots
from run.checkpoints import Checkpoints
from run.costs import Plan
from run.models import SHIPPED
from tiny.people import write_people

# Small, with heads as wide as FLUX.1-dev's, so that the same kernels of attention are chosen.
SIZES = FluxSizes(16, 16, 24, 40, 256, 512, 2, 1, 2, True, (16, 56, 56), 10_000)
BLOCKS = SIZES.depth + SIZES.depth_single
PLANS = {
    "nothing recomputed": Plan(),
    "all recomputed": Plan("all"),
    "attention kept": Plan("attention"),
    "two recomputed": Plan(2),
    "streamed": Plan("all", BLOCKS),
    "streamed, attention kept": Plan("attention", BLOCKS),
    "two streamed": Plan("none", 2),
    "8 bits": Plan("all", fp8=True),
    "8 bits, streamed": Plan("all", BLOCKS, fp8=True),
}
COMPILED = {
    "compiled": Plan(compiled=True),
    "compiled, all recomputed": Plan("all", compiled=True),
    "compiled, 8 bits": Plan("all", fp8=True, compiled=True),
}
EXACT = 1e-4  # float32: the largest distance of an output or gradient, relative to its norm
NEAR = 1.25  # bfloat16: the mean distance to the CPU's float32, relative to that of the CPU's bfloat16
# The negative controls multiply one weight matrix by these.
CONTROLS = {torch.float32: 1.01, torch.bfloat16: 1.5}


class AttentionKernels(TorchDispatchMode):
    """Counts the kernels of attention that run."""

    def __init__(self):
        super().__init__()
        self.ran = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if "scaled_dot_product" in op.name() or "softmax" in op.name():  # the latter: not fused
            self.ran[op.name().removeprefix("aten::")] += 1
        return op(*args, **kwargs or {})


def training_step(
    device: torch.device, dtype: torch.dtype, plan: Plan, factor: float = 1.0
) -> tuple[dict[str, Tensor], Counter]:
    """Return a small model's output without gradients, its loss and the gradients of all factors, in float32.

    The model has adapters of three identities, of which the batch shows two. factor: what one weight is
    multiplied by. Also returns the kernels of attention that the training step ran.
    """
    torch.manual_seed(0)
    model = Flux(SIZES).to(dtype)
    model.single_blocks[0].linear2.weight.data.mul_(factor)
    inject(model, r1=6, r2=2, slots=3)
    for parameter in model.factors.parameters():
        parameter.data.copy_(torch.randn(parameter.shape) / 8)
    latents, noise = torch.randn(2, 4, 12, 20), torch.randn(2, 4, 12, 20)
    txt, pooled = torch.randn(2, 9, SIZES.txt_size).to(dtype), torch.randn(2, SIZES.pooled_size).to(dtype)
    given = {
        "latents": latents,
        "noise": noise,
        "t": torch.tensor([0.7373, 0.11]),
        "txt": txt,
        "pooled": pooled,
    }
    given = {name: part.to(device) for name, part in given.items()}
    with patch("flux.streaming.Stream.COPY", True):
        plan.apply(model, device)
    use_slots(model, torch.tensor([2, 0], device=device))
    with torch.inference_mode():
        result = {"output": flow_loss(model, **given, guidance=3.5, reduction="none")}
    kernels = AttentionKernels()
    with contextlib.nullcontext() if plan.compiled else kernels:  # compiled code runs within no mode
        loss = flow_loss(model, **given, guidance=3.5)
        loss.backward()
    result["loss"] = loss.detach()[None]
    result |= {name: parameter.grad for name, parameter in model.factors.named_parameters()}
    return {name: tensor.float().cpu() for name, tensor in result.items()}, kernels.ran


def distances(given: dict[str, Tensor], expected: dict[str, Tensor]) -> Tensor:
    """Return the distance of each tensor to the expected one, relative to that one's norm: (n,)."""
    assert given.keys() == expected.keys()
    pairs = ((given[name], tensor) for name, tensor in expected.items())
    return torch.stack([(a - b).norm() / b.norm().clamp(min=1e-12) for a, b in pairs])


def compare_plans(device: torch.device, plans: dict[str, Plan]) -> dict:
    """Hold each plan on a device against none on the CPU, or 8 bits alone; EXACT and NEAR are the limits.

    "wrong" in the result lists what is beyond them, a negative control that is not, and plans under which
    attention ran more or less often than it should.
    """
    cpu, wrong, names = torch.device("cpu"), [], Counter()
    expected = {}
    for fp8 in {plan.fp8 for plan in plans.values()}:
        exact, half = (training_step(cpu, dtype, Plan(fp8=fp8))[0] for dtype in CONTROLS)
        expected[fp8] = exact, distances(half, exact).mean().item()

    def measure(dtype: torch.dtype, plan: Plan, factor: float = 1.0) -> tuple[float, bool]:
        """Return how far off a plan is, and whether that is near enough."""
        given, ran = training_step(device, dtype, plan, factor)
        names.update(ran)
        exact, half = expected[plan.fp8]
        forward = sum(n for name, n in ran.items() if "backward" not in name)
        again = 0 if plan.checkpoint == "attention" else recomputed_blocks(plan.checkpoint, BLOCKS)
        if not plan.compiled and forward != BLOCKS + again:
            raise AssertionError(f"attention ran {forward} times, not {BLOCKS} + {again}: {dict(ran)}")
        off = distances(given, exact)
        off, most = (off.max().item(), EXACT) if dtype == torch.float32 else (off.mean().item() / half, NEAR)
        return off, off <= most

    found = {"float32": {}, "bfloat16": {}}
    for dtype, factor in CONTROLS.items():
        kind = str(dtype).removeprefix("torch.")
        for name, plan in plans.items():
            try:
                found[kind][name], right = measure(dtype, plan)
                wrong += [] if right else [f"{kind}, {name}: {found[kind][name]:.2g}"]
            except Exception as error:  # the other plans are still to be seen
                wrong.append(f"{kind}, {name}: {type(error).__name__}: {first_line(error)[:200]}")
        found[kind]["negative control"], right = measure(dtype, next(iter(plans.values())), factor)
        wrong += [f"{kind}: a changed weight goes unnoticed"] if right else []
    return {"wrong": wrong, **found, "attention": sorted(names)}


def compare_encoders(device: torch.device) -> dict:
    """Hold the toy model's autoencoder and text encoders on a device against the CPU, in float32."""

    def outputs(device: torch.device, factor: float = 1.0) -> dict[str, Tensor]:
        autoencoder = load_autoencoder(SHIPPED["tiny"] / "ae.safetensors", device, torch.float32)
        conditioner = load_conditioner(find_files(str(SHIPPED["tiny"])), device, torch.float32)
        autoencoder.decoder.conv_in.weight.data.mul_(factor)
        image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(device) * 2 - 1
        with torch.no_grad():
            moments = autoencoder.encode_moments(image)
            found = dict(zip(("mean", "std"), moments), picture=autoencoder.decode(moments[0]))
            found |= conditioner.encode(["a photo of a woman at the beach"])
        return {name: tensor.float().cpu() for name, tensor in found.items()}

    expected = outputs(torch.device("cpu"))
    off, control = (distances(outputs(device, x), expected).max().item() for x in (1.0, 1.01))
    wrong = [] if off <= EXACT else [f"{off:.1e}"]  # also if it is not a number
    wrong += ["a changed weight goes unnoticed"] if control <= EXACT else []
    return {"wrong": wrong, "float32": off, "negative control": control}


# --- The scripts -------------------------------------------------------------------------------------------


def run_scripts(device: torch.device) -> dict:
    """Run the scripts on the toy model: do they work, and does a stopped run go on as if it had not stopped?

    Pictures are made with the LoRA merged, and the same ones with it apart, with streamed weights, from a
    file into which it was merged, and on the CPU.
    """
    found, wrong = {}, []
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_people(folder / "ids", people=4, photos=4, seed=0)
        photo = next((folder / "ids").glob("*/*.png"))

        def call(main: Callable, *words: object, on: object = device, model: object = "tiny") -> None:
            main([*map(str, words), "--model", str(model), "--device", str(on)])

        def meta_train(out: str, *ends: int) -> dict[str, Tensor]:
            """Train in as many runs as there are ends; return all that the last one left."""
            for end in ends:
                words = ["--data", folder / "ids", "--out", folder / out, "--r1", 8, "--bucket-ids", 2]
                words += ["--uses-per-image", 2, "--batch", 2, "--lr", 4e-3, "--save-every", 5]
                call(train_meta.main, *words, "--sample-every", 0, "--keep-buckets", "--steps", end)
            state = tree_leaves(Checkpoints(folder / out / "checkpoints").load())
            tensors = {f"state {k}": x for k, x in enumerate(state) if isinstance(x, Tensor)}
            return tensors | load_file(folder / out / "meta.safetensors")

        def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
            """Return the largest difference of two runs; exactly 0 if they are the same bit by bit."""
            assert a.keys() == b.keys()
            return torch.stack([(a[name].double() - b[name].double()).abs().max() for name in a]).max().item()

        whole = meta_train("whole", 12)
        found["the same run again, off by"] = difference(meta_train("again", 12), whole)
        found["a resumed run, off by"] = difference(meta_train("resumed", 7, 12), whole)
        # A resumed run has to be the same bit by bit only if all operations are deterministic.
        try:
            torch.use_deterministic_algorithms(True)
            off = difference(meta_train("deterministic, resumed", 7, 12), meta_train("deterministic", 12))
            found["deterministic: a resumed run, off by"] = off
            wrong += [f"deterministic: a resumed run is off by {off:.1e}"] if off else []
        except RuntimeError as error:  # an operation has no deterministic form
            wrong.append(f"deterministic: {first_line(error)[:200]}")
        finally:
            torch.use_deterministic_algorithms(False)

        fittings = {"plain": [], "8 bits": ["--base-dtype", "fp8"], "kept": ["--checkpoint", "attention"]}
        fittings |= {"streamed": ["--stream", 4, "--checkpoint", "all"]}
        for name, words in fittings.items():
            words = ["--no-augment", "--steps", 3, "--samples", int(name == "plain"), "--lr", 1e-2, *words]
            words += ["--meta", folder / "whole" / "meta.safetensors"]
            call(personalize.main, photo, *words, "--out", folder / f"{name}.safetensors")

        adapter = folder / "plain.safetensors"
        merged = shutil.copytree(SHIPPED["tiny"], folder / "merged")
        checkpoint = merged / "flux1-tiny.safetensors"
        checkpoint.unlink()
        words = ["merge", SHIPPED["tiny"] / checkpoint.name, checkpoint, "--lora", adapter]
        lora_command.main(list(map(str, words)))

        def picture(name: str, *words: object, **where: object) -> Tensor:
            words = ["--prompt", "a photo of a woman", "--steps", 4, "--dtype", "fp32", *words]
            call(sample.main, *words, "--out", folder / name, **where)
            (file,) = (folder / name).glob("00_*.png")
            return torch.from_numpy(np.asarray(Image.open(file)).astype("int16"))

        first = picture("first", "--lora", adapter)
        others = {
            "apart": picture("apart", "--lora", adapter, "--no-merge"),
            "streamed": picture("streamed", "--lora", adapter, "--stream", 4),
            "of the merged file": picture("merged pictures", model=merged),
            "of the CPU": picture("cpu", "--lora", adapter, on="cpu"),
            "without the LoRA (control)": picture("control"),
        }
        for name, other in others.items():
            off = (first - other).abs().max().item()
            found[f"picture {name}, off by levels"] = off
            if (off > 4) != ("control" in name):  # of 255, for rounding and the merged file's bfloat16
                wrong.append(f"picture {name}: {off} levels off")
    return {"wrong": wrong, **found}
