"""Damaged and hostile files, names and arguments: an error of ours or the right result, nothing elsewhere."""

import argparse
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import unicodedata
import zlib
from io import StringIO
from pathlib import Path

import pytest
import torch
from compare import factors
from helpers import NAMES, assert_same, kill_at, log_of, pictures
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import family.__main__ as family
import flux
import metrics
import personalize
import sample
import train_meta
from flux.errors import UserError
from flux.finding import find_files, local_parts
from lora import __main__, fitting, reading, writing
from metalora import export_lora, inject, load_meta, save_meta
from metaphd import admission, benchmark, user_study
from people import crops, faces
from people.cache import TensorCache
from run.checkpoints import Checkpoints
from run.command import STOPPED, command_line, is_out_of_memory, run_script
from run.files import atomic, slug
from run.log import Log
from run.models import choose_device
from run.terminal import Shown, printable, printable_lines
from scoring import inputs, samples

pytestmark = pytest.mark.filterwarnings("ignore:(T5|CLIP) sees", "ignore:.*LoRA is zero")
OURS = (UserError, OSError)  # what `run_script` turns into a message
EVIL = "\x1b]0;title\x07\x1b[2J\r\n\x9b31m\u202e\u2028\x00../../x"
many = lambda n: settings(
    max_examples=n,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def is_plain(text: str) -> bool:
    return all(char.isprintable() or char == "\n" for char in text)


def transformer_of(model: Path) -> Path:
    return local_parts(model)["transformer"]


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def cli(main, monkeypatch, capsys, *words: object) -> tuple[str, str, object]:
    """Run a script as `python script.py word ...`; return what it printed, and its exit status or message."""
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, words)])
    before = signal.getsignal(signal.SIGTERM)
    try:
        run_script(main)
        status = 0
    except SystemExit as error:
        status = error.code or 0
    finally:
        signal.signal(signal.SIGTERM, before)
    printed = capsys.readouterr()
    return printed.out, printed.err, status


# --- The terminal ------------------------------------------------------------------------------------------


@many(200)
@given(st.text() | st.text("\x1b[A\r\nab\u202e\udcff\x00\x9b", max_size=20))
def test_what_is_printed_steers_no_terminal(text):
    for bars in (False, True):
        shown = StringIO()
        Shown(shown, bars).write("x" + text)
        assert is_plain(shown.getvalue()) and shown.getvalue()[0] == "x"
    assert is_plain(printable_lines(text)) and printable(text).isprintable()
    if text.isprintable():
        assert shown.getvalue() == "x" + text


def test_bars_are_drawn_and_ascii_terminals_are_served(tmp_path):
    shown = StringIO()
    for text in ("\r 50%", "\n\x1b[A", "\r", "\r\x1b[2Jx", "\x1b[A\x1b[2Jx"):
        Shown(shown, bars=True).write(text)
    assert shown.getvalue() == "\r 50%\n\x1b[A\r\r\\x1b[2Jx\x1b[A\\x1b[2Jx"
    with (tmp_path / "log").open("w", encoding="ascii") as file:
        print("Köln \udcff", file=Shown(file))
    assert (tmp_path / "log").read_text() == "K\\xf6ln \\udcff\n"


def test_line_ends_in_arguments_are_no_line_ends(monkeypatch, capsys, tmp_path):
    file = tmp_path / "no\nsuch\x1b[2J.safetensors"
    out, err, message = cli(__main__.main, monkeypatch, capsys, "info", file)
    assert message.endswith("no\\nsuch\\x1b[2J.safetensors: no such file") and "\n" not in message
    file.write_bytes(b"")
    message = cli(__main__.main, monkeypatch, capsys, "info", file)[2]
    assert "\n" not in message and "it has 0 bytes" in message and is_plain(message)


def test_a_hostile_lora_and_photo_end_in_print(model, monkeypatch, capsys, tmp_path):
    lora, photo = tmp_path / "a\x1b[31m\n.safetensors", tmp_path / "p\x1b[31m\n.png"
    export_lora(adapted(model), lora, {"caption": EVIL, EVIL: EVIL, "base_model": EVIL, "method": EVIL})
    out, err, status = cli(__main__.main, monkeypatch, capsys, "info", lora)
    assert status == 0 and is_plain(out) and out.count("a\\x1b[31m\\n.safetensors") == 1
    photo.write_bytes(b"\x1b[2J")
    monkeypatch.chdir(tmp_path)
    message = cli(personalize.main, monkeypatch, capsys, photo, "--model", model)[2]
    assert "p\\x1b[31m\\n.png is no photo" in message and "\n" not in message and is_plain(message)
    err = cli(personalize.main, monkeypatch, capsys, photo, "--x\x1b[31m")[1]
    assert is_plain(err) and err.count("\n") == 1


def test_the_command_that_continues_can_be_pasted():
    words = ["--out", "a b", "it's", "a\x1b[31m\nb", "\udcff", "Köln", ""]
    text = command_line("x.py", words)
    assert text.isprintable() and text.startswith("python x.py --out 'a b' ")
    shown = text.replace("python x.py", r"printf '%s\0'")
    done = subprocess.run(["bash", "-c", shown], capture_output=True, check=True)
    assert done.stdout.split(b"\0")[:-1] == [os.fsencode(word) for word in words]


def test_sigterm_ends_a_script_as_ctrl_c_does(monkeypatch, capsys, tmp_path):
    def main():
        with atomic(tmp_path / "a.txt") as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGTERM)

    assert cli(main, monkeypatch, capsys)[1:] == ("\nstopped\n", STOPPED)
    assert not list(tmp_path.iterdir())


def test_out_of_memory_is_a_message_and_a_bug_a_traceback(monkeypatch, capsys):
    def fails(error):
        raise error

    full = lambda: torch.empty(10**15)
    assert "out of memory" in cli(full, monkeypatch, capsys)[2]
    for text in ("a bug", "CUBLAS_STATUS_INVALID_VALUE", "a bug\nnot out of memory"):
        with pytest.raises(RuntimeError, match=text):
            cli(lambda: fails(RuntimeError(text)), monkeypatch, capsys)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("Tried to allocate 20.00 MiB"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ..."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    ],
)
def test_libraries_of_a_gpu_run_out_of_memory_too(error):
    assert is_out_of_memory(error) and not is_out_of_memory(OSError(str(error)))


# --- Files of tensors --------------------------------------------------------------------------------------

DTYPES = ["F16", "BF16", "I16", "F32", "F64", "F8_E4M3", "U8", "BOOL", "C64", "F4", "nonsense", 3, None]


@st.composite
def changed(draw, whole: bytes) -> bytes:
    """Draw a damaged safetensors file: its bytes, or what its header says."""
    how = draw(st.sampled_from(["flip", "cut", "insert", "length", *["header"] * 4]))
    length = int.from_bytes(whole[:8], "little")
    if how == "cut":
        return whole[: draw(st.integers(0, len(whole) - 1))]
    if how == "length":
        return (
            draw(st.sampled_from([0, 1, length - 1, length + 1, 10**8, 2**63, 2**64 - 1])).to_bytes(
                8, "little"
            )
            + whole[8:]
        )
    if how in ("flip", "insert"):
        place = draw(st.integers(0, 8 + length) | st.integers(0, len(whole) - 1))
        middle = draw(st.binary(min_size=1, max_size=4))
        return whole[:place] + middle + whole[place + (len(middle) if how == "flip" else 0) :]
    header = json.loads(whole[8 : 8 + length])
    name = draw(st.sampled_from(sorted(header.keys() - {"__metadata__"})))
    entry = header[name]
    what = draw(st.sampled_from(["dtype", "shape", "offsets", "name", "twice", "metadata", "bytes", "drop"]))
    number = st.sampled_from([-1, 0, 1, 2, 3, 2**31, 2**63, 2**64, 10**30, 1.5, None, "4"])
    if what == "dtype":
        entry["dtype"] = draw(st.sampled_from(DTYPES))
    elif what == "shape":
        shapes = [entry["shape"][::-1], [], [1, *entry["shape"]], [-1], "x", None, [[2]]]
        entry["shape"] = draw(st.sampled_from(shapes) | st.lists(number, max_size=3))
    elif what == "offsets":
        entry["data_offsets"] = draw(st.lists(number, max_size=3) | st.just("x"))
    elif what == "name":
        header[draw(st.text(max_size=8) | st.just(f"{EVIL}{name}"))] = header.pop(name)
    elif what == "metadata":
        junk = st.sampled_from(
            ["../../x", "-1", "1" * 5000, "nan", "1e999", EVIL, "[" * 10**5, '{"lora_alpha":"x"}']
        )
        key = st.sampled_from(["r1", "targets", "lora_adapter_metadata", "format", EVIL])
        header["__metadata__"] = draw(
            st.dictionaries(key, junk, max_size=3) | st.sampled_from([{}, None, [], {"a": 1}])
        )
    elif what == "drop":
        del header[name]
    text = json.dumps(header).encode()
    if what == "twice":
        text = text[:-1] + b"," + json.dumps({name: entry}).encode()[1:]
    elif what == "bytes":
        text = text.replace(b'"dtype"', draw(st.binary(min_size=1, max_size=7)), 1)
    return len(text).to_bytes(8, "little") + text + whole[8 + length :]


def adapted(model: Path):
    """Return the random model with a LoRA in it that is not zero."""
    generator = torch.Generator().manual_seed(0)
    transformer = inject(flux.load_transformer(transformer_of(model)), 4, 1, 1, "all", generator)
    for up in factors(transformer, "up"):
        up.normal_(std=0.1, generator=generator)
    return transformer


@pytest.fixture(scope="module")
def files(model, tmp_path_factory) -> dict[str, bytes]:
    """A file of each kind that we write or read, as bytes."""
    folder, transformer = tmp_path_factory.mktemp("files"), adapted(model)
    export_lora(transformer, folder / "diffusers.safetensors", {"caption": "a man"})
    export_lora(transformer, folder / "kohya.safetensors", {}, form="kohya")
    save_meta(transformer, folder / "meta.safetensors", {"r1": 4, "targets": "all"})
    return {path.stem: path.read_bytes() for path in folder.iterdir()}


@many(150)
@given(st.data())
def test_damaged_loras(model, files, tmp_path, capsys, data):
    """What is read fits the model and is finite; commands end with our errors, and write nothing else."""
    folder = tmp_path / "case"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    path, out = folder / "lora.safetensors", folder / "out.safetensors"
    path.write_bytes(content := data.draw(changed(files[data.draw(st.sampled_from(["diffusers", "kohya"]))])))
    empty = flux.load_transformer(transformer_of(model), "meta")
    try:
        lora, metadata = reading.read_lora(path, empty)
        assert lora and not fitting.misfits(lora, fitting.linear_shapes(empty))
        for pair in lora.values():
            assert all(half.isfinite().all() and half.is_floating_point() for half in pair)
        __main__.main(["info", str(path)])
        __main__.main(["convert", str(path), str(out), "--format", "diffusers"])
        again, _ = reading.read_lora(out, empty)
        for part, (a, b) in lora.items():
            assert torch.equal(again[part][0].float(), a.float()) and torch.equal(
                again[part][1].float(), b.float()
            )
    except OURS as error:
        assert not out.exists() and isinstance(error, OURS)
    assert is_plain(capsys.readouterr().out)
    assert path.read_bytes() == content and {file.name for file in folder.iterdir()} <= {path.name, out.name}


@many(100)
@given(st.data())
def test_damaged_stage_1_files(model, files, tmp_path, data):
    path = tmp_path / "meta.safetensors"
    path.write_bytes(data.draw(changed(files["meta"])))
    transformer = flux.load_transformer(transformer_of(model), "meta")
    try:
        prior = personalize.find_prior(transformer_of(model), path)
        personalize.add_adapters(transformer, prior, 1, "all", [0])
    except OURS:
        return
    assert prior.r1 == 4 and all(tensor.isfinite().all() for tensor in prior.tensors.values())


@pytest.mark.parametrize("r1", ["../../x", "4.0", "nan", "-4", "0", "9" * 5000, " 4", "٤", "4\n", EVIL])
def test_stage_1_metadata(model, tmp_path, r1):
    save_file(
        {"double_blocks.0.img_mod.lin.meta_down": torch.ones(1, 4, 32)},
        tmp_path / "m",
        {"r1": r1, "targets": "all"},
    )
    with pytest.raises(ValueError) as error:
        load_meta(tmp_path / "m")
    assert is_plain(str(error.value)) and len(str(error.value)) < 1000
    save_file(
        {"double_blocks.0.img_mod.lin.meta_down": torch.ones(1, 4, 32)},
        tmp_path / "m",
        {"r1": "4", "targets": r1},
    )
    with pytest.raises(ValueError, match="must be one of all"):
        load_meta(tmp_path / "m")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_stage_1_numbers(model, files, tmp_path, value):
    (path := tmp_path / "meta.safetensors").write_bytes(files["meta"])
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    next(iter(tensors.values()))[0, 0, 0] = value
    save_file(tensors, path, {"r1": "4", "targets": "all"})
    with pytest.raises(ValueError, match="(?s)is damaged:.*finite"):
        load_meta(path)


@many(120)
@given(st.data())
def test_damaged_weights(model, tmp_path, data):
    """Any file of a model's folder, looked at as every script does before its work begins."""
    folder = tmp_path / "model"
    if not folder.exists():
        shutil.copytree(model, folder)
    names = sorted(str(path.relative_to(model)) for path in model.rglob("*") if path.is_file())
    name = data.draw(st.sampled_from(names))
    whole = (model / name).read_bytes()
    if name.endswith(".safetensors"):
        content = data.draw(changed(whole))
    else:
        place, junk = data.draw(st.integers(0, len(whole))), data.draw(st.binary(max_size=3))
        content = data.draw(
            st.sampled_from([whole[:place], whole[:place] + junk + whole[place + 1 :], junk, b"[]", b"{}"])
        )
    (folder / name).write_bytes(content)
    try:
        files = find_files(str(folder), {})
        flux.loading.native_size(files.folder)
        flux.load_transformer(files.transformer)
        flux.load_conditioner(files)
        flux.load_autoencoder(files.autoencoder)
    except OURS:
        pass
    finally:
        (folder / name).write_bytes(whole)
    assert contents(folder).keys() == contents(model).keys()


# --- A run whose files are damaged -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def halted(train, tmp_path_factory) -> tuple[Path, dict]:
    """A run that died in its 19th step, and the end of one that went on undisturbed to step 21."""
    folder = tmp_path_factory.mktemp("halted")
    with pytest.MonkeyPatch.context() as patch:
        kill_at(train, folder / "dead", patch, 19, "--save-every", 5, steps=21)
    return folder / "dead", train(folder / "whole", "--save-every", 5, steps=21)


@many(20)
@given(st.data())
def test_whatever_is_damaged_the_run_ends_right_or_with_our_error(train, halted, tmp_path, data):
    """Of an entry of the cache, also on the second try."""
    dead, expected = halted
    out = tmp_path / "out"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(dead, out)
    files = sorted((path for path in dead.rglob("*") if path.is_file()), key=lambda path: path.name)
    kinds = {f"{path.parent.relative_to(dead)} {path.suffix}": path for path in files if path.stat().st_size}
    path = out / kinds[data.draw(st.sampled_from(sorted(kinds)))].relative_to(dead)
    whole = path.read_bytes()
    place, junk = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.binary(min_size=1, max_size=5))
    how = data.draw(st.sampled_from(["flip", "cut", "fill", "insert", "other", "gone"]))
    flipped = bytes([whole[place] ^ 1 << data.draw(st.integers(0, 7))])
    damaged = {
        "flip": whole[:place] + flipped + whole[place + 1 :],
        "cut": whole[:place],
        "fill": whole[:place] + junk + whole[place + len(junk) :],
        "insert": whole[:place] + junk + whole[place:],
        "other": junk,
        "gone": None,
    }[how]
    path.unlink() if damaged is None else path.write_bytes(damaged)
    for _ in range(2):
        try:
            found = train(out, "--save-every", 5, steps=21)
        except OURS:
            assert path.parent.name != "cache" or _ == 0
            continue
        assert_same(found, expected)
        assert [line["step"] for line in log_of(out)][-1] == 21
        assert len({line["step"] for line in log_of(out)}) == len(log_of(out)) <= 21
        break
    assert {file.name for file in tmp_path.iterdir()} == {"out"}


def test_a_damaged_entry_of_the_cache_is_made_anew(tmp_path):
    cache = TensorCache(tmp_path)
    cache.put("a", {"mean": torch.arange(50.0), "std": torch.ones(2, 3)})
    file = tmp_path / "a.safetensors"
    whole = file.read_bytes()
    for place, bit in itertools.product(range(len(whole)), (0, 7)):
        content = bytearray(whole)
        content[place] ^= 1 << bit
        file.write_bytes(content)
        assert cache.get("a") is None and "a" not in cache
    file.write_bytes(whole)
    assert "a" in cache and torch.equal(cache.get("a")["mean"], torch.arange(50.0))
    save_file({"mean": torch.ones(2)}, file)  # as a version before wrote it
    assert "a" not in cache and cache.get("a") is None


def test_lines_of_the_log_that_cannot_be_read(tmp_path):
    file, line = tmp_path / "log.jsonl", lambda step: json.dumps({"step": step, "loss": 1.0}).encode() + b"\n"
    file.write_bytes(line(1) + line(2)[:-1] + line(3) + b"[1]\n" + line(4) + line(5) + line(6)[:-1])
    with Log(file, 4, steps=9):
        pass
    assert file.read_bytes() == line(1) + line(4)


@pytest.mark.parametrize("content", ["[]", "3", '"x"', "[" * 10**5, "null", "[[1, 2]]", "\xff"])
def test_settings_of_another_kind(train, tmp_path, content):
    Checkpoints(tmp_path / "checkpoints").save(1, {})
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(ValueError, match="settings"):
        train(tmp_path, steps=1)


# --- Reading nothing twice, and nothing of other settings --------------------------------------------------


def test_nothing_is_read_again_and_the_cache_of_other_settings_is_not_used(
    train, people, other_model, tmp_path, monkeypatch
):
    opened, put, begun = [], [], Image.open
    monkeypatch.setattr(Image, "open", lambda file, *a, **k: opened.append(file.name) or begun(file, *a, **k))
    store = TensorCache.put
    monkeypatch.setattr(
        TensorCache, "put", lambda self, key, value: put.append(key) or store(self, key, value)
    )
    once = train(tmp_path / "out", steps=2, encodes=True)
    assert len(set(opened)) == 20 and len(put) == len(set(put)) > 20
    first = set(put)
    opened.clear(), put.clear()
    shutil.rmtree(tmp_path / "out" / "checkpoints")
    assert_same(train(tmp_path / "out", steps=2), once)
    assert not opened and not put

    for flags, parts in (
        (["--resolution", 24], "latents"),
        (["--dtype", "bf16"], "both"),
        (["--t5-length", 9], "prompts"),
        (["--class", "robot"], "prompts"),
    ):
        shutil.rmtree(tmp_path / "out" / "checkpoints")
        put.clear()
        ours = train(tmp_path / "out", *flags, steps=2)
        assert put and not set(put) & first, flags
        kinds = {"mean" in load_file(tmp_path / "out" / "cache" / f"{key}.safetensors") for key in put}
        assert kinds == {"latents": {True}, "prompts": {False}, "both": {True, False}}[parts], flags
        assert_same(ours, train(tmp_path / f"fresh {flags[1]}", *flags, steps=2))
        with pytest.raises(ValueError, match="other settings"):
            train(tmp_path / "out", steps=2)
    # Another model's autoencoder and text encoders, the same number of bytes and names.
    model = tmp_path / "model"
    shutil.copytree(other_model, model)
    for part in ("ae.safetensors", "text_encoder/model.safetensors"):
        tensors = {name: tensor * 1.5 for name, tensor in load_file(model / part).items()}
        save_file(tensors, model / part)
    shutil.rmtree(tmp_path / "out" / "checkpoints")
    put.clear()
    train(tmp_path / "out", "--model", model, steps=2)
    assert len(put) >= 20 and not set(put) & first


# --- Names -------------------------------------------------------------------------------------------------


def test_people_of_any_name_stay_in_their_folder(train, people, tmp_path, monkeypatch, capsys):
    (ids := tmp_path / "ids").mkdir()
    (tmp_path / "outside").write_text("mine")
    for name, folder in zip(
        NAMES, itertools.cycle(sorted(path for path in people.iterdir() if path.is_dir()))
    ):
        shutil.copytree(folder, ids / name)
        for k, photo in enumerate(sorted((ids / name).glob("*.png"))):  # no two people alike
            with Image.open(photo) as image:
                image.putpixel((0, 0), (zlib.crc32(os.fsencode(name)) % 256, k, 7))
                image.save(photo)
    photo = sorted((ids / NAMES[-2]).glob("*.png"))[0]
    photo.with_suffix(".txt").write_text(f"$(touch {tmp_path}/pwned) `touch pwned`; {EVIL}")
    photo.rename(photo.with_name("$(touch pwned)\x1b[31m.png"))
    before = contents(ids)
    monkeypatch.chdir(tmp_path)
    train(Path("out"), "--sample-every", 1, "--bucket-ids", 20, data=ids, steps=1)
    printed = capsys.readouterr()
    assert is_plain(printed.out) and contents(ids) == before
    assert {path.name for path in tmp_path.iterdir()} == {"ids", "out", "outside"}
    monkeypatch.setattr(train_meta, "flow_loss", lambda *a, **k: flux.sampling.flow_loss(*a, **k) * torch.nan)
    before = {path.name for path in tmp_path.iterdir()}
    train(Path("out"), "--sample-every", 1, "--bucket-ids", 20, data=ids, steps=2)
    err = capsys.readouterr().err
    assert "is skipped" in err and is_plain(re.sub(r"\r|\x1b\[A", "", err))
    assert {path.name for path in tmp_path.iterdir()} == before


@many(200)
@given(st.text(max_size=60))
def test_pictures_are_called_after_prompts_safely(text):
    name = slug(text)
    assert len(name.encode()) <= 80 and name.isprintable() and Path(f"{name}_").name == f"{name}_"
    assert all(char == "-" or unicodedata.category(char)[0] in "LMN" for char in name)


@many(60)
@given(st.text(max_size=80))
def test_any_caption_can_be_encoded(model, text):
    """As `read_caption` returns it: whatever UTF-8 there is."""
    tokenizers = flux.load_tokenizers(model)
    text = text.encode("utf-8", "replace").decode()
    for tokenizer in (tokenizers.clip, tokenizers.t5):
        assert tokenizer([text]).shape == (1, tokenizer.length)


@pytest.mark.parametrize("name", ["\x1b[31m", "line\nbreak", "\udcff", "a\u2028b", "tab\t"])
def test_the_benchmark_asks_to_rename(bench, people, tmp_path, name):
    shutil.copytree(people, tmp_path / "odd")
    next(path for path in (tmp_path / "odd").iterdir() if path.is_dir()).rename(
        tmp_path / "odd" / f"man_{name}"
    )
    with pytest.raises(ValueError, match="these names have control characters, rename them") as error:
        bench("--people", tmp_path / "odd")
    assert is_plain(str(error.value))


@pytest.mark.parametrize("kind", ["../../../x", "/tmp/x", "a/b", "..", "", "a\x00", "\x1b[31m", "a\n"])
def test_classes_name_no_other_folder(bench, people, tmp_path, kind):
    name = sorted(path.name for path in people.iterdir() if path.is_dir())[0]
    (tmp_path / "classes.json").write_text(json.dumps({name: kind}))
    if not kind:  # as if none were given
        assert inputs.class_of("anna", {"anna": ""}) == "person"
        return
    with pytest.raises(ValueError, match="--classes: .* must be a word"):
        bench("--classes", tmp_path / "classes.json")
    assert not (tmp_path / "out" / "pictures").exists()


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}",
        '{"systems": []}',
        '{"systems": {"a": 1}}',
        '{"systems": {"a": {"method": "x"}}}',
        "[" * 10**5,
    ]
    + [
        json.dumps({"systems": {"x": {"method": method, "rank": rank, "lr": 0.1, "steps": steps}}})
        for method, rank, steps in (
            ("../../x", 1, 1),
            ("lora", "../x", 1),
            ("lora", 1, -1),
            ("lora", 1, None),
        )
    ],
)
def test_damaged_settings_of_a_benchmark(bench, tmp_path, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "settings.json").write_text(content)
    with pytest.raises(ValueError, match="settings.json is damaged"):
        bench()


@pytest.mark.parametrize(
    "box", ["[]", '"abcd"', "[1, 2]", '[1, 2, 3, "4"]', "{}", "[NaN, 1, 2, 3]", "[9, 9, 1, 1]"]
)
def test_boxes_of_faces(people, tmp_path, box):
    shutil.copy(next(people.glob("*/000.png")), tmp_path / "a.png")
    for content in (f'{{"a.png": {box}}}', "[]", "[" * 10**5, "\xff"):
        (tmp_path / "faces.json").write_text(content, "latin-1")
        with pytest.raises(UserError):
            crops.crop_boxes((64, 64), faces.known_face(tmp_path / "a.png"))


# --- Stopped while writing ---------------------------------------------------------------------------------


class Interrupts:
    """In place of os.fsync, which `atomic` calls before it renames: Ctrl-C at the given time it is called."""

    def __init__(self, at: int):
        self.left = at

    def __call__(self, *_):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


@pytest.fixture
def scripts(model, people, files, tmp_path) -> dict:
    """Scripts that write, with what they are given; each writes into the current folder alone."""
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    for name in ("kohya", "meta"):
        (inputs / f"{name}.safetensors").write_bytes(files[name])
    photo, transformer = next(people.glob("*/000.png")), transformer_of(model)
    own = ["--model", model, "--steps", 1, "--face", "20,16,44,48", "--samples", 1]
    lora = inputs / "kohya.safetensors"
    return {
        "personalize": (personalize.main, [photo, *own, "--meta", inputs / "meta.safetensors"]),
        "sample": (
            sample.main,
            ["--model", model, "--prompt", "a", "b", "--steps", 1, "--size", 32, "--out", "out"],
        ),
        "convert": (__main__.main, ["convert", lora, "x.safetensors", "--format", "diffusers"]),
        "merge": (__main__.main, ["merge", transformer, "flux1-x.safetensors", "--lora", lora]),
    }


@pytest.mark.parametrize("name", ["personalize", "sample", "convert", "merge"])
def test_ctrl_c_while_writing_leaves_whole_files_only(scripts, name, tmp_path, monkeypatch):
    main, words = scripts[name]
    (work := tmp_path / "work").mkdir()
    monkeypatch.chdir(work)
    main([*map(str, words)])
    whole = {path: len(content) for path, content in contents(work).items()}
    for at in range(len(whole)):
        shutil.rmtree(work / "out", ignore_errors=True)
        for path in list(work.glob("*.*")):
            path.unlink()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "fsync", Interrupts(at))
            main([*map(str, words)])
        left = contents(work)
        assert (
            len(left) == at
            and {path: len(content) for path, content in left.items()}.items() <= whole.items()
        )
    shutil.rmtree(work / "out", ignore_errors=True)  # pictures would be added to those that are there
    for path in list(work.glob("*.safetensors")):
        path.unlink()
    main([*map(str, words)])
    assert contents(work).keys() == whole.keys()


def test_a_benchmark_that_is_stopped_says_how_to_go_on(bench, tmp_path, monkeypatch, capsys):
    """Nothing half is left; strays of a killed one are nothing."""
    whole = pictures(bench(out="whole"))
    for at in (0, 7, 30):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", Interrupts(at))
            bench()
        text = capsys.readouterr().out
        assert (
            "stopped; this goes on:\n  python -m metaphd run --model" in text
            and f"--out {tmp_path / 'out'}" in text
        )
        assert [path.name for path in (tmp_path / "out").rglob(".*")] == [".lock"]
    for folder in [path for path in (tmp_path / "out").rglob("*") if path.is_dir()]:
        for path in list(folder.iterdir()):
            if path.is_file():  # what SIGKILL leaves of a file of another process
                path.with_name(f".{path.stem}.99{path.suffix}").write_bytes(path.read_bytes()[:50])
    strays = {str(path) for path in (tmp_path / "out").rglob(".*")}
    assert len(strays) > 20
    out = bench()
    assert strays == {str(path) for path in out.rglob(".*")}
    for path in map(Path, strays):
        path.unlink()
    assert pictures(out).keys() == whole.keys()
    made = samples.scan_samples(out / "pictures" / "lora-noaug_r1_lr0.01_s1")
    assert len(made) == 12 and (out / "report.html").stat().st_size > 10_000


def test_what_safetensors_makes_of_a_full_disk_is_an_error_of_ours(files, tmp_path, monkeypatch, capsys):
    def fails(*_, **__):
        raise SafetensorError("No space left on device")

    (tmp_path / "a.safetensors").write_bytes(files["kohya"])
    words = [
        "convert",
        tmp_path / "a.safetensors",
        tmp_path / "new" / "b.safetensors",
        "--format",
        "diffusers",
    ]
    with monkeypatch.context() as patch:
        patch.setattr(writing, "save_file", fails)
        assert "b.safetensors: No space left" in cli(__main__.main, monkeypatch, capsys, *words)[2]
    assert not list((tmp_path / "new").iterdir())
    assert cli(__main__.main, monkeypatch, capsys, *words)[2] == 0


def test_strays_in_a_folder_of_weights_are_not_weights(model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    for path in [path for path in (tmp_path / "model").rglob("*.safetensors")]:
        path.with_name(f".{path.stem}.99{path.suffix}").write_bytes(b"half")
    files = find_files(str(tmp_path / "model"), {})
    flux.load_conditioner(files)
    paths = files.transformer, files.autoencoder, files.tokenizers, *files.encoders.values()
    assert not any(path.name.startswith(".") for path in paths)
    shards = tmp_path / "model" / "transformer"
    shards.mkdir()
    files.transformer.rename(shards / "a.safetensors")
    (shards / ".a.99.safetensors").write_bytes(b"half")
    flux.load_transformer(shards)


# --- Arguments ---------------------------------------------------------------------------------------------

PARSERS = {
    "train": (train_meta.parse_arguments, ["--data", "ids"]),
    "personalize": (personalize.parse_arguments, ["ref.png"]),
    "family": (family.parse_arguments, ["ref.png"]),
    "sample": (sample.parse_arguments, ["--prompt", "a"]),
    "benchmark": (benchmark.parse_arguments, ["--people", "ids"]),
    "metrics": (metrics.parse_arguments, ["report", "--images", "a", "--people", "ids"]),
    "metaphd": (admission.parse_arguments, ["ids"]),
    "study": (user_study.parse_arguments, ["make", "--systems", "a=b", "--people", "ids", "--prompts", "x"]),
}
NONSENSE = ["0", "-1", "nan", "inf", "-inf", "1e999", "", "x", "1" * 5000, "٣x", "\x1b[2J", "a\nb", "\udcff"]


@pytest.mark.parametrize("script", PARSERS)
def test_nonsense_is_taken_as_it_stands_or_refused_in_one_line(script, capsys):
    """Every option that takes a number: no traceback, nothing but a number within the limits."""
    parse, words = PARSERS[script]
    with pytest.raises(SystemExit):
        parse(["--help"] if script != "study" else ["make", "--help"])
    options = set(re.findall(r"(--[a-z0-9-]+) (?!FILE|DIR|NAME|PATH)[A-Z]", capsys.readouterr().out))
    assert len(options) >= (2 if script in ("metrics", "metaphd") else 3)
    refused = 0
    for option, value in itertools.product(sorted(options), NONSENSE):
        try:
            args = parse([*words, f"{option}={value}"])
        except SystemExit as error:
            text = capsys.readouterr().err
            refused += 1
            assert error.code == 2 and text.count("error:") == 1 and len(text) < 1000
            assert text.count("\n") == 1
            continue
        found = vars(args).get(option[2:].replace("-", "_"))
        for number in found if isinstance(found, list) else [found]:
            assert not isinstance(number, float) or abs(number) < float("inf")
    assert refused > 2 * len(options) or script in ("metrics", "study")


@pytest.mark.parametrize(
    "script, flags, message",
    [
        ("train", ["--r1", "0"], "--r1 0: must be at least 1"),
        ("train", ["--lr", "0"], "--lr 0.0: must be above 0"),
        ("train", ["--lr", "nan"], "argument --lr: 'nan' is not a finite number"),
        ("train", ["--seed", "-1"], "--seed -1: must be at least 0"),
        ("train", ["--out", ""], "argument --out: '' is empty, must be a path"),
        ("train", ["--step", "3"], "unrecognized arguments: --step 3"),
        ("train", ["--class", "\udcff"], "is not UTF-8 text"),
        ("personalize", ["--face", "1,2,3,inf"], "'1,2,3,inf' is not four numbers"),
        ("personalize", ["--samples", "7"], "--samples 7: must be at least 0 and at most 6"),
        ("benchmark", ["--ranks", "1", "0"], "--ranks 0: must be at least 1"),
        ("benchmark", ["--lr", "1", "-1"], "--lr -1.0: must be above 0"),
        ("metaphd", ["--max-yaw", "91"], "--max-yaw 91.0: must be at least 0 and at most 90"),
    ],
)
def test_the_message_names_what_was_found_and_what_is_accepted(script, flags, message, capsys):
    parse, words = PARSERS[script]
    with pytest.raises(SystemExit):
        parse([*words, *flags])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[", "{}", "[1]", "[" * 10**5, '{"study": 1}'])
def test_a_damaged_key_of_a_study(tmp_path, content):
    (tmp_path / "key.json").write_text(content)
    with pytest.raises(ValueError, match="key.json"):
        user_study.main(["tally", "answers.json", "--study", str(tmp_path)])


@pytest.mark.parametrize("device", ["foo", "cuda:77", "meta", "cpu:", "\x1b"])
def test_devices(device):
    with pytest.raises(ValueError, match="(?s)--device .*this machine has"):
        choose_device(argparse.Namespace(device=device, dtype=None))
