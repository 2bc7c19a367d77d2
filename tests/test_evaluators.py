"""The evaluators: the small ones tell people and prompts apart; each model gets the right ones."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flux import find_files
from flux.checkpoint import read_tensors
from flux.loading import native_size
from people.cache import TensorCache
from scoring import evaluators
from tiny.judges import NAMED
from tiny.people import STYLES, VIEW, caption, draw_identities, draw_views, render, to_pil
from vision.small import IdentityNet, PromptNet, load_judges, named_in

FOLDER = Path(__file__).parents[1] / "tiny" / "weights" / "judges"
PEOPLE, RANK_1 = 200, 0.93  # measured .986, see judges.json


@pytest.fixture(scope="module")
def judges() -> tuple[IdentityNet, PromptNet]:
    if not (FOLDER / "judges.json").exists():
        pytest.skip(f"{FOLDER} holds no trained networks; python tiny/judges.py makes them")
    return load_judges(FOLDER)


@pytest.fixture(scope="module")
def people() -> tuple[Tensor, Tensor, Tensor]:
    """New people, a photo of each and a picture in any style: identities, views, images (2, PEOPLE, ...)."""
    generator = torch.Generator().manual_seed(20_000)
    identities = draw_identities(PEOPLE, generator)
    views = torch.stack([draw_views(PEOPLE, generator, style=0.0), draw_views(PEOPLE, generator)])
    # A narrow face, not too low: the shirt shows.
    views[..., VIEW.index("width")].clamp_(0.3, 0.45)
    views[..., VIEW.index("y")].clamp_(max=0.5)
    return identities, views, torch.stack([render(identities, photo)[0] for photo in views])


def test_people_are_told_apart(judges, people):
    first = judges[0](people[2][0])
    views = draw_views(PEOPLE, torch.Generator().manual_seed(20_001), style=0.0)
    cosines = judges[0](render(people[0], views)[0]) @ first.mT
    same = torch.eye(PEOPLE, dtype=torch.bool)
    assert (cosines.argmax(dim=1) == torch.arange(PEOPLE)).float().mean() > RANK_1
    assert cosines[same].mean() > 0.75 and cosines[~same].mean().abs() < 0.1
    wrong = cosines[torch.arange(PEOPLE), torch.arange(PEOPLE) - 1]
    assert (cosines[same] > wrong).float().mean() > 0.98


def test_style_scene_and_shirt_do_not_make_a_person(judges, people):
    photo, other = judges[0](people[2][0]), judges[0](people[2][1])
    cosines = (photo * other).sum(dim=-1)
    for number in range(len(STYLES)):
        rows = people[1][1][:, VIEW.index("style")] == number
        assert cosines[rows].mean() > (photo @ other.mT)[:, rows].mean() + 0.4
    # The other way round: two people in one view are still two.
    same_view = judges[0](render(people[0].roll(1, 0), people[1][0])[0])
    assert (photo * same_view).sum(dim=-1).mean() < 0.15


def test_adherence_is_high_for_the_caption_and_low_for_another(judges, people):
    identities, views, images = people[0][:60], people[1][:, :60], people[2][:, :60]
    for shown_views, pictures in zip(views, images):
        captions = [caption(v, i, torch.Generator().manual_seed(0)) for v, i in zip(shown_views, identities)]
        right = judges[1].adherence(pictures, captions)
        assert right.shape == (60,) and right.mean() > 0.95
        for attribute in ("scene", "shirt", "style"):
            words, shown = [*NAMED[attribute]], shown_views[:, VIEW.index(attribute)].long()
            right = judges[1].adherence(pictures, [words[k] for k in shown])
            wrong = judges[1].adherence(pictures, [words[k - 1] for k in shown])
            assert right.mean() > 0.95 and wrong.mean() < 0.05
        # One wrong word of four costs a quarter.
        wrong = [
            text.replace(" man", " woman") if " man" in text else text.replace(" woman", " man")
            for text in captions
        ]
        cost = judges[1].adherence(pictures, captions) - judges[1].adherence(pictures, wrong)
        assert 0.2 < cost.mean() < 0.26


def test_one_prompt_serves_all_pictures(judges, people):
    pictures = people[2][0][:3]
    prompt = "a photo of a woman at the beach"
    assert torch.equal(judges[1].adherence(pictures, prompt), judges[1].adherence(pictures, [prompt] * 3))
    with pytest.raises(ValueError):
        judges[1].adherence(pictures, [prompt] * 2)


def test_a_score_depends_on_its_own_picture_only(judges, people):
    pictures = people[2][0][:8]
    for judge in judges:
        alone, together = judge(pictures[:1]), judge(pictures)
        if isinstance(alone, dict):
            alone, together = (torch.cat([*found.values()], dim=1) for found in (alone, together))
        torch.testing.assert_close(alone, together[:1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "prompt, named",
    [
        ("a man at night", {"scene": 4, "who": 0}),
        (
            "a photo of a woman in the city wearing a Black shirt",
            {"scene": 1, "shirt": 4, "style": 0, "who": 1},
        ),
        ("a neon picture of a black-haired woman", {"style": 3, "who": 1}),
        ("a sketch in a room", {"scene": 7, "style": 2}),
    ],
)
def test_words_are_found_in_a_prompt(prompt, named):
    assert named_in(prompt, NAMED) == named


@pytest.mark.parametrize("prompt", ["a dog", "", "a man and a woman", "a photo of a painting", "a roommate"])
def test_a_prompt_without_known_words_is_refused(prompt):
    with pytest.raises(ValueError, match=re.escape(repr(prompt))):
        named_in(prompt, NAMED)


def test_picture_and_prompt_multiply_to_the_adherence(judges, people):
    """Against the mean of the named words' probabilities, taken one by one."""
    images, judge = people[2][1][:20], judges[1]
    texts = [
        "a painting of a woman at the beach wearing a red shirt",
        "a man at night",
        "a sketch",
        "a room",
    ] * 5
    pictures = [to_pil(image) for image in images]
    products = (judge.embed_images(pictures) * judge.embed_texts(texts)).sum(dim=-1)
    logits = judge(torch.stack([torch.cat([judge.look(picture)])[0] for picture in pictures]))
    for i, text in enumerate(texts):
        named = named_in(text, NAMED)
        odds = [logits[name][i].softmax(dim=0)[k] for name, k in named.items()]
        assert products[i].item() == pytest.approx(sum(odds).item() / len(named), abs=1e-4)
    as_drawn = torch.cat([judge.look(picture) for picture in pictures])
    assert (as_drawn - images).abs().max() < 1 / 127 and torch.equal(as_drawn, as_drawn.clamp(-1, 1))
    torch.testing.assert_close(products, judge.adherence(as_drawn, texts), rtol=1e-4, atol=1e-4)
    assert judge.embed_texts(texts).sum(dim=1).tolist() == pytest.approx([1.0] * 20)


def test_the_words_come_with_the_file(judges, tmp_path):
    assert judges[1].vocabulary == NAMED
    for name in ("identity", "prompt"):
        save_file(load_file(FOLDER / f"{name}.safetensors"), tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match="prompt.safetensors does not say .* which words"):
        load_judges(tmp_path)
    state, _ = read_tensors(FOLDER / "prompt.safetensors")
    few = {"vocabulary": json.dumps({"who": ["man", "woman"]})}
    save_file(state, tmp_path / "prompt.safetensors", metadata=few)
    with pytest.raises(ValueError, match="prompt.safetensors does not hold this network"):
        load_judges(tmp_path)


def test_other_sizes_are_refused_and_other_shapes_are_not():
    judge = IdentityNet().eval()
    assert judge(torch.zeros(2, 3, 56, 72)).shape == (2, 128)
    with pytest.raises(ValueError, match=r"64x64 pixels, got \(128, 128\)"):
        judge(torch.zeros(1, 3, 128, 128))


# Which evaluators a model brings


@pytest.fixture
def own_model(model, tmp_path) -> Path:
    """A copy of the random model with the small evaluators."""
    shutil.copytree(model, tmp_path / "own_model")
    return Path(shutil.copytree(FOLDER, tmp_path / "own_model" / "judges")).parent


def evaluators_for(model: str | None, **files: Path | None) -> evaluators.Evaluators:
    return evaluators.load_evaluators(model, TensorCache(Path("cache")), **files)


def test_folder_file_and_variable_bring_the_same(own_model, monkeypatch):
    """What lies beside the transformer is the model's, however --model names it."""
    file = own_model / "flux1-random.safetensors"
    monkeypatch.setenv("FLUX_DEV", str(file))
    for name in (str(own_model), str(file), "flux-dev"):
        found = evaluators_for(name)
        assert isinstance(found, evaluators.SmallEvaluators) and found.folder == own_model / "judges"
        files = find_files(name)
        assert files.folder == own_model and native_size(files.folder) == 64
    with pytest.raises(ValueError, match="--clip is of no use: --model .* brings evaluators of its own"):
        evaluators_for(str(file), clip=own_model)
    assert evaluators_for("tiny").folder == FOLDER


def test_a_diffusers_layout_is_one_folder(own_model):
    (own_model / "transformer").mkdir()
    (own_model / "flux1-random.safetensors").rename(own_model / "transformer" / "model.safetensors")
    assert find_files(str(own_model)).folder == own_model
    assert evaluators_for(str(own_model)).folder == own_model / "judges"


def test_other_models_get_the_papers(model, monkeypatch):
    monkeypatch.delenv("FLUX_DEV", raising=False)
    for name in (None, "flux-dev", "somebody/flux", str(model)):
        assert isinstance(evaluators_for(name), evaluators.PaperEvaluators)
    with pytest.raises(FileNotFoundError, match="--model flux-dve: neither a folder nor a file"):
        evaluators_for("flux-dve")
