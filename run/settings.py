"""The training settings that both stages share, most of them where the paper is silent, and their options."""

import argparse
from dataclasses import dataclass, fields
from typing import Self


@dataclass(frozen=True)
class Training:
    """Settings of the optimizer and of what it learns from; docs/choices.md explains the defaults."""

    lr: float = 4e-4  # AdamW's learning rate, the paper's
    weight_decay: float = 0.01
    clip_grad: float = 1.0  # largest norm of the gradient of meta_down, and of each identity's mid and up
    t_mean: float = 0.0  # times are logit-normal: sigmoid of a Gaussian with this mean
    t_std: float = 1.0  # and this standard deviation
    train_guidance: float = 1.0  # the model's guidance input while training
    latents: str = "sample"  # or "mean", of the autoencoder's posterior

    @classmethod
    def of(cls, args: argparse.Namespace, **changes: object) -> Self:
        """Take the settings from parsed arguments; `changes` come before them."""
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)} | changes)


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `Training`, except --lr, which the benchmark needs as a list.

    `run.models.take_defaults` sets --t-mean and --train-guidance.
    """
    group = parser.add_argument_group("choices where the paper is silent")
    group.add_argument("--weight-decay", type=float, default=Training.weight_decay, help="AdamW's")
    group.add_argument(
        "--clip-grad",
        type=float,
        default=Training.clip_grad,
        help="largest norm of the gradient of meta_down, and of each identity's mid and up",
    )
    group.add_argument(
        "--t-mean", type=float, help="times are logit-normal with this mean; default: 0, 1.1 for FLUX.2"
    )
    group.add_argument("--t-std", type=float, default=Training.t_std, help="and this standard deviation")
    group.add_argument("--train-guidance", type=float, help="guidance input while training; default: 1")
    group.add_argument(
        "--latents",
        choices=["sample", "mean"],
        default=Training.latents,
        help="what is taken of the autoencoder's posterior",
    )
