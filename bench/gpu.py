"""What a GPU makes of this project: are the numbers right, how fast is it, how much memory does it take?

    python bench/gpu.py                               # eight minutes on a card of 80 GB; writes out/gpu.json
    python bench/gpu.py --only stage2 budget          # some groups of cases
    python bench/gpu.py --smoke --out out/smoke.json  # all but what compiles, at toy sizes on a CPU

FLUX.1-dev at full size, with random weights that are made on the card; no network is needed. Steps are those
of the scripts, with drawing the batch and the optimizer. Cases run in the order of their worth, each on its
own: what fails is noted, and the next one runs; what may end too late is skipped. The file is written anew
after each case.
"""

import argparse
import contextlib
import io
import json
import os
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script from anywhere

import personalize
from bench import parity
from bench.ceilings import ceilings, kernels
from bench.device import describe, limited, made_on, peaks, reset_peaks, synchronize, timed
from bench.flops import centred
from bench.gpu_tables import table
from bench.plans import CARDS
from flux import T5, AutoEncoder, Flux, load_tokenizers
from flux.autoencoder import AutoEncoderSizes
from flux.clip import CLIPSizes, CLIPText
from flux.conditioner import Conditioner
from flux.errors import UserError, first_line
from flux.memory import release
from flux.model import FluxSizes
from flux.sampling import denoise
from flux.t5 import T5Sizes
from metalora import Prior, export_lora, inject, load_meta, save_meta
from people.dataset import Batch
from people.encoding import encode_prompt, make_batch
from personalize import EncodedCrop, Personalization
from run.command import run_script
from run.costs import FLUX_DEV, GIB, Plan, Workload, estimate
from run.files import atomic, check_writable
from run.models import SHIPPED
from run.plan import RESERVE, MemoryOptions, make_plan
from run.settings import Training
from train_meta import MetaLearner, update

BUDGETS = {"80 GB": 79.1, **CARDS}  # GiB that such cards report
WARM = 2  # steps before those that are timed


@dataclass(frozen=True)
class Scale:
    """How large everything is: as published, or small enough for a CPU."""

    flux: FluxSizes = FLUX_DEV
    autoencoder: AutoEncoderSizes = AutoEncoderSizes()
    t5: T5Sizes = T5Sizes(32128, 4096, 64, 64, 10240, 24)
    clip: CLIPSizes = CLIPSizes(49408, 77, 768, 12, 3072, 12)
    t5_length: int = 512
    r1: int = 128
    identities: int = 50
    shrink: int = 1  # the sides of pictures are divided by it
    training: int = WARM + 6  # steps of a training that is timed
    personalization: int = 375  # steps of a whole one
    sampling: int = 30  # steps of a picture


TOY = Scale(
    flux=replace(parity.SIZES, hidden_size=128, mlp_size=256, num_heads=1, depth=2, depth_single=3),
    autoencoder=AutoEncoderSizes(3, 32, (1, 1, 1, 1), 0, 1, 4),
    t5=T5Sizes(32128, parity.SIZES.txt_size, 20, 2, 80, 2),
    clip=CLIPSizes(49408, 77, parity.SIZES.pooled_size, 2, 48, 1),
    t5_length=16,
    r1=8,
    identities=4,
    shrink=16,
    training=WARM + 1,
    personalization=4,
    sampling=2,
)


# --- What is measured --------------------------------------------------------------------------------------


class Cases:
    """The cases: each measures something on the device and returns what it found, seconds and GiB."""

    def __init__(self, device: torch.device, scale: Scale, deadline: float):
        """deadline: when a whole personalization ends early, by `time.perf_counter`."""
        self.device, self.scale, self.deadline = device, scale, deadline
        self.side, self.dtype = 1024 // scale.shrink, torch.bfloat16
        self.first_ups: dict[int, Tensor] = {}  # what the first training at a resolution has made of up

    def all(self) -> dict[str, tuple[float, Callable[[], dict]]]:
        """Return all cases by name, in the order of their worth, each with the seconds that it may take."""
        device, scale = self.device, self.scale
        cases = {
            "card": (20, lambda: ceilings(device)),
            "parity plans": (40, lambda: parity.compare_plans(device, parity.PLANS)),
            "parity encoders": (10, lambda: parity.compare_encoders(device)),
            "stage2 1024 none": (20, lambda: self.stage2(1024, Plan())),
            "stage2 1024 all": (15, lambda: self.stage2(1024, Plan("all"))),
            "stage2 1024 attention": (15, lambda: self.stage2(1024, Plan("attention"))),
            "peft 1024": (25, lambda: self.peft(1024)),
            "scripts": (60, lambda: parity.run_scripts(device)),
            "stage1 1024": (30, self.stage1),
        }
        for name, gib in BUDGETS.items():
            cases[f"budget {name}"] = 20, partial(self.stage2_within, gib)
        return cases | {
            "personalize": (80, self.whole_personalization),
            "sampling 1024": (20, self.sampling),
            "diffusers 1024": (30, self.diffusers),
            "profile 1024": (20, lambda: self.profile(1024)),
            "compiled stage2 1024": (100, lambda: self.stage2(1024, Plan(compiled=True))),
            "stage2 512 none": (10, lambda: self.stage2(512, Plan())),
            "stage2 256 none": (10, lambda: self.stage2(256, Plan())),
            "profile 256": (10, lambda: self.profile(256)),
            "peft 512": (20, lambda: self.peft(512)),
            "stage2 1024 8 bits": (20, lambda: self.stage2(1024, Plan("all", fp8=True))),
            "autoencoder": (10, self.autoencoder),
            "t5": (15, self.t5),
            "micro": (20, lambda: kernels(device, scale.flux, sum(self.work("stage2").tokens))),
            "compiled parity": (90, lambda: parity.compare_plans(device, parity.COMPILED)),
        }

    # Models and inputs

    def make(self, kind: type, sizes: object) -> torch.nn.Module:
        """Return a frozen model on the device, always with the same random weights."""
        torch.manual_seed(0)
        with made_on(self.device, self.dtype):
            return kind(sizes).requires_grad_(False)

    @cached_property
    def host_weights(self) -> dict[str, Tensor]:
        """The transformer's weights in host memory, from where plans take them that stream or round."""
        empty = partial(torch.empty, dtype=self.dtype, pin_memory=self.device.type == "cuda")
        parameters = self.make(Flux, self.scale.flux).named_parameters()
        return {name: empty(p.shape).copy_(p.data) for name, p in parameters}

    @cached_property
    def prior(self) -> Prior:
        """A stage-1 file of random numbers."""
        model = inject(self.make(Flux, self.scale.flux), self.scale.r1, 1, 1, reset=False)
        for meta_down in model.factors.meta_down:
            meta_down.data.normal_(std=0.02)
        with TemporaryDirectory() as folder:
            save_meta(model, Path(folder) / "meta.safetensors", {"r1": self.scale.r1, "targets": "all"})
            return load_meta(Path(folder) / "meta.safetensors")

    @cached_property
    def prompt(self) -> dict[str, Tensor]:
        txt = torch.randn(self.scale.t5_length, self.scale.flux.txt_size)
        return {"txt": txt.to(self.dtype), "pooled": torch.randn(self.scale.flux.pooled_size).to(self.dtype)}

    @property
    def prompt_batch(self) -> dict[str, Tensor]:
        """txt (1, l, d) and pooled (1, d) on the device."""
        return {name: part[None].to(self.device) for name, part in self.prompt.items()}

    def crop(self, side: int) -> EncodedCrop:
        """Return a square crop of random latents; side: in pixels at full size."""
        torch.manual_seed(0)
        side //= self.scale.shrink
        shape = self.scale.flux.in_channels // 4, side // 8, side // 8
        posterior = {"mean": torch.randn(shape).half(), "std": torch.rand(shape).half()}
        return EncodedCrop((side, side), posterior, posterior)

    def transformer(self, plan: Plan) -> Flux:
        """Return the transformer, arranged as planned."""
        release(self.device)  # what others have left in the allocator's cache
        if plan.resident:
            return plan.apply(self.make(Flux, self.scale.flux), self.device)
        with torch.device("meta"):
            model = Flux(self.scale.flux)
        model.load_state_dict(self.host_weights, assign=True)
        return plan.apply(model.requires_grad_(False), self.device)

    # Plans

    def work(self, kind: str, side: int = 1024, **settings: int) -> Workload:
        sizes = {"sizes": self.scale.flux, "t5_length": self.scale.t5_length, "r1": self.scale.r1}
        return Workload(kind, resolution=side // self.scale.shrink, **sizes, **settings)

    def planned(self, work: Workload, budget: float | None = None) -> Plan:
        """Return the plan of the scripts, for all of the device's memory or for a budget in GiB."""
        settings = {name: getattr(work, name) for name in ("sizes", "r1", "batch", "identities")}
        lengths = {"t5_length": work.t5_length, "resolution": work.resolution}
        options = MemoryOptions(vram=budget)
        return make_plan(work.kind, {}, options, self.device, self.dtype, **lengths, **settings)

    def costs(self, work: Workload, plan: Plan, seconds: float) -> dict:
        """Return what a step took, beside what was planned."""
        cost = estimate(work, plan)
        found = {"seconds": round(seconds, 4), "tflop_s": round(cost.flops / seconds / 1e12, 1)}
        return found | peaks(self.device) | {"planned_gib": round(cost.peak / GIB, 3), "plan": asdict(plan)}

    # Training

    def personalize(
        self, plan: Plan, crops: Sequence[EncodedCrop], steps: int, at: Callable[[int], bool | None]
    ) -> Flux:
        """Run Algorithm 2. `at` is called before each step and after the last; True from it ends the run."""
        prior, model, draw_batches = self.prior, self.transformer(plan), personalize.draw_batches

        def watched(*arguments: object) -> Iterator[dict[str, Tensor]]:
            for step, batch in enumerate(draw_batches(*arguments)):
                if at(step):
                    return
                yield batch
            at(steps)

        arguments = self.prompt, Personalization(steps=steps), Training(), 0, self.device, self.dtype
        with patch.object(personalize, "draw_batches", watched):
            personalize.personalize(model, prior, crops, *arguments)
        return model

    def stage2(self, side: int, plan: Plan) -> dict:
        """Time steps of personalize.py on one square crop.

        "up_off" is the distance of up from that of the first plan at this resolution, relative to its norm.
        """
        steps, times = self.scale.training, {}

        def at(step: int) -> None:
            if step in (0, 1, WARM, steps):
                synchronize(self.device)
                times[step] = time.perf_counter()
            if step == WARM:
                reset_peaks(self.device)

        model = self.personalize(plan, [self.crop(side)], steps, at)
        found = self.costs(self.work("stage2", side), plan, (times[steps] - times[WARM]) / (steps - WARM))
        up = torch.cat([up.flatten().cpu() for _, _, up in model.factors.by_layer().values()])
        first = self.first_ups.setdefault(side, up)
        off = ((up - first).norm() / first.norm()).item()
        return found | {"up_off": round(off, 4), "first_step_s": round(times[1] - times[0], 2)}

    def stage2_within(self, budget: float) -> dict:
        """Time the same as planned for a card of so many GiB, with no more than that."""
        work = self.work("stage2")
        if self.scale == TOY:  # as small beside the toy
            budget = RESERVE + estimate(work, Plan()).peak / GIB * (0.5 + budget / 150)
        assert self.prior and self.host_weights  # made before there is a limit
        plan = self.planned(work, budget)
        with limited(self.device, budget):
            return {**self.stage2(1024, plan), "budget_gib": round(budget, 4)}

    def stage1(self) -> dict:
        """Time steps of train_meta.py after a bucket's warm-up, as planned for this card."""
        batch, identities, training = 4, self.scale.identities, Training()
        work = self.work("stage1", batch=batch, identities=identities)
        plan = self.planned(work)
        model = inject(self.transformer(plan), self.scale.r1, 1, identities)
        learner = MetaLearner(model, training)
        learner.start_bucket(0)
        entries = [(self.crop(1024).posterior, self.prompt)] * batch
        slots, generator = torch.arange(batch, device=self.device), torch.Generator().manual_seed(0)

        def step() -> None:
            inputs = make_batch(entries, generator, training, self.device, self.dtype)
            update(model, learner, Batch(inputs, slots, []), False, training)

        return self.costs(work, plan, timed(step, self.device, WARM, self.scale.training - WARM))

    def whole_personalization(self) -> dict:
        """Run personalize.py on a photo: encode its crops and the caption, train, write the LoRA.

        Left out are reading weights, of which there are none, and sample pictures. When time is short,
        training ends early, and "estimated" says how its time was computed.
        """
        found, times, steps = {}, [], self.scale.personalization

        @contextlib.contextmanager
        def clocked(name: str) -> Iterator[None]:
            synchronize(self.device)
            began = time.perf_counter()
            yield
            synchronize(self.device)
            found[name] = round(time.perf_counter() - began, 2)

        def at(step: int) -> bool:
            last = step == steps or (step > 0 and time.perf_counter() > self.deadline)
            if last or step == 0:
                synchronize(self.device)
            times.append(time.perf_counter())
            return last

        photo = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), np.uint8)
        photos = {Path("photo.png"): Image.fromarray(photo)}
        boxes = personalize.list_crops(photos, True, centred((1024, 1024), 200, 260))
        autoencoder = self.make(AutoEncoder, self.scale.autoencoder)
        with clocked("encoding_crops_s"):
            crops = personalize.encode_crops(photos, boxes, autoencoder, self.side, True)
        del autoencoder
        release(self.device)
        encoders = self.make(T5, self.scale.t5), self.make(CLIPText, self.scale.clip)
        conditioner = Conditioner(*encoders, load_tokenizers(SHIPPED["tiny"], self.scale.t5_length))
        with clocked("encoding_caption_s"):
            encode_prompt("a photo of a woman", conditioner)
        del encoders, conditioner
        release(self.device)
        plan = self.planned(self.work("stage2"))
        reset_peaks(self.device)
        model = self.personalize(plan, crops, steps, at)
        with clocked("writing_s"), TemporaryDirectory() as folder:
            export_lora(model, Path(folder) / "lora.safetensors", {})
        done = len(times) - 1
        found["training_s"] = round((times[-1] - times[0]) * steps / done, 2)
        if done < steps:
            found["estimated"] = f"training_s: measured on {done} steps, times {steps} / {done}"
        found["seconds"] = round(sum(value for name, value in found.items() if name.endswith("_s")), 2)
        found |= {"crops": len(crops), "shapes": len({crop.shape for crop in crops}), "steps": done}
        return found | peaks(self.device) | {"plan": asdict(plan)}

    def profile(self, side: int) -> dict:
        """Count the kernels of a step without recomputation, and name those that take most time."""
        cuda, times, calls, ends = self.device.type == "cuda", Counter(), Counter(), []
        profiler = profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU])

        def at(step: int) -> None:
            if step >= WARM:
                synchronize(self.device)
                (profiler.stop if ends else profiler.start)()
                ends.append(time.perf_counter())

        self.personalize(Plan(), [self.crop(side)], WARM + 1, at)
        for event in profiler.events():
            if ("CUDA" in str(event.device_type)) == cuda:
                times[event.name[:100]] += event.time_range.elapsed_us() / 1e3
                calls[event.name[:100]] += 1
        found = {"kernels": sum(calls.values()), "kernels_ms": round(sum(times.values()), 1)}
        found |= {"step_ms_while_profiled": round(1e3 * (ends[1] - ends[0]), 1)}
        return found | {"most_ms": {f"{calls[x]} {x}": round(ms, 2) for x, ms in times.most_common(15)}}

    # Sampling and the encoders

    def sampling(self) -> dict:
        """Time a picture at 1024 x 1024, without decoding."""
        model = self.transformer(Plan())
        noise = torch.randn(1, self.scale.flux.in_channels // 4, self.side // 8, self.side // 8)
        run = partial(denoise, model, noise, self.prompt_batch, steps=self.scale.sampling)
        return {"seconds": round(timed(run, self.device, 1, 2), 4), **peaks(self.device)}

    def autoencoder(self) -> dict:
        """Time the autoencoder at 1024 x 1024; GiB are those beside its weights, as planned for sampling."""
        model = self.make(AutoEncoder, self.scale.autoencoder)
        weights = sum(p.nbytes for p in model.parameters()) / GIB
        image = torch.rand(1, 3, self.side, self.side, device=self.device) * 2 - 1
        found = {"planned_gib": round(estimate(self.work("sample"), Plan()).activations / GIB, 3)}
        with torch.inference_mode():
            latents, _ = model.encode_moments(image)
            steps = {"encode": lambda: model.encode_moments(image), "decode": lambda: model.decode(latents)}
            for name, step in steps.items():
                found[f"{name}_s"] = round(timed(step, self.device, 1, 3), 4)
                found |= {f"{name}_{key}": round(gib - weights, 3) for key, gib in peaks(self.device).items()}
        return found

    def t5(self) -> dict:
        """Time T5 on one prompt."""
        model = self.make(T5, self.scale.t5)
        tokens = torch.randint(100, (1, self.scale.t5_length), device=self.device)
        with torch.inference_mode():
            seconds = timed(lambda: model(tokens), self.device, 2, 5)
        return {"seconds": round(seconds, 4), **peaks(self.device)}

    # diffusers and peft, which may not be installed

    def peft(self, side: int) -> dict:
        """Time training steps of diffusers and peft at rank 1, with their activation checkpointing."""
        from bench.theirs import their_training, their_transformer

        with made_on(self.device, self.dtype):
            model = their_transformer(self.scale.flux, rank=1)
        latents = self.crop(side).posterior["mean"][None].to(self.device, self.dtype)
        step = their_training(model, latents, **self.prompt_batch)
        seconds = timed(step, self.device, WARM, self.scale.training - WARM)
        return {"seconds": round(seconds, 4), **peaks(self.device)}

    def diffusers(self) -> dict:
        """Time a picture at 1024 x 1024 by diffusers' pipeline, without decoding and without a LoRA."""
        from bench.theirs import their_sampling, their_transformer

        with made_on(self.device, self.dtype):
            model = their_transformer(self.scale.flux)
        run = their_sampling(model, **self.prompt_batch, side=self.side, steps=self.scale.sampling)
        return {"seconds": round(timed(run, self.device, 1, 2), 4), **peaks(self.device)}


# --- Running them ------------------------------------------------------------------------------------------

GROUPS = list(dict.fromkeys(name.split()[0] for name in Cases(torch.device("cpu"), TOY, 0).all()))


def run(out: Path, seconds: float, only: Sequence[str], smoke: bool) -> dict:
    """Run the cases of some groups; return what they found, which is written to `out` after each."""
    device = torch.device("cpu" if smoke else "cuda")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS cannot be deterministic
    torch.backends.cudnn.allow_tf32 = False  # float32 is compared with the CPU's
    end = time.perf_counter() + (float("inf") if smoke else seconds)
    cases = Cases(device, TOY if smoke else Scale(), end - 15)
    result = {"about": describe(device), "smoke": smoke, "cases": {}}
    for name, (needed, case) in cases.all().items():
        if name.split()[0] not in only:
            continue
        left = end - time.perf_counter()
        if left < needed:
            found = {"skipped": f"{left:.0f} of {seconds:g} s were left, it may take {needed}"}
        else:  # four times as long as it may take: a single case must not use up the time of the others
            found = attempt(case, device, min(4 * needed, left + 10) * (not smoke))
        result["cases"][name] = found
        print(f"{name}: {json.dumps({key: x for key, x in found.items() if key != 'traceback'})}", flush=True)
        with atomic(out) as temporary:
            temporary.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return result


def attempt(case: Callable[[], dict], device: torch.device, limit: float = 0) -> dict:
    """Return what a case found, or why it failed: an error, or more than `limit` seconds; 0 for no limit."""

    def too_long(*_: object) -> None:
        raise TimeoutError(f"stopped after {limit:.0f} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, limit)
    began, printed = time.perf_counter(), io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            reset_peaks(device)
            found = case()
    except Exception as error:  # one that fails must not take the others along
        found = {"failed": f"{type(error).__name__}: {first_line(error)[:300]}"}
        found |= {"traceback": traceback.format_exc(), "printed": printed.getvalue()[-2000:]}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    release(device)
    return found | {"case_s": round(time.perf_counter() - began, 1)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/gpu.json"), help="new file to write")
    parser.add_argument("--seconds", type=float, default=480, help="cases that may end later are skipped")
    parser.add_argument("--only", nargs="+", choices=GROUPS, metavar="GROUP", help=", ".join(GROUPS))
    parser.add_argument("--smoke", action="store_true", help="toy sizes on the CPU, without a limit of time")
    args = parser.parse_args(argv)
    if args.out.exists():
        raise UserError(f"--out {args.out} is there already: name a new file")
    if not args.smoke and not torch.cuda.is_available():
        raise UserError("PyTorch finds no CUDA here; --smoke runs the same at toy sizes on the CPU")
    check_writable(args.out.parent, "--out")
    only = args.only or [group for group in GROUPS if not args.smoke or group != "compiled"]
    print(f"\n{table(run(args.out, args.seconds, only, args.smoke))}\n\n{args.out}")


if __name__ == "__main__":
    run_script(main)
