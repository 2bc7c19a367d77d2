"""Imports point down the map in STYLE.md, and what runs needs requirements.txt and nothing else."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ("train_meta", "personalize", "sample", "metrics", "study")
LIBRARY = ("flux", "vision", "metalora", "lora_files", "data", "survey", "encoding", "runs")
LIBRARY += ("parallel", "plan", "arguments", "metaphd", "judges", "report")
WORLD = ("tiny", "flux", "vision.small", "metalora", "data")
# What each module may import of ours, itself aside; a package's line holds for all in it that have none.
MAP = {
    "benchmark": (*SCRIPTS, *LIBRARY),
    **dict.fromkeys(SCRIPTS, LIBRARY),
    "metalora": ("flux", "lora_files"),
    "lora_files": ("flux", "arguments"),
    "plan": ("flux",),
    "arguments": ("flux.terminal",),
    "data": ("flux",),
    "survey": ("data", "flux"),
    "encoding": ("data", "survey", "parallel", "flux"),
    "parallel": ("flux",),
    "runs": ("flux",),
    "metaphd": ("data", "vision", "flux", "arguments"),
    "judges": ("data", "vision", "flux"),
    "report": ("data", "flux"),
    "vision": ("vision", "flux.clip", "flux.loading"),
    "flux": ("flux",),
    "tiny": WORLD,
    "tiny.demo": (*WORLD, *SCRIPTS),
    "bench": (*SCRIPTS, *LIBRARY, "tiny", "bench", "benchmark"),
}
JUDGES = {"diffusers", "transformers", "peft", "torchvision", "facenet_pytorch"}  # only for comparison
PACKAGE_OF = {"PIL": "pillow", "cv2": "opencv-python-headless", "huggingface_hub": "huggingface-hub"}


def imports(source: str, module: str) -> Iterator[str]:
    """Yield the dotted names that a module imports, at its top or in a function; relative ones resolved."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            origin = ".".join([*above, *filter(None, [node.module])])
            # `from flux import clip` imports flux.clip: a package is named with what is taken from it.
            package = origin in ("", "flux", "vision", "tiny", "bench")
            yield from (f"{origin}.{alias.name}".strip(".") for alias in node.names) if package else [origin]


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def violations(path: str, source: str, requirements: set[str]) -> list[str]:
    """List the imports of a file (path from the root, source) that the map or the requirements forbid."""
    module = path.removesuffix(".py").replace("/", ".")
    top = module.split(".")[0]
    if top == "tests":
        return []
    if top not in MAP:
        return [f"{path} is not on the map"]
    ours, allowed = {name.split(".")[0] for name in MAP} | {"tests"}, MAP.get(module, MAP[top])
    wrong = []
    for name in imports(source, module):
        root = name.split(".")[0]
        if root in ours:
            if not within(name, allowed):
                wrong.append(f"{path} imports {name}, which is not below it")
        elif root not in sys.stdlib_module_names and not (top == "bench" and root in JUDGES):
            package = PACKAGE_OF.get(root, root)
            if package not in requirements:
                wrong.append(f"{path} imports {name}, but requirements.txt has no {package}")
    return wrong


def required() -> set[str]:
    named = re.findall(r"^[\w-]+", (ROOT / "requirements.txt").read_text(), flags=re.M)
    return {*named, "tqdm"}  # tqdm comes with huggingface-hub


def files() -> dict[str, str]:
    """Return all our sources by their path from the root; hidden folders and environments are not ours."""
    environments = [config.parent for config in ROOT.glob("*/pyvenv.cfg")]
    paths = [p for p in ROOT.rglob("*.py") if not any(p.is_relative_to(folder) for folder in environments)]
    names = {path.relative_to(ROOT).as_posix(): path for path in paths}
    return {name: path.read_text() for name, path in names.items() if not re.search(r"(^|/)\.", name)}


def test_every_import_points_down():
    sources = files()
    assert {"metalora.py", "data.py", "flux/model.py", "tiny/people.py"} <= sources.keys()
    assert not sum((violations(path, source, required()) for path, source in sources.items()), [])
    assert not required() & (JUDGES | {name.replace("_", "-") for name in JUDGES})


@pytest.mark.parametrize(
    "path, source",
    [
        ("flux/model.py", "import metalora"),
        ("flux/model.py", "from vision.detector import find_faces"),
        ("flux/layers.py", "def forward():\n    from data import crops"),
        ("flux/layers.py", "from .. import data"),
        ("vision/clip_vit.py", "import flux"),
        ("vision/clip_vit.py", "from flux import load_clip"),
        ("vision/clip_vit.py", "from flux.clipping import x"),
        ("vision/detector.py", "from data import crops"),
        ("metalora.py", "import data"),
        ("metalora.py", "from vision import detector"),
        ("data.py", "from metalora import inject"),
        ("data.py", "import sample"),
        ("sample.py", "from personalize import main"),
        ("train_meta.py", "import os, benchmark"),
        ("personalize.py", "if x:\n    from tiny.people import render"),
        ("benchmark.py", "from tiny import people"),
        ("tiny/pretrain.py", "import train_meta"),
        ("tiny/pretrain.py", "from vision import detector"),
        ("tiny/demo.py", "import benchmark"),
        ("sample.py", "from tests import compare"),
        ("sample.py", "import bench.memory"),
        ("utils.py", ""),
        ("flux/t5.py", "from transformers import T5EncoderModel"),
        ("vision/detector.py", "import torchvision.transforms as T"),
        ("tiny/people.py", "import scipy"),
        ("bench/speed.py", "import scipy"),
    ],
)
def test_a_wrong_import_is_noticed(path, source):
    assert len(violations(path, source, {"torch"})) == 1


@pytest.mark.parametrize(
    "path, source",
    [
        ("flux/loading.py", "import os\nimport torch.nn.functional as F\nfrom flux.clip import CLIPText"),
        ("flux/__init__.py", "from flux.model import Flux\nfrom . import layers\nfrom .t5 import T5"),
        (
            "vision/clip_vit.py",
            "from flux import clip\nfrom flux.loading import load\nfrom vision import detector",
        ),
        ("metalora.py", "from flux import load_flux\nfrom PIL import Image"),
        ("train_meta.py", "import data, metalora, flux.sampling, vision.detector"),
        ("benchmark.py", "import sample\nfrom train_meta import main"),
        ("tiny/demo.py", "import personalize\nfrom tiny.people import render"),
        ("bench/speed.py", "import diffusers, benchmark\nfrom tiny import people"),
        ("tests/test_x.py", "import diffusers, compare, benchmark"),
    ],
)
def test_a_right_import_passes(path, source):
    assert not violations(path, source, {"torch", "pillow"})
