"""The FLOPs of a personalization on crops, relative to as many steps on the whole photo.

    python bench/flops.py                                         # a portrait whose face is 200 pixels wide
    python bench/flops.py --photo 2048 1536 --face 600,500,900,900

Counted are the transformer's matrix products and attention, by `run.costs.step_flops`, which the tests
compare with torch's counter. Not counted are the adapters, about a thousandth at rank 1, and the encoders,
which run once. With more memory fewer blocks are recomputed: each card has a row, with the plan for it.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script from anywhere

from people.crops import crop_boxes, fit_shape
from people.photos import Box, Size
from run.costs import Plan, Workload, step_flops
from run.plan import choose
from scoring.tables import markdown


def crop_shapes(photo: Size, face: Box, resolution: int, pixels: int = 16) -> list[Size]:
    """Return the shape in pixels of every crop, as `personalize.encode_crops` encodes it."""
    boxes = crop_boxes(photo, face)
    return [fit_shape((y1 - y0, x1 - x0), resolution, pixels) for x0, y0, x1, y1 in boxes]


def run_flops(work: Workload, plan: Plan, shapes: list[Size], steps: int) -> float:
    """Return the FLOPs of a run that trains in all shapes equally often."""
    each = [step_flops(replace(work, shape=shape), plan.checkpoint) for shape in shapes]
    return steps * sum(each) / len(each)


def centred(photo: Size, width: int, height: int) -> Box:
    """Return a face's box of the given size, in the middle of the photo's width and upper half."""
    left, top = (photo[1] - width) // 2, max(0, photo[0] // 3 - height // 2)
    return left, top, left + width, top + height


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photo", type=int, nargs=2, default=(1024, 1024), metavar=("H", "W"), help="pixels")
    parser.add_argument(
        "--face", help="x0,y0,x1,y1 in pixels; default: 200 wide, 260 high, as detectors draw"
    )
    parser.add_argument("--resolution", type=int, default=1024, help="crops are shrunk to this side squared")
    parser.add_argument("--steps", type=int, default=375)
    parser.add_argument("--cards", type=float, nargs="*", default=(24, 48, 80), help="GiB of memory")
    args = parser.parse_args(argv)
    photo = tuple(args.photo)
    face = tuple(map(int, args.face.split(","))) if args.face else centred(photo, 200, 260)

    shapes = crop_shapes(photo, face, args.resolution)
    full = fit_shape(photo, args.resolution, 16)
    work = Workload("stage2", resolution=args.resolution)
    plans = [("all blocks", Plan("all"))]
    for card in args.cards:
        plan, _ = choose(work, card)
        recomputed = plan.checkpoint if isinstance(plan.checkpoint, str) else f"{plan.checkpoint} blocks"
        plans.append((f"as planned for {card:g} GiB: {recomputed}, {plan.stream} streamed", plan))
    whole = run_flops(work, Plan("all"), [full], args.steps)
    lines = [["recomputed", "crops, TFLOP", "whole photo, TFLOP", "crops, ratio", "whole photo, ratio"]]
    for name, plan in plans:
        flops = [run_flops(work, plan, used, args.steps) for used in (shapes, [full])]
        lines.append([name, *(f"{x / 1e12:,.0f}" for x in flops), *(f"{x / whole:.2f}" for x in flops)])
    print(f"python bench/flops.py {' '.join(sys.argv[1:] if argv is None else argv)}".rstrip())
    areas = sorted(h * w // 16**2 for h, w in shapes)
    print(
        f"\nA photo of {photo[0]}x{photo[1]} (h x w), face {face}, {args.steps} steps. {len(shapes)} crops "
        f"of {areas[0]} to {areas[-1]} image tokens, {sum(areas) / len(areas):.0f} on average; the whole "
        f"photo has {full[0] * full[1] // 16**2}. Ratios are relative to it with all blocks recomputed.\n"
    )
    print(markdown(lines))


if __name__ == "__main__":
    main()
