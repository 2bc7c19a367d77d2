"""FaceSim and CLIP-T of a few pictures of one person, by the evaluators that need no download."""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from flux.errors import UserError
from people.cache import TensorCache
from people.photos import Box
from scoring.evaluators import load_evaluators
from scoring.tables import TITLES

NETWORKS = {"facesim": "the face recogniser", "clip-t": "CLIP ViT-B/32"}


class Judge:
    """Scores pictures, one of each prompt. It works on the CPU, where it takes nothing from the training."""

    def __init__(
        self,
        model: str,
        photo: Path,
        face: Box | None,
        prompts: Sequence[str],
        detector: Path | None = None,
    ):
        """Embed the photo and the prompts; print what is scored by whom, and what is not.

        model: as --model, for the evaluators that it brings along. face: its box in the photo, if known.
        Raises UserError when the photo is too small for these.
        """
        self.folder = TemporaryDirectory()
        self.evaluators = load_evaluators(model, TensorCache(Path(self.folder.name)), detector=detector)
        self.reference: Tensor | None = None
        self.texts: dict[int, Tensor] = {}  # by the number of the prompt; evaluators may not know its words
        remarks = []
        for metric, there in self.evaluators.at_hand().items():
            if not there:
                advice = f"not on this disk (python metrics.py {metric} downloads it)"
                remarks.append(f"no {TITLES[metric]}: {NETWORKS[metric]} is {advice}")
            elif metric == "facesim":
                self.reference = self.evaluators.embed_reference(photo, face)
                if self.reference is None:
                    remarks.append(f"no {TITLES[metric]}: no face found in {photo}, --face gives its box")
            else:
                remarks += self._embed_texts(prompts)
        scored = {"facesim": self.reference is not None, "clip-t": bool(self.texts)}
        names = " and ".join(TITLES[metric] for metric, there in scored.items() if there)
        said = f"{names} by {self.evaluators.name}" if names else "pictures only"
        print("\n  ".join([f"--watch: {said}", *remarks]))

    def _embed_texts(self, prompts: Sequence[str]) -> list[str]:
        """Embed the prompts that the evaluators know; return a remark on each of the others."""
        remarks = []
        for k, prompt in enumerate(prompts):
            try:
                (self.texts[k],) = self.evaluators.embed_texts([prompt])
            except UserError as error:
                remarks.append(f"no {TITLES['clip-t']}: {error}")
        return remarks

    def warn_of_eye(self, weights: str) -> None:
        """Warn when a predictor, whose eye has these weights, sees with the network of FaceSim."""
        if weights in self.evaluators.used.values():
            warnings.warn(
                "--watch: the predictor sees with the network that scores FaceSim, which flatters its LoRA",
                stacklevel=2,
            )

    def score(self, pictures: Sequence[Image.Image]) -> dict[str, list[float]]:
        """Return the scores of the pictures, one of each prompt, by metric.

        FaceSim is 0 for a picture without a face, CLIP-T nan for a prompt that is not scored.
        """
        files = [Path(self.folder.name) / f"{k}.png" for k in range(len(pictures))]
        for picture, file in zip(pictures, files):
            picture.save(file)
        scores = {}
        if self.reference is not None:
            faces, _ = self.evaluators.embed_faces(files)
            # If no picture has a face, the rows are a single 0 and not as long as the reference.
            faces = faces.expand(-1, len(self.reference))
            scores["facesim"] = F.cosine_similarity(faces, self.reference, dim=-1).tolist()
        if self.texts:
            images = self.evaluators.embed_images(files)
            scores["clip-t"] = [
                (image @ self.texts[k]).item() if k in self.texts else math.nan
                for k, image in enumerate(images)
            ]
        return scores
