"""Classes of people and lists of prompts are read as they should be."""

import re
from pathlib import Path

import pytest

from scoring import inputs

PROMPTS = Path(__file__).parents[1] / "metaphd" / "prompts"


def test_the_prompt_lists():
    man, woman = (inputs.read_prompts(PROMPTS, kind) for kind in ("man", "woman"))
    assert len(man) == len(woman) == len({*man}) == len({*woman}) == 20
    for prompts, word in ((man, "man"), (woman, "woman")):
        assert all(re.search(rf"\b{word}\b", prompt) for prompt in prompts)
    for kind, other in (("man", r"\b(woman|her|she)\b"), ("woman", r"\b(man|his|he)\b")):
        frontal = inputs.read_prompts(PROMPTS / "frontal.txt", kind)
        assert len(frontal) == 10
        for prompt in frontal + {"man": man, "woman": woman}[kind]:
            assert not re.search(other, prompt) and not set(prompt) & set("[]/")
            assert len(prompt) < 160 and len(prompt.split()) < 40  # CLIP sees 75 tokens


@pytest.mark.parametrize("name, kind", [
    ("woman_anna", "woman"), ("man-3", "man"), ("man", "man"), ("manuel", "person"), ("anna", "person"),
])  # fmt: skip
def test_the_class_of_a_person(name, kind):
    assert inputs.class_of(name, {}) == kind
    assert inputs.class_of(name, {name: "woman"}) == "woman"
