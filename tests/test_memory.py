"""Memory against nothing done: the same numbers however weights are kept; copies and pages as promised.

Tests that take a `kind` run over FLUX.1 and FLUX.2.
"""

import gc
import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from compare import factors, randomize
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from flux import T5, pages
from flux.flux2 import Flux2, Flux2Sizes
from flux.loading import load_transformer
from flux.memory import arrange, blocks_of, checkpoint_blocks, compile_blocks, release
from flux.model import Flux, FluxSizes
from flux.streaming import FrozenLinear, Stream, quantize_rows, spread
from flux.t5 import T5Sizes
from metalora import _AdaptedLinear, eject, inject, use_slots

SHARED = {
    "in_channels": 16,
    "out_channels": 16,
    "txt_size": 40,
    "hidden_size": 64,
    "num_heads": 2,
    "depth": 2,
    "depth_single": 3,
    "guidance": True,
}
SIZES = {
    Flux: FluxSizes(**SHARED, pooled_size=20, mlp_size=128, axes=(4, 14, 14), theta=10_000),
    Flux2: Flux2Sizes(**SHARED, mlp_size=192, axes=(8, 8, 8, 8), theta=2000),
}
BLOCKS = SHARED["depth"] + SHARED["depth_single"]
Kind = type[Flux | Flux2]


@pytest.fixture(scope="module", params=list(SIZES), ids=["flux1", "flux2"])
def kind(request) -> Kind:
    return request.param


def arranged(model: nn.Module, checkpoint="none", stream=0, fp8=False, copy=True) -> nn.Module:
    """Arrange a model; copy: stream as if the CPU were a GPU, instead of walking the memory map."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stream, "COPY", copy)
        return arrange(model, "cpu", checkpoint, stream, fp8)


def adapted(kind: Kind) -> nn.Module:
    """Return a model whose adapters of two identities are at work."""
    model = inject(randomize(kind(SIZES[kind])), r1=6, r2=2, slots=3)
    generator = torch.Generator().manual_seed(2)
    for factor in factors(model, "meta_down", "mid", "up"):
        factor.copy_(torch.randn(factor.shape, generator=generator) / 8)
    use_slots(model, torch.tensor([2, 0]))
    return model


def inputs(kind: Kind, batch: int = 2, tokens: int = 15, txt: int = 7, seed: int = 1) -> dict[str, Tensor]:
    generator, sizes = torch.Generator().manual_seed(seed), SIZES[kind]
    draw = lambda *shape: torch.randn(shape, generator=generator)
    ids = torch.randint(9, (batch, txt + tokens, len(sizes.axes)), generator=generator)
    given = {"img": draw(batch, tokens, sizes.in_channels), "txt": draw(batch, txt, sizes.txt_size)}
    given |= {"txt_ids": ids[:, :txt], "img_ids": ids[:, txt:]}
    given |= {"t": torch.tensor([0.7373, 0.11])[:batch], "guidance": torch.full((batch,), 3.5)}
    return given | ({"pooled": draw(batch, sizes.pooled_size)} if kind is Flux else {})


def step(model: nn.Module, seed: int = 1) -> dict[str, Tensor]:
    """Return the output without gradients, the loss, and the gradients of all factors."""
    given = inputs(type(model), seed=seed)
    with torch.inference_mode():
        result = {"sampled": model(**given)}
    loss = (model(**given) - given["img"]).square().mean()
    loss.backward()
    for number, factor in enumerate(model.factors.parameters()):
        result[f"gradient {number}"], factor.grad = factor.grad, None
    return result | {"loss": loss.detach()}


def error(given: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest difference of two steps, relative to the largest value of each tensor."""
    assert given.keys() == expected.keys()
    return max(
        ((given[name] - value).abs().max() / value.abs().max()).item() for name, value in expected.items()
    )


@pytest.fixture(scope="module")
def plain(kind) -> dict[str, Tensor]:
    return step(adapted(kind))


@pytest.mark.parametrize("checkpoint", ["none", "all", "attention", 2])
@pytest.mark.parametrize("stream, copy", [(0, True), (BLOCKS, True), (BLOCKS, False), (3, True), (1, True)])
def test_every_arrangement_gives_the_same_numbers(kind, plain, checkpoint, stream, copy):
    model = arranged(adapted(kind), checkpoint, stream, copy=copy)
    assert error(step(model), plain) <= 1e-6
    step(model, seed=5)
    assert error(step(model), plain) <= 1e-6  # whatever blocks the buffers hold at the start


def test_the_factors_matter(kind, plain):
    """What the comparison above must notice: another loss, and a gradient that a factor alone can change."""
    model = adapted(kind)
    model.factors.by_layer()["single_blocks.2.linear2"][2][0, 3, 1] += 1e-3
    assert error(step(model), plain) > 1e-6


def forget_the_direction(stream: Stream):
    bring = stream._bring
    stream._bring = lambda number, beside: bring(0, beside) if beside is not None else bring(number, beside)


def trust_the_buffers(stream: Stream):
    stream.use = lambda number: number % 2


@pytest.mark.parametrize("broken, wrong", [(forget_the_direction, False), (trust_the_buffers, True)])
def test_only_what_is_used_must_be_right(kind, plain, broken, wrong):
    """What is brought ahead is a matter of speed; what a buffer holds when it is read is not."""
    model = arranged(adapted(kind), "all", BLOCKS)
    broken(model.single_blocks[0].linear1.base.stream)
    assert (not error(step(model), plain) <= 1e-6) == wrong  # what was never copied may be anything, even NaN


def test_two_losses_may_be_summed_before_backward(kind):
    """The second forward pass leaves other blocks in the buffers than the first one's backward pass needs."""

    def gradient(model: nn.Module) -> Tensor:
        given = inputs(kind, batch=1)
        use_slots(model, 0)
        call = lambda k: model(**given | {"img": k * given["img"]}).square().sum()
        (call(1) + call(2)).backward()
        return model.factors.personal.grad

    expected = gradient(adapted(kind))
    for checkpoint in ("all", "none"):
        given = gradient(arranged(adapted(kind), checkpoint, BLOCKS))
        assert torch.allclose(given, expected, rtol=1e-5, atol=1e-6 * expected.abs().max())


def copies(model: nn.Module, monkeypatch, run) -> list[int]:
    """Return which blocks are copied while `run` runs."""
    stream, copied = blocks_of(model)[0].get_submodule("img_attn.qkv.base").stream, []
    bring = Stream._bring

    def watched(self, number, beside):
        copied.extend([number] * (number not in self.held_blocks))
        bring(self, number, beside)

    monkeypatch.setattr(Stream, "_bring", watched)
    run()
    assert stream.held_blocks.count(None) == 0
    return copied


def test_recomputation_and_backward_share_a_copy(kind, monkeypatch):
    model = arranged(adapted(kind), "all", BLOCKS)
    step(model)
    # Sampling starts with 0 and 1 there and goes round; then forward, and back without the two at the turn.
    expected = [2, 3, 4, 0, 1, 2, 3, 4, 2, 1, 0]
    assert copies(model, monkeypatch, lambda: step(model)) == expected


def stream_of(model: nn.Module) -> Stream:
    (stream,) = {layer.stream for layer in model.modules() if isinstance(layer, FrozenLinear)}
    return stream


def test_buffers_are_two_of_the_largest_block(kind):
    stream = stream_of(arranged(adapted(kind), "all", 3))
    double = sum(p.numel() for p in kind(SIZES[kind]).double_blocks[0].parameters() if p.dim() == 2)
    assert sum(buffer.nbytes for buffer in stream.buffers) == 2 * 4 * double


def copied_bytes(monkeypatch, run) -> list[int]:
    """Return the bytes of every copy between tensors while `run` runs."""
    sizes, copy = [], Tensor.copy_
    with monkeypatch.context() as patch:
        patch.setattr(
            Tensor, "copy_", lambda self, *args, **kw: sizes.append(self.nbytes) or copy(self, *args, **kw)
        )
        run()
    return sizes


@pytest.mark.parametrize("fp8", [False, True])
def test_a_block_lies_in_a_slab_of_its_own_size_and_is_one_copy(kind, monkeypatch, fp8):
    expected = arranged(adapted(kind), fp8=fp8)
    stream = stream_of(model := arranged(adapted(kind), stream=BLOCKS, fp8=fp8))
    for slab, block, plain in zip(stream.slabs, blocks_of(model), blocks_of(expected), strict=True):
        layers = [layer for layer in block.modules() if isinstance(layer, FrozenLinear)]
        whole = [layer for layer in plain.modules() if isinstance(layer, nn.Linear | FrozenLinear)]
        sizes = [-(-layer.stored.nbytes // 256) * 256 for layer in layers]
        starts = [layer.stored.data_ptr() - slab.data_ptr() for layer in layers]
        assert slab.nbytes == sum(sizes) and starts == [sum(sizes[:k]) for k in range(len(sizes))]
        assert slab.data_ptr() % 4096 == 0
        for layer, other in zip(layers, whole, strict=True):
            assert torch.equal(layer.stored.float(), (other.stored if fp8 else other.weight).float())
    order = [0, 1, 4, 2]
    assert copied_bytes(monkeypatch, lambda: [stream._bring(k, beside=None) for k in order]) == [
        stream.sizes[k] for k in order
    ]


@pytest.mark.parametrize("slabs", [0, 2])
def test_without_room_for_slabs_a_block_is_gathered_for_each_use(kind, plain, monkeypatch, slabs):
    first = sum(
        layer.weight.nbytes for layer in adapted(kind).double_blocks[0].modules() if hasattr(layer, "bias")
    )
    monkeypatch.setattr("flux.streaming.available_memory", lambda: (slabs + 0.1) * first / 0.7)
    stream = stream_of(model := arranged(adapted(kind), "all", BLOCKS))
    assert [slab is not None for slab in stream.slabs] == [k < slabs for k in range(BLOCKS)]
    for _ in range(2):
        assert error(step(model), plain) <= 1e-6
    layers = len(stream.blocks[4])
    stream._bring(0, beside=None)
    sizes = copied_bytes(monkeypatch, lambda: stream._bring(4, beside=None))
    assert len(sizes) == layers + 1 and sizes[-1] == stream.sizes[4]


class FakeCuda:
    """What `Stream` asks of CUDA, on the CPU: logs the calls, and refuses to pin more slabs than `pins`."""

    def __init__(self, monkeypatch, pins: int):
        self.device = torch.device("cpu")
        self.log, self.pins, self.pinned, self.refused = [], pins, {}, 0
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self)

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if len(self.pinned) == self.pins:
            self.refused += 1
            return 2  # cudaErrorMemoryAllocation
        self.pinned[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        assert self.log[-1] == "synchronize"
        del self.pinned[address]
        return 0

    def record_event(self) -> "FakeCuda":
        return self

    def wait_event(self, event) -> None:
        self.log.append("wait")

    def wait_stream(self, stream) -> None:
        self.log.append("wait for all")

    def synchronize(self) -> None:
        self.log.append("synchronize")


@pytest.fixture
def fake_cuda(monkeypatch):
    yield partial(FakeCuda, monkeypatch)
    gc.collect()  # unpins while the stand-in is there


def streamed_to(fake: FakeCuda, kind: Kind) -> tuple[nn.Module, Stream]:
    """Return a model streamed as to a GPU whose memory is the CPU's."""
    stream = stream_of(model := arranged(adapted(kind), "all", BLOCKS))
    stream.copy_stream = fake
    stream._fill_slabs()
    return model, stream


def test_slabs_are_pinned_as_long_as_the_stream_is_there(kind, plain, fake_cuda):
    model, stream = streamed_to(fake := fake_cuda(pins=99), kind)
    assert fake.pinned == {slab.data_ptr(): size for slab, size in zip(stream.slabs, stream.sizes)}
    assert error(step(model), plain) <= 1e-6 and "synchronize" not in fake.log
    assert fake.log.count("wait for all") > BLOCKS  # before each copy, since the buffer may still be read
    del model, stream
    gc.collect()
    assert not fake.pinned


@pytest.mark.parametrize("pins", [0, 2])
def test_what_cannot_be_pinned_is_said_once_and_streamed_all_the_same(kind, plain, fake_cuda, pins):
    with pytest.warns(UserWarning, match="find no room in pinned memory") as warned:
        model, stream = streamed_to(fake := fake_cuda(pins), kind)
    assert len(warned) == 1 and [slab is not None for slab in stream.slabs] == [True] * pins + [False] * (
        5 - pins
    )
    assert fake.refused == 1 + 2  # a block's, and those of the two buffers
    for _ in range(2):
        assert error(step(model), plain) <= 1e-6
    assert fake.log.count("synchronize") > 3  # a slab is filled again only after its last copy


def test_a_refusal_is_not_left_to_the_next_kernel(monkeypatch, fake_cuda):
    fake_cuda(pins=0)
    raised = []

    def ones(*_, **__):
        raised.append(0)
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "ones", ones)
    assert not pages.pin(pages.host_slab(100), torch.device("cpu")) and raised


def saved(model: nn.Module) -> tuple[int, set[tuple[int, ...]]]:
    """Return what a forward pass keeps for backward, in bytes and as shapes, parameters left out."""
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    given = inputs(type(model), tokens=400)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**given)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()), {
        tuple(tensor.shape) for tensor in kept.values()
    }


def weights(kind: Kind) -> set[tuple[int, ...]]:
    """Return the shapes of the blocks' weights, also transposed."""
    parameters = (p for block in blocks_of(kind(SIZES[kind])) for p in block.parameters() if p.dim() == 2)
    return {shape for p in parameters for shape in (tuple(p.shape), tuple(p.shape)[::-1])}


@pytest.mark.parametrize("options", [{"fp8": True}, {"stream": BLOCKS, "copy": True}])
def test_no_copy_of_a_weight_is_kept_for_backward(kind, options):
    model = arranged(adapted(kind), **options)
    assert not saved(model)[1] & weights(kind)


def test_the_test_above_would_see_a_kept_copy(kind, monkeypatch):
    def kept(x, base, down, up):
        h = nn.functional.linear(x.flatten(0, 1), base.weight, base.bias).unflatten(0, x.shape[:2])
        return torch.baddbmm(h, x @ down.mT, up)

    monkeypatch.setattr(_AdaptedLinear, "apply", kept)
    model = arranged(adapted(kind), fp8=True)
    assert saved(model)[1] & weights(kind)


def test_checkpointing_keeps_less(kind):
    sizes = {}
    for what in ("none", "all", "attention", 3):
        sizes[what] = saved(arranged(adapted(kind), what))[0]
    # Checkpoints hold tensors outside of the hooks, so only what is not checkpointed shows here.
    assert sizes["all"] < 0.1 * sizes["none"] and sizes["all"] < sizes[3] < sizes["none"]


def count_calls(model: nn.Module, monkeypatch, name: str) -> int:
    calls, original = [], getattr(nn.functional, name)
    monkeypatch.setattr(nn.functional, name, lambda *args, **kw: calls.append(0) or original(*args, **kw))
    step(model)
    monkeypatch.undo()
    return len(calls)


@pytest.mark.parametrize("what, again", [("none", 0), ("all", BLOCKS), (2, 2), ("attention", BLOCKS)])
def test_blocks_are_recomputed_as_asked(kind, what, again, monkeypatch):
    model = arranged(adapted(kind), "all")
    checkpoint_blocks(model, what)  # replaces
    calls = count_calls(model, monkeypatch, "scaled_dot_product_attention")
    assert calls == 2 * BLOCKS + again


@pytest.mark.parametrize("what, computed", [("none", BLOCKS), ("all", 2 * BLOCKS), ("attention", BLOCKS)])
def test_kept_attention_is_not_computed_again(kind, what, computed):
    """The calls above are answered from what was kept: the kernel itself runs no second time.

    Without gradients the operation has another name.
    """
    ran = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            ran.append(op.name())
            return op(*args, **kwargs or {})

    model = arranged(adapted(kind), what)
    with Watch():
        step(model)
    assert sum(name.endswith("flash_attention_for_cpu") for name in ran) == computed


@pytest.mark.parametrize("what", [6, -1, "some"])
def test_wrong_choices_are_refused(kind, what):
    with pytest.raises(ValueError, match=f"checkpoint {what}: .*from 0 to 5"):
        checkpoint_blocks(adapted(kind), what)
    with pytest.raises(ValueError, match="stream 6: from 0 to 5"):
        arranged(adapted(kind), stream=6)


def test_streamed_blocks_are_spread():
    assert spread(1, 5) == [2] and spread(2, 8) == [2, 6] and spread(5, 5) == [0, 1, 2, 3, 4]
    assert all(len(set(spread(count, 57))) == count for count in range(1, 58))


def test_adapters_come_and_go(kind):
    """A benchmark puts new adapters into the same streamed model for every person."""
    model = arranged(eject(adapted(kind)), "all", BLOCKS)
    again = inject(model, r1=6, r2=2, slots=3)
    for own, other in zip(again.factors.parameters(), adapted(kind).factors.parameters(), strict=True):
        own.data = other.data
    use_slots(again, torch.tensor([2, 0]))
    assert error(step(again), step(adapted(kind))) <= 1e-6


def test_any_model_of_blocks_can_be_streamed():
    """T5-XXL, 9 GiB in bfloat16, on a card of 8."""
    t5 = randomize(T5(T5Sizes(vocab_size=90, hidden_size=32, head_dim=16, num_heads=2, mlp_size=64, depth=3)))
    tokens = torch.arange(20).view(2, 10)
    with torch.inference_mode():
        expected = t5(tokens)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Stream, "COPY", True)
            Stream(t5.requires_grad_(False).encoder.block, "cpu")
        assert torch.equal(t5(tokens), expected)
        assert torch.equal(t5(tokens), expected)


# --- Compiled ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "checkpoint, fp8, backend",
    [
        ("none", False, "aot_eager"),
        (2, False, "aot_eager"),
        ("all", True, "aot_eager"),
        ("all", False, "inductor"),
    ],
)
def test_compiled_blocks_give_the_same_numbers(kind, checkpoint, fp8, backend, monkeypatch):
    """And a shape, or an identity, that was seen before compiles nothing."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    expected, model = (arranged(adapted(kind), checkpoint, fp8=fp8) for _ in range(2))
    names = [name for name, _ in model.named_parameters()]
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    compile_blocks(model)
    assert names == [name for name, _ in model.named_parameters()]
    counts = []
    for slots in ([2, 0], [1, 1]):
        for changed in (model, expected):
            use_slots(changed, torch.tensor(slots))
        assert error(step(model), step(expected)) < 1e-5
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[0] == counts[1] > 0


@pytest.mark.slow
@pytest.mark.parametrize("dynamic, shapes, graphs", [(None, 6, 2), (False, 3, 3)])
def test_six_shapes_need_two_graphs(kind, dynamic, shapes, graphs, monkeypatch):
    """For each kind of block: one of the first shape, and one of any number of tokens."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = kind(replace(SIZES[kind], depth=1, depth_single=1))
    # Graphs are counted as they are traced; what a backend makes of them does not matter.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager", dynamic=dynamic))
    compile_blocks(model)
    for tokens in (15, 16, 14, 10, 4, 24)[:shapes]:
        model(**inputs(kind, batch=1, tokens=tokens)).sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2 * graphs


def test_some_blocks_are_not_compiled(kind):
    with pytest.raises(ValueError, match="streamed blocks cannot be compiled"):
        compile_blocks(arranged(adapted(kind), stream=2))
    with pytest.raises(ValueError, match="keep their attention cannot be compiled"):
        compile_blocks(arranged(adapted(kind), "attention"))


# --- 8 bits ------------------------------------------------------------------------------------------------


def round_to_e4m3(x: Tensor) -> Tensor:
    """Round to the nearest finite float8_e4m3fn value; all are listed from the format's definition."""
    positive = [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
    positive = positive[:-1] + [m / 8 * 2.0**-6 for m in range(8)]  # the last would be NaN; then subnormals
    values = torch.tensor(sorted({*positive, *(-value for value in positive)}))
    assert values.max() == 448
    right = torch.searchsorted(values, x.contiguous()).clamp(1, len(values) - 1)
    below, above = values[right - 1], values[right]
    return torch.where(x - below < above - x, below, above)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_is_not_worse_than_rounding_rows_to_nearest(dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 512, generator=generator) * torch.logspace(-6, 2, 64)[:, None]
    weight[3] = 0
    weight[5, 1] *= 50  # an outlier
    weight = weight.to(dtype)
    stored, scale = quantize_rows(weight)
    assert stored.dtype == torch.float8_e4m3fn and scale.dtype == dtype and scale.shape == (64, 1)
    exact = weight.float()
    steps = (exact.abs().amax(1, keepdim=True) / 448).clamp(min=1e-30)
    best = (round_to_e4m3(exact / steps) * steps - exact).norm(dim=1)
    ours = (stored.float() * scale.float() - exact).norm(dim=1)
    assert (ours <= 1.03 * best + 1e-30).all() and ours.sum() <= 1.002 * best.sum()
    # Without a scale per row, or rounded towards zero, it would not pass.
    coarse = (exact / steps.max()).to(torch.float8_e4m3fn).float() * steps.max()
    assert ((coarse - exact).norm(dim=1) > 1.1 * best).float().mean() > 0.4


def test_fp8_error_of_gaussian_weights_is_as_stated():
    weight = torch.randn(256, 3072, generator=torch.Generator().manual_seed(0)).bfloat16()
    stored, scale = quantize_rows(weight)
    error = (stored.to(scale.dtype) * scale - weight).float()
    assert 0.024 < error.norm() / weight.float().norm() < 0.028
    top = weight.float().abs().amax(1, keepdim=True)
    assert (error.abs() <= (weight.float().abs() * 0.07).maximum(top * 2.0**-18.5)).all()


@pytest.mark.parametrize("options", [{}, {"stream": BLOCKS, "copy": True}, {"stream": 2, "copy": False}])
@pytest.mark.parametrize("checkpoint", ["none", "all"])
def test_fp8_computes_with_the_rounded_weights(kind, options, checkpoint):
    expected = adapted(kind)
    for name, layer in expected.named_modules():
        if isinstance(layer, nn.Linear) and "blocks" in name:
            stored, scale = quantize_rows(layer.weight.data)
            layer.weight.data = stored.float() * scale
    model = arranged(adapted(kind), checkpoint, fp8=True, **options)
    assert error(step(model), step(expected)) <= 3e-6  # the outputs are scaled, not the weights
    assert error(step(model), step(adapted(kind))) > 1e-3


@pytest.mark.parametrize(
    "tokens, scaled", [(1, "outputs"), (383, "outputs"), (384, "weights"), (500, "weights")]
)
def test_the_scale_of_8_bits_is_applied_to_what_has_fewer_numbers(tokens, scaled):
    """In bfloat16 both ways are as near to the exact product, far nearer than the rounding to 8 bits."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator).bfloat16()
    whole, bias, x, grad = draw(256, 384) / 20, draw(256) / 20, draw(tokens, 384), draw(tokens, 256)
    layer = FrozenLinear(*(rounded := quantize_rows(whole))[:1], nn.Parameter(bias, False), rounded[1])
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            place = {"aten::mul.Tensor": 0, "aten::mul_.Tensor": 0, "aten::addcmul.out": 1}.get(op.name())
            sizes.extend([] if place is None else [args[place].shape])
            return op(*args, **kwargs or {})

    with Watch():
        y = layer(x.requires_grad_())
        y.backward(grad)
    assert sizes == [(256, 384) if scaled == "weights" else (tokens, 256)] * 2
    exact = rounded[0].double() * rounded[1].double()
    distance = lambda a, b: ((a.double() - b).norm() / b.norm()).item()
    assert distance(y, x.double() @ exact.T + bias.double()) < 3.5e-3
    assert distance(x.grad, grad.double() @ exact) < 3.5e-3
    assert distance(x.double() @ whole.double().T, x.double() @ exact.T) > 2e-2


def test_merging_into_rounded_weights_is_refused(kind):
    model = arranged(eject(adapted(kind)), fp8=True)
    layer = model.single_blocks[0].linear1
    with pytest.raises(KeyError):
        layer.weight = nn.Parameter(layer.weight)


# --- What the host has --------------------------------------------------------------------------------------


def write_files(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


MEMINFO = {"proc/meminfo": "MemTotal:       9000 kB\nMemAvailable:   8000 kB\n"}
STAT = "anon 500\nfile 900000\nshmem 700000\nactive_file 50000\ninactive_file 150000\n"
TOTALS = "cache 1\nactive_file 1\ninactive_file 2\ntotal_active_file 50000\ntotal_inactive_file 150000\n"


def group(folder: str, most: str, used: int = 600_000, version: int = 2) -> dict[str, str]:
    names = (
        ("memory.max", "memory.current")
        if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    )
    numbers = f"{most}\n", f"{used}\n", STAT if version == 2 else TOTALS
    return {f"sys/fs/cgroup/{folder}/{name}": text for name, text in zip((*names, "memory.stat"), numbers)}


V2, V1 = {"proc/self/cgroup": "0::/a/b\n"}, {"proc/self/cgroup": "5:cpu:/x\n4:hugetlb,memory:/a/b\n0::/\n"}


@pytest.mark.parametrize(
    "files, expected",
    [
        ({}, 0),
        (MEMINFO, 8_192_000),
        (MEMINFO | {"proc/self/cgroup": "0::/\n"}, 8_192_000),
        (MEMINFO | V2 | group("a/b", "max"), 8_192_000),
        (MEMINFO | V2 | group("a/b", "1000000"), 600_000),
        (MEMINFO | V2 | group("a/b", "max") | group("a", "1100000"), 700_000),  # of the group around it
        (MEMINFO | V2 | group("", "1000000", 900_000), 300_000),  # a container that sees only its own group
        (MEMINFO | V2 | group("a/b", "1000000", 1_300_000), 0),
        (MEMINFO | V2 | group("a/b", "100000000"), 8_192_000),
        (MEMINFO | V1 | group("memory/a/b", "1000000", version=1), 600_000),
        (MEMINFO | V1 | group("memory", "1000000", version=1), 600_000),
        (MEMINFO | V1 | group("memory/a/b", f"{2**63 - 4096}", version=1), 8_192_000),
    ],
)
def test_available_memory_is_that_of_the_container(tmp_path, files, expected):
    assert pages.available_memory(write_files(tmp_path, files)) == expected


def test_the_peak_is_counted_anew_once_a_model_has_left(monkeypatch):
    calls = []
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *device, name=name: calls.append((name, *device)))
    release("cpu")
    assert not calls
    release("cuda:1")
    assert calls == [("empty_cache",), ("reset_peak_memory_stats", "cuda:1")]


# --- The memory map ----------------------------------------------------------------------------------------


def resident(tensor: Tensor) -> float:
    """Return the share of a tensor's pages that are in this process's memory."""
    page, total = 4096, 0
    first, last = tensor.data_ptr() // page + 1, (tensor.data_ptr() + tensor.nbytes) // page
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(first * 8)
        entries = torch.frombuffer(bytearray(file.read((last - first) * 8)), dtype=torch.int64)
    total = (entries < 0).sum().item()  # the topmost bit says that a page is there
    return total / (last - first)


@pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="needs Linux")
def test_pages_are_dropped_behind(kind, tmp_path, plain):
    model = randomize(kind(SIZES[kind]))
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / "f.safetensors"
    )
    mapped = load_transformer(tmp_path / "f.safetensors", "cpu", torch.float32)
    anonymous = blocks_of(mapped)[0].img_mlp[0]
    anonymous.weight.data = anonymous.weight.data.clone()  # no file's: must never be dropped
    before = anonymous.weight.data.clone()
    inject(mapped, r1=6, r2=2, slots=3)
    for own, other in zip(mapped.factors.parameters(), adapted(kind).factors.parameters(), strict=True):
        own.data = other.data.clone()
    use_slots(mapped, torch.tensor([2, 0]))
    arranged(mapped, "all", BLOCKS, copy=False)
    assert error(step(mapped), plain) <= 1e-6
    shares = [resident(layer.base.stored) for layer in mapped.modules() if hasattr(layer, "base")]
    now = mapped.double_blocks[0].img_mlp.get_submodule("0").base
    assert torch.equal(now.stored, before)
    assert sum(share > 0 for share in shares) <= 11  # the ten layers of the first block, and nothing behind
    assert math.isclose(resident(now.stored), 1)
