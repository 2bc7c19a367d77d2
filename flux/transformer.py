"""What training and sampling need of a base model's transformer, whatever it is made of."""

import math

import torch
from torch import Tensor, nn

Prompt = dict[str, Tensor]  # what text encoders return: txt (b, l, d); FLUX.1's also pooled (b, d)


class Transformer(nn.Module):
    """Predict the velocity, noise - latents: FLUX.1's (`flux/model.py`) or FLUX.2's (`flux/flux2.py`).

    Both have `sizes`, the lists `double_blocks` and `single_blocks`, and `img_in`, whose weight tells dtype
    and device.
    """

    SAMPLER: dict[str, float]  # defaults of `flux.sampling.denoise`
    T_MEAN = 0.0  # of the logit-normal times of training, by default

    @property
    def kind(self) -> type["Transformer"]:
        """Return the base's class, also where FSDP2 has put a subclass in its place."""
        return next(kind for kind in type(self).__mro__ if "SAMPLER" in vars(kind))

    def velocity(
        self, latents: Tensor, t: Tensor, guidance: float | Tensor | None, **prompt: Tensor
    ) -> Tensor:
        """Return the velocity at noisy latents (b, c, h, w) in the weights' dtype, in the same shape.

        t: (b,) in [0, 1], float32. guidance: a number or (b,); None or any for a model without that input.
        """
        raise NotImplementedError

    def times(self, steps: int, height: int, width: int) -> list[float]:
        """Return the `steps` + 1 times from 1 to 0 at which latents of height x width are denoised."""
        raise NotImplementedError


def shifted_times(steps: int, mu: float) -> list[float]:
    """Return `steps` + 1 times from 1 to 0, evenly spaced and then shifted towards the noise by mu."""
    t = torch.linspace(1, 0, steps + 1)
    return (math.exp(mu) / (math.exp(mu) + (1 / t - 1))).tolist()
