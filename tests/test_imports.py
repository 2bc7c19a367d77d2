"""Imports follow the table in CONTRIBUTING.md, and what runs needs requirements.txt and nothing else."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = {"train_meta", "personalize", "sample", "metrics"}
HEADER = "| room | holds | may import |"
OTHERS = {"diffusers", "transformers", "peft", "torchvision", "facenet_pytorch"}  # only for comparison
PACKAGE_OF = {"PIL": "pillow", "cv2": "opencv-python-headless", "huggingface_hub": "huggingface-hub"}


def read_table(text: str) -> dict[str, set[str]]:
    """Return what each room may import of ours; in the order of the table, from top to bottom."""
    assert text.count(HEADER) == 1
    _rule, *lines = text.split(HEADER)[1].strip().splitlines()
    table = {}
    for line in lines:
        if not line.startswith("|"):
            break
        room, _, allowed = (cell.strip() for cell in line.strip("|").split("|"))
        table[room.strip("`/")] = {name.strip(" `/") for name in allowed.split(",") if name.strip()}
    rooms = list(table)
    for place, room in enumerate(rooms):
        if table[room] == {"anything below"}:
            table[room] = set(rooms[place + 1 :]) - {"tests"}
    return table


def faults(table: dict[str, set[str]]) -> list[str]:
    """List the rows that name a room which is not below them, and scripts that name another one."""
    rooms, wrong = list(table), []
    for place, (room, allowed) in enumerate(table.items()):
        below = set(rooms[place + 1 :]) - {"tests"}
        wrong += [f"{room}: {name} is not below" for name in allowed - below if room != "tests"]
        if room in SCRIPTS:
            wrong += [f"{room}: {name} is a script" for name in allowed & SCRIPTS]
    return wrong


def imports(source: str, module: str) -> Iterator[str]:
    """Yield the dotted names that a module imports, at its top or in a function; relative ones resolved."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            above = module.split(".")[: -node.level]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from (".".join([*above, name]) for name in names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def violations(path: str, source: str, table: dict[str, set[str]], requirements: set[str]) -> list[str]:
    """List the imports of a file (path from the root, source) that the table or the requirements forbid."""
    module = path.removesuffix(".py").replace("/", ".")
    room = module.split(".")[0]
    if room not in table:
        return [f"{path} is in no room of the table"]
    if room == "tests":
        return []
    wrong = []
    for name in imports(source, module):
        root = name.split(".")[0]
        if root in table:
            if root != room and root not in table[room]:
                wrong.append(f"{path} imports {name}, which {room} may not")
        elif root not in sys.stdlib_module_names and not (room == "bench" and root in OTHERS):
            package = PACKAGE_OF.get(root, root)
            if package not in requirements:
                wrong.append(f"{path} imports {name}, but requirements.txt has no {package}")
    return wrong


TABLE = read_table((ROOT / "CONTRIBUTING.md").read_text())
REQUIRED = set(re.findall(r"^[\w-]+", (ROOT / "requirements.txt").read_text(), flags=re.M))


def files() -> dict[str, str]:
    """Return all our sources by their path from the root; hidden folders and environments are not ours."""
    environments = [config.parent for config in ROOT.glob("*/pyvenv.cfg")]
    paths = [p for p in ROOT.rglob("*.py") if not any(p.is_relative_to(folder) for folder in environments)]
    names = {path.relative_to(ROOT).as_posix(): path for path in paths}
    return {name: path.read_text() for name, path in names.items() if not re.search(r"(^|/)(\.|out/)", name)}


def test_the_table_points_down():
    assert not faults(TABLE)


def test_every_import_is_in_the_table():
    sources = files()
    assert {"metalora.py", "run/plan.py", "flux/model.py", "tiny/people.py"} <= sources.keys()
    rooms = {name.split("/")[0].removesuffix(".py") for name in sources}
    assert rooms == TABLE.keys()
    wrong = [fault for path, source in sources.items() for fault in violations(path, source, TABLE, REQUIRED)]
    assert not wrong
    assert not REQUIRED & OTHERS


@pytest.mark.parametrize(
    "text, fault",
    [
        ("| a | x | b |\n| b | y | a |", "b: a is not below"),
        ("| a | x | `a` |", "a: a is not below"),
        ("| a | x | tests |\n| tests | y | anything |", "a: tests is not below"),
        ("| a | x | b, c |\n| `b` | y | |", "a: c is not below"),
        ("| sample | x | metrics |\n| metrics | y | |", "sample: metrics is a script"),
    ],
)
def test_a_wrong_table_is_noticed(text, fault):
    assert faults(read_table(f"# A\n\n{HEADER}\n|---|---|---|\n{text}\n\nMore | text | here\n")) == [fault]


def test_a_table_is_read_with_or_without_backticks():
    rows = (
        "| z | all | anything below |\n| `a/` | x | `b/`, c |\n| b | y | |\n| c | | |\n| tests | | anything |"
    )
    table = read_table(f"{HEADER}\n|---|---|---|\n{rows}\n\n| d | e | f |\n")
    assert table == {"z": {"a", "b", "c"}, "a": {"b", "c"}, "b": set(), "c": set(), "tests": {"anything"}}


@pytest.mark.parametrize(
    "path, source",
    [
        ("flux/model.py", "import metalora"),
        ("flux/model.py", "from vision.detector import find_faces"),
        ("flux/layers.py", "def forward():\n    from people import crops"),
        ("flux/layers.py", "from .. import people"),
        ("flux/layers.py", "from ..people import crops"),
        ("vision/detector.py", "from people import crops"),
        ("vision/detector.py", "import run.files"),
        ("run/plan.py", "from people.photos import Size"),
        ("people/crops.py", "from metalora import inject"),
        ("people/crops.py", "import os, sample"),
        ("lora/names.py", "from metalora import factors"),
        ("metalora.py", "import people"),
        ("metalora.py", "from vision import detector"),
        ("sample.py", "from personalize import main"),
        ("train_meta.py", "import os, metaphd"),
        ("personalize.py", "if x:\n    from tiny.people import render"),
        ("metaphd/benchmark.py", "from tiny import people"),
        ("metaphd/benchmark.py", "import sample"),
        ("tiny/pretrain.py", "import train_meta"),
        ("tiny/demo.py", "import metaphd.benchmark"),
        ("sample.py", "from tests import compare"),
        ("sample.py", "import bench.memory"),
        ("bench/speed.py", "import studies.claim"),
        ("utils.py", ""),
        ("flux/t5.py", "from transformers import T5EncoderModel"),
        ("vision/detector.py", "import torchvision.transforms as T"),
        ("tiny/people.py", "import scipy"),
        ("bench/speed.py", "import scipy"),
    ],
)
def test_a_wrong_import_is_noticed(path, source):
    assert len(violations(path, source, TABLE, {"torch"})) == 1


@pytest.mark.parametrize(
    "path, source",
    [
        ("flux/loading.py", "import os\nimport torch.nn.functional as F\nfrom flux.clip import CLIPText"),
        ("flux/__init__.py", "from flux.model import Flux\nfrom . import layers\nfrom .t5 import T5"),
        ("vision/clip_vit.py", "from flux.clip import CLIPText\nfrom vision import detector"),
        ("people/faces.py", "import flux.errors, run.files, vision.detector\nfrom people import photos"),
        ("metalora.py", "from flux import load_transformer\nfrom PIL import Image\nimport lora.names"),
        ("train_meta.py", "import people.buckets, metalora, flux.sampling, run.plan"),
        ("metaphd/benchmark.py", "import metrics\nfrom personalize import main"),
        ("studies/claim/__main__.py", "from bench import memory\nimport train_meta\nfrom tiny import people"),
        ("bench/speed.py", "import diffusers, metalora\nfrom tiny import people"),
        ("tests/test_x.py", "import diffusers, compare, studies"),
    ],
)
def test_a_right_import_passes(path, source):
    assert not violations(path, source, TABLE, {"torch", "pillow"})
