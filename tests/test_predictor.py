"""The predictor: its map, its training and its file, and what personalize.py and the benchmark make of it."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from compare import randomize
from helpers import Killed, assert_same, log_of
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.func import functional_call

import family.__main__ as family
import flux
import personalize
import predictor.__main__ as command
import sample
from flux.checkpoint import read_tensors
from flux.clip import CLIPSizes
from flux.errors import UserError
from flux.finding import find_files
from flux.hashes import fingerprint, sha256
from flux.model import Flux
from flux.sampling import flow_loss
from lora.reading import read_lora
from lora.writing import write_tensors
from metalora import collapse, inject
from people import grids
from people.dataset import Batch, BucketData
from predictor.eyes import MARGIN, Eye, SmallEye, find_eye, square_around
from predictor.model import Predictor, find_traits, load_predictor
from predictor.start import predict
from run.checkpoints import Checkpoints
from run.models import SHIPPED
from run.ranks import Ranks
from run.seeds import generator_for
from run.settings import Training
from vision.clip_vit import CLIPViT, CLIPViTSizes
from vision.detector import find_faces
from vision.inception_resnet import InceptionResnet, InceptionResnetSizes
from vision.small import IdentityNet

pytestmark = pytest.mark.filterwarnings("ignore:(T5|CLIP) sees")  # the random model reads few tokens
JUDGE = SHIPPED["tiny"] / "judges" / "identity.safetensors"
SETTINGS = ["--r1", 4, "--codes", 6, "--batch", 3, "--lr", 1e-2, "--save-every", 3, "--eye", "small"]


@pytest.fixture(scope="module")
def eye(tmp_path_factory) -> Path:
    """A small recogniser of random weights."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("eye") / "eye.safetensors"
    write_tensors(IdentityNet().state_dict(), file, {})
    return file


@pytest.fixture(scope="module")
def train(model, people, eye):
    """Call the command: train(out, flag, value, ...); returns the tensors of predictor.safetensors."""

    def call(out: Path, *flags: object, data: Path = people) -> dict[str, torch.Tensor]:
        words = ["--data", data, "--model", model, "--out", out, "--eye-weights", eye, *SETTINGS, *flags]
        command.main([str(word) for word in words])
        return read_tensors(out / "predictor.safetensors")[0]

    return call


@pytest.fixture(scope="module")
def trained(train, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("predictor")
    train(out, "--steps", 9, "--hidden", 5)
    return out / "predictor.safetensors"


# --- The map -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [0, 5])
def test_a_row_is_the_sum_that_the_docstring_says(hidden):
    torch.manual_seed(0)
    network = Predictor(width=4, codes=3, size=7, hidden=hidden).double()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter)
    network.mean.normal_()
    network.traits.normal_()
    faces = torch.randn(2, 4, dtype=torch.float64)
    for face, row in zip(faces, network(faces)):
        e = (face - network.mean) @ network.traits
        code = network.a.weight @ e
        if hidden:
            inner = network.b.weight @ e + network.b.bias
            half = 0.5 * inner * (1 + torch.erf(inner / 2**0.5))
            code = code + network.c.weight @ half + network.c.bias
        expected = network.table[0] + sum(c * line for c, line in zip(code, network.table[1:]))
        torch.testing.assert_close(row, expected)
        assert not torch.allclose(row, expected - code[0] * network.table[1])


def people_with_noise(photos: int, people: int, traits: int = 3, width: int = 6) -> tuple[Tensor, Tensor]:
    """Return embeddings, and whose each is.

    The variance between people is 9, 1 and .04 in three directions, and within one person .25 in all.
    """
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(people, width, generator=generator) * torch.tensor([3, 1, 0.2] + [0] * (width - traits))
    owners = torch.arange(people).repeat_interleave(photos)
    faces = own[owners] + 0.5 * torch.randn(len(owners), width, generator=generator)
    mixed, _ = torch.linalg.qr(torch.randn(width, width, generator=generator))
    return faces @ mixed + 5, owners


def test_traits_are_uncorrelated_and_as_large_as_they_are_the_persons():
    faces, owners = people_with_noise(photos=4, people=3000)
    e = (faces - faces.mean(dim=0)) @ find_traits(faces, owners)
    covariance = torch.cov(e.mT)
    shares = torch.tensor([9 / 9.25, 1 / 1.25, 0.04 / 0.29, 0, 0, 0])
    torch.testing.assert_close(covariance, shares.diag(), atol=0.03, rtol=0)
    mixed_up = owners[torch.randperm(len(owners), generator=torch.Generator().manual_seed(1))]
    assert ((faces - faces.mean(dim=0)) @ find_traits(faces, mixed_up)).var(dim=0).max() < 0.05


def test_what_few_photos_do_not_show_is_not_stretched():
    faces, owners = people_with_noise(photos=2, people=2)  # four points, in three of six directions
    others, _ = people_with_noise(photos=4, people=3000)
    e = (others - faces.mean(dim=0)) @ find_traits(faces, owners)
    assert e.isfinite().all() and e.var(dim=0).max() < 1000
    assert find_traits(faces, torch.arange(len(faces))).isfinite().all()  # nobody has two


def test_the_gradient_is_that_of_the_whole_graph(model):
    """`update` hands the gradient of mid and up on to the map; autograd through everything gives the same."""
    torch.manual_seed(0)
    transformer = inject(
        flux.load_transformer(model / "flux1-random.safetensors", "cpu", torch.float32), 4, 1, 3
    )
    size = transformer.factors.personal.shape[1]
    network = Predictor(width=5, codes=3, size=size, hidden=4)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    inputs = {
        "latents": torch.randn(2, 4, 8, 8),
        "noise": torch.randn(2, 4, 8, 8),
        "t": torch.tensor([0.3, 0.7]),
        "txt": torch.randn(2, 6, 32),
        "pooled": torch.randn(2, 32),
    }
    faces, slots = torch.randn(2, 5), torch.arange(2)
    learner = command.PredictorLearner(transformer, network, 10, Training())
    seen = {}
    learner.step = lambda *_: seen.update({name: p.grad.clone() for name, p in network.named_parameters()})
    batch = command.FaceBatch(inputs, slots, [], faces)
    command.update(transformer, learner, batch, 1e-3, Training())

    rows = torch.cat([network(faces), torch.zeros(1, size)])
    transformer.zero_grad()
    network.zero_grad()
    given = {**dict(transformer.named_parameters()), "factors.personal": rows}
    whole = lambda *arguments: functional_call(transformer, given, arguments)
    whole.factors, whole.velocity = transformer.factors, partial(Flux.velocity, whole)
    transformer.factors.batch_slots = slots
    flow_loss(whole, **inputs, guidance=Training().train_guidance).backward()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(seen[name], parameter.grad, rtol=1e-4, atol=1e-7)
        assert parameter.grad.abs().max() > 1e-6


def test_a_photo_is_never_seen_and_denoised_at_once():
    assert command.list_others([0, 0, 0, 1, 1, 2], [True] * 6) == [[1, 2], [0, 2], [0, 1], [4], [3], []]
    # What is not visible can be predicted, but not the other way round.
    assert command.list_others([0, 0, 1, 1], [True, False, False, False]) == [[], [0], [], []]


def test_a_batch_has_the_faces_of_other_photos():
    """Each photo's embedding here is its own number."""
    slots = [0, 0, 0, 1, 1, 2]
    data = BucketData([Path(f"{k}.png") for k in range(6)], slots, [(64, 64)] * 6, list(range(6)))
    faces = [torch.tensor([float(k)]) for k in range(6)]
    bucket = command.FacesOfBucket(data, faces, command.list_others(slots, [True] * 6))
    place = {"visit": 0, "q_bucket": 2, "bucket_step": 0, "steps_left": 2, "step": 0}
    run = SimpleNamespace(**place, generator=lambda purpose, number: generator_for(purpose, number))
    chosen = []

    def batch(data, dealt, generator, training):
        chosen.append(dealt)
        return Batch({"t": torch.zeros(len(dealt))}, None, [])

    dataset = SimpleNamespace(batch=batch, device=torch.device("cpu"))
    made = [*command.batches([0, 1, 2], lambda _: bucket, dataset, run, 3, Training())]
    assert sorted(sum(chosen, [])) == [0, 1, 2, 3, 4]  # the sixth has no other
    for dealt, one in zip(chosen, made, strict=True):
        for photo, face in zip(dealt, one.faces[:, 0].int().tolist(), strict=True):
            assert face != photo and slots[face] == slots[photo]
        assert one.t.sort().values.diff().min() > 0.05  # spread over their distribution


def test_the_sheet_shows_photos_with_a_face():
    """Of each person the first one in which the eye has found a face; nobody without any."""
    faces = SimpleNamespace(of=lambda people: people[0].faces)
    some = [SimpleNamespace(photos="abc", faces=[None, 1, 2]), SimpleNamespace(photos="d", faces=[None])]
    some += [SimpleNamespace(photos="ef", faces=[3, None])]
    seen = [(photo, face) for _, photo, face in command.Faces.seen(faces, some)]
    assert seen == [("b", 1), ("e", 3)]


def test_the_rate_rises_and_falls():
    learner = SimpleNamespace(training=Training(lr=1.0), steps=1000)
    rates = [command.PredictorLearner.rate(learner, step) for step in (0, 24, 49, 500, 750, 999)]
    assert rates == pytest.approx([0.02, 0.5, 1, 1, 0.5, 0.002])


# --- Training ----------------------------------------------------------------------------------------------


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(train, trained, tmp_path, monkeypatch):
    whole, step = read_tensors(trained)[0], command.update

    def dies(model, learner, *rest):
        if learner.optimizer.state and next(iter(learner.optimizer.state.values()))["step"] == 5:
            raise Killed
        return step(model, learner, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(command, "update", dies)
        with pytest.raises(Killed):
            train(tmp_path / "out", "--steps", 9, "--hidden", 5)
    assert Checkpoints(tmp_path / "out" / "checkpoints").load()["step"] == 3
    assert_same(train(tmp_path / "out", "--steps", 9, "--hidden", 5), whole)
    other = train(tmp_path / "other", "--steps", 9, "--hidden", 5, "--seed", 1)
    assert any(not torch.equal(tensor, whole[name]) for name, tensor in other.items())


def test_other_settings_are_refused(train, trained):
    with pytest.raises(UserError, match="other settings"):
        train(trained.parent, "--steps", 10, "--hidden", 5)


def test_a_stage_1_file_is_kept_as_it_is(train, world, tmp_path):
    found = train(tmp_path / "out", "--steps", 3, "--meta", world / "meta.safetensors")
    given = read_tensors(world / "meta.safetensors")[0]
    assert given and all(torch.equal(found[name], tensor) for name, tensor in given.items())


def test_people_with_a_single_photo_are_refused(train, people, tmp_path):
    for person in people.iterdir():
        if person.is_dir():
            (tmp_path / "ids" / person.name).mkdir(parents=True)
            shutil.copy(person / "000.png", tmp_path / "ids" / person.name)
    with pytest.raises(UserError, match="photos"):
        train(tmp_path / "out", "--steps", 3, data=tmp_path / "ids")


def test_two_ranks_learn_as_one(model):
    """Each has a part of the batch: two photos, and one. The sum of their gradients is that of all three."""
    torch.manual_seed(0)
    transformer = inject(
        flux.load_transformer(model / "flux1-random.safetensors", "cpu", torch.float32), 4, 1, 3
    )
    network = Predictor(5, 3, transformer.factors.personal.shape[1], hidden=4)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    draws = {"latents": (4, 8, 8), "noise": (4, 8, 8), "txt": (6, 32), "pooled": (32,), "faces": (5,)}
    inputs = {name: torch.randn(3, *shape) for name, shape in draws.items()}
    inputs, faces = inputs | {"t": torch.tensor([0.3, 0.5, 0.7])}, inputs.pop("faces")

    def gradients(photos: slice, ranks: object) -> tuple[list[Tensor], Tensor]:
        learner, seen = command.PredictorLearner(transformer, network, 10, Training(), ranks), []
        learner.step = lambda loss, _: seen.extend((loss.detach(), [p.grad.clone() for p in learner.trained]))
        part = {name: x[photos] for name, x in inputs.items() if name != "faces"}
        batch = command.FaceBatch(part, torch.arange(len(part["t"])), [], faces[photos])
        command.update(transformer, learner, batch, 1e-3, Training())
        for p in (learner.personal, *learner.trained):
            p.grad = None
        return seen

    loss, whole = gradients(slice(3), Ranks())
    together = SimpleNamespace(sum=lambda photos: 3)
    parts = [gradients(photos, together) for photos in (slice(2), slice(2, 3))]
    torch.testing.assert_close(sum(part[0] for part in parts), loss)
    for alone, *shares in zip(whole, *(part[1] for part in parts), strict=True):
        torch.testing.assert_close(sum(shares), alone, rtol=1e-4, atol=1e-7)
        assert not torch.allclose(shares[0], alone, rtol=1e-2)


def test_two_processes_write_one_predictor(model, people, eye, tmp_path):
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    words += ["predictor", "--data", people, "--model", model, "--out", tmp_path / "out", "--steps", 5]
    words += ["--eye-weights", eye, *SETTINGS, "--batch", 2]
    root = Path(command.__file__).parents[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run([*map(str, words)], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in log_of(tmp_path / "out")] == [1, 2, 3, 4, 5]
    assert read_tensors(tmp_path / "out" / "predictor.safetensors")[0].keys() > {"predictor.a.weight"}
    assert done.stdout.count("next, python personalize.py") == 1  # rank 0 speaks


def test_sample_grids_show_predictions(train, tmp_path, monkeypatch):
    """They change nothing in the training, and show what is predicted from the photo beside them."""
    monkeypatch.setattr(grids, "generate", partial(grids.generate, steps=2))
    seen, slots, make = [], [], grids.sample_grid

    def watched(model, choose, *rest):
        seen.append((model, choose, *rest))
        return make(model, lambda slot: slots.append(slot) or choose(slot), *rest)

    monkeypatch.setattr(command, "sample_grid", watched)
    found = train(tmp_path / "a", "--steps", 3, "--sample-every", 2)
    assert_same(found, train(tmp_path / "b", "--steps", 3, "--sample-every", 0))
    (grid,) = (tmp_path / "a" / "samples").iterdir()
    assert grid.name == "000002.png" and len(seen) == 1 and slots == [0, 1]
    width, height = Image.open(grid).size
    assert width > 5 * 192 and height > 2 * 192
    _, _, photos, *_ = seen[0]
    assert all(photo.path.parent.name == name for name, photo in photos.items()) and len(photos) == 2


# --- The file ----------------------------------------------------------------------------------------------


def test_the_file_names_factors_by_layer(trained, model):
    tensors, metadata = read_tensors(trained)
    assert metadata["eye"] == "small" and metadata["r2"] == "1"
    loaded = load_predictor(trained, flux.load_transformer(model / "flux1-random.safetensors", "meta"))
    transformer = inject(flux.load_transformer(model / "flux1-random.safetensors"), 4, 1, 7, reset=False)
    transformer.factors.personal.data.copy_(loaded.predictor.table.data)
    for layer, (_, mid, up) in transformer.factors.by_layer().items():
        assert torch.equal(mid, tensors[f"{layer}.mid"].float())
        assert torch.equal(up, tensors[f"{layer}.up"].float())
    assert up[1:].abs().max() > 0


def test_what_is_no_predictor_is_named(trained, world, other_model, tmp_path):
    empty = lambda folder: flux.load_transformer(folder / "flux1-random.safetensors", "meta")
    with pytest.raises(UserError, match="is no predictor"):
        load_predictor(world / "meta.safetensors", empty(world))
    with pytest.raises(UserError, match="does not fit this model"):
        load_predictor(trained, empty(other_model))
    tensors, metadata = read_tensors(trained)
    down = next(name for name in tensors if name.endswith(".meta_down"))
    for broken, about, message in (
        (tensors.keys() - {"predictor.mean"}, metadata, "is no predictor"),
        (tensors.keys() - {down}, metadata, f"{down} is None, must be"),
        (tensors.keys(), metadata | {"r2": "one"}, "is damaged: r1 and r2 must be numbers"),
    ):
        write_tensors({name: tensors[name] for name in broken}, tmp_path / "x.safetensors", about)
        with pytest.raises(UserError, match=message):
            load_predictor(tmp_path / "x.safetensors", empty(world))


# --- personalize.py ----------------------------------------------------------------------------------------


@pytest.fixture
def photo(people, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ref.png").write_bytes(next(people.glob("*_000/000.png")).read_bytes())
    return Path("ref.png")


@pytest.fixture
def run(model, trained, eye):
    def call(*argv: object) -> None:
        words = [
            "--model",
            model,
            "--start",
            "predicted",
            "--predictor",
            trained,
            "--eye-weights",
            eye,
            *argv,
        ]
        personalize.main([str(word) for word in words])

    return call


def test_without_steps_the_prediction_is_written(run, photo, model, trained, eye, monkeypatch):
    """No network but the eye is loaded, and the file is the prediction multiplied out."""
    load = flux.load_transformer
    with monkeypatch.context() as patch:
        patch.setattr(flux, "load_transformer", lambda path, device: load(path, {"meta": device}[device]))
        for name in ("load_conditioner", "load_autoencoder"):
            patch.delattr(personalize.flux, name)
        run(photo)
    transformer = load(model / "flux1-random.safetensors")
    written, metadata = read_lora(photo.with_suffix(".safetensors"), transformer)
    assert (metadata["start"], metadata["steps"], metadata["eye"]) == ("predicted", "0", "small")
    loaded = load_predictor(trained, load(model / "flux1-random.safetensors", "meta"))
    face = SmallEye(eye).embed(Image.open(photo))
    inject(transformer, 4, 1, 1, reset=False)
    transformer.factors.personal.data[0] = loaded.predictor(face[None])[0]
    for layer, (meta_down, _, _) in transformer.factors.by_layer().items():
        meta_down.copy_(loaded.prior.tensors[f"{layer}.meta_down"])
    for part, (a, b) in collapse(transformer).items():
        torch.testing.assert_close(written[part][0].float(), a, rtol=2e-3, atol=1e-5)
        torch.testing.assert_close(written[part][1].float(), b, rtol=2e-3, atol=1e-6)
    assert max(b.abs().max() for _, b in written.values()) > 0


def test_the_command_that_is_said_to_come_next_is_one(run, photo, model, capsys):
    run(photo, "--out", "her lora.safetensors")
    said = capsys.readouterr().out
    assert "rank 1, 0.0 MB, from 1 photo\n" in said
    words = shlex.split(said.split("next, python sample.py ")[1])
    args = sample.parse_arguments(words)
    assert (args.model, args.prompt) == (str(model), ["TEXT"])
    assert words[words.index("--lora") + 1] == "her lora.safetensors"


def test_of_several_photos_the_embeddings_are_averaged(trained, model, people, eye, monkeypatch):
    transformer = model / "flux1-random.safetensors"
    loaded = load_predictor(trained, flux.load_transformer(transformer, "meta"))
    files = sorted(next(people.glob("*_000")).glob("*.png"))[:3]
    photos, network = {file: Image.open(file) for file in files}, SmallEye(eye)
    mean = torch.stack([network.embed(photo) for photo in photos.values()]).mean(dim=0)
    first = predict(loaded, network, {files[0]: photos[files[0]]}, transformer)
    all_three = predict(loaded, network, photos, transformer)
    monkeypatch.setattr(network, "embed", lambda *_: mean)
    torch.testing.assert_close(all_three, predict(loaded, network, {files[0]: None}, transformer))
    assert not torch.allclose(all_three, first)


def test_training_begins_at_the_prediction(run, photo):
    run(photo, "--steps", 1, "--lr", 1e-9, "--no-augment", "--samples", 0, "--out", "one.safetensors")
    run(photo, "--out", "none.safetensors")
    one, none = (read_tensors(Path(f"{name}.safetensors"))[0] for name in ("one", "none"))
    for name, tensor in none.items():
        torch.testing.assert_close(one[name], tensor, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--steps", "0"], "--steps 0 belongs to --start predicted"),
        (["--predictor", "x.safetensors"], "belong to --start predicted"),
        (["--start", "predicted", "--method", "meta-lora"], "a prior of its own"),
        (["--start", "predicted", "--meta", "x.safetensors"], "a prior of its own"),
    ],
)
def test_options_that_do_not_go_together(words, message, photo, capsys):
    with pytest.raises(SystemExit):
        personalize.main([str(photo), "--model", "tiny", *words])
    assert message in capsys.readouterr().err


def test_what_does_not_fit_is_said(run, photo, model):
    with pytest.raises(UserError, match="other weights of the eye small"):
        run(photo, "--eye-weights", JUDGE)
    with pytest.raises(UserError, match="rank 1, not --rank 2"):
        run(photo, "--rank", 2)
    with pytest.raises(FileNotFoundError, match="python -m predictor"):
        personalize.main([str(photo), "--model", str(model), "--start", "predicted"])


@pytest.mark.parametrize("words", [[], ["--steps", 2, "--lr", 1e-4, "--no-augment", "--samples", 0]])
def test_a_family_is_as_alone(people, model, trained, eye, tmp_path, words):
    """Without steps byte by byte; trained from there but for the rounding of the file."""
    photos = [next(people.glob(f"*_00{k}")) / "000.png" for k in range(2)]
    options = ["--model", model, "--start", "predicted", "--predictor", trained, "--eye-weights", eye]
    options += ["--caption", "a photo", *words]
    family.main([str(word) for word in [*photos, *options, "--out", tmp_path, "--at-once", 2]])
    files = []
    for photo in photos:
        files.append(tmp_path / f"{photo.parent.name}_000.safetensors")
        alone = tmp_path / "alone.safetensors"
        personalize.main([str(word) for word in [photo, *options, "--out", alone, "--force"]])
        if words:
            (ours, about), (theirs, expected) = read_tensors(files[-1]), read_tensors(alone)
            assert about == expected
            for name, tensor in theirs.items():
                torch.testing.assert_close(ours[name], tensor, atol=1e-4, rtol=2e-3)
        else:
            assert files[-1].read_bytes() == alone.read_bytes()
    first, second = (read_tensors(file)[0] for file in files)
    assert not all(torch.equal(first[name], second[name]) for name in first)


# --- The benchmark -----------------------------------------------------------------------------------------


def test_the_benchmark_takes_predictions_and_goes_on_from_them(bench, trained, eye):
    words = ["--predictor", trained, "--eye-weights", eye, "--method", "predicted", "refined-noaug"]
    out = bench(*words, "--steps", 2)
    systems = ["predicted_r1_lr0.01_s0", "refined-noaug_r1_lr0.01_s2"]
    scores = [json.loads((out / "scores" / f"{name}.json").read_text()) for name in systems]
    assert all(len(found["pictures"]) == 12 for found in scores)
    loras = [read_tensors(out / "loras" / name / "man_001.safetensors") for name in systems]
    assert [metadata["steps"] for _, metadata in loras] == ["0", "2"]
    assert any(not torch.equal(loras[0][0][name], loras[1][0][name]) for name in loras[0][0])
    bench(*words, "--steps", 2)  # the same again finds its settings right, and everything done


def test_who_predicts_must_not_judge(bench, train, tmp_path):
    train(tmp_path / "judge", "--steps", 1, "--eye-weights", JUDGE)
    words = ["--predictor", tmp_path / "judge" / "predictor.safetensors", "--eye-weights", JUDGE]
    with pytest.raises(UserError, match="flatter it"):
        bench(*words, "--method", "predicted")


# --- Eyes --------------------------------------------------------------------------------------------------


def test_an_unknown_or_missing_eye_is_named(tmp_path):
    files = SimpleNamespace(transformer=tmp_path / "flux1.safetensors")
    with pytest.raises(UserError, match="the eye 'x' is not known, must be one of small, clip"):
        find_eye("x", None, files, torch.device("cpu"))
    with pytest.raises(FileNotFoundError, match="take --eye clip"):
        find_eye("small", None, files, torch.device("cpu"))


def test_clip_sees_a_square_around_the_face():
    photo = Image.new("RGB", (100, 60), "white")
    crop = square_around(photo, (10, 10, 30, 50))
    assert crop.size == (MARGIN * 40, MARGIN * 40)
    assert crop.getpixel((0, 30)) == (0, 0, 0) and crop.getpixel((30, 30)) == (255, 255, 255)


@pytest.mark.parametrize("name", ["clip", "recognizer"])
def test_a_real_eye_sees_the_face_and_not_the_photo(name, portraits, model, tmp_path):
    """Random weights: the embedding is the network's of the face that YuNet finds, wherever that is."""
    if name == "clip":
        text = CLIPSizes(vocab_size=60, max_length=12, hidden_size=48, num_heads=3, mlp_size=80, depth=2)
        sizes = CLIPViTSizes(text, 64, 1, 72, depth=2, patch_size=8, image_size=24, embedding_size=20)
        network = randomize(CLIPViT(sizes))
    else:
        network = randomize(InceptionResnet(InceptionResnetSizes(128))).eval()
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    files = find_files(str(model), {})
    eye = find_eye(name, tmp_path / "weights.safetensors", files, torch.device("cpu"))
    photo = Image.open(portraits[0]).convert("RGB")
    photo = photo.resize((photo.width // 4, photo.height // 4))
    box = find_faces(photo, eye.detector)[0].box
    seen = eye.find_and_embed(portraits[0], photo)
    if name == "clip":
        expected = network.embed_images([square_around(photo, box)])[0]
    else:
        expected = network.embed_faces([photo], [box])[0]
    torch.testing.assert_close(seen, expected, atol=1e-5, rtol=0)
    dark = Image.new("RGB", (2 * photo.width, photo.height))
    dark.paste(photo, (photo.width, 0))
    moved = tuple(round(side) + shift for side, shift in zip(box, (photo.width, 0) * 2))
    assert F.cosine_similarity(eye.embed(dark, moved), seen, dim=0) > 0.999
    assert (eye.embed(photo, (0, 0, *photo.size)) - seen).abs().max() > 1e-3
    assert eye.weights == (fingerprint if name == "clip" else sha256)(tmp_path / "weights.safetensors")


class Recorder(Eye):
    """An eye that needs a face, and remembers where it was."""

    name, weights = "recorder", ""

    def __init__(self, detector):
        self.detector, self.boxes = detector, []

    def embed(self, photo, face=None):
        self.boxes.append(face)
        return torch.zeros(128)


def test_the_face_is_found_or_given(trained, model, portraits, detector):
    transformer = model / "flux1-random.safetensors"
    loaded = load_predictor(trained, flux.load_transformer(transformer, "meta"))
    path, eye = portraits[0], Recorder(detector)
    photo = Image.open(path)
    predict(loaded, eye, {path: photo}, transformer)
    eye.find_and_embed(path, photo)
    assert eye.boxes == 2 * [find_faces(photo, detector)[0].box]
    second = path.with_name("second.png")
    predict(loaded, eye, {path: photo, second: photo}, transformer, {second: (10, 20, 30, 40)})
    assert eye.boxes[2:] == [eye.boxes[0], (10, 20, 30, 40)]
    assert eye.find_and_embed(path, Image.new("RGB", (200, 200))) is None
    both = Image.new("RGB", (2 * photo.width, photo.height))
    both.paste(photo), both.paste(photo, (photo.width, 0))
    with pytest.raises(UserError, match="2 faces found.*--face"):
        predict(loaded, eye, {path: both}, transformer)
    with pytest.raises(UserError, match="no face found"):
        predict(loaded, eye, {path: Image.new("RGB", (200, 200))}, transformer)
