"""Log-probs without logits: equal to the full computation, in values, gradients and errors."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_prefix_patch.head import linear_logps
from hf_prefix_patch.measuring import TensorMemory

C, H, V = 7, 16, 97
OPTIONS = {
    "plain": {},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 3.0},
    "both": {"scale": -1.5, "softcap": 2.0},
}


def full_logps(hidden, weight, bias, target, *, scale=1.0, softcap=None):
    """As models compute them: logits in their dtype, the softmax in fp32."""
    logits = F.linear(hidden, weight, bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.log_softmax(-1).gather(1, target[:, None])[:, 0]


def inputs(*, tokens=C, hidden=H, vocab=V, dtype=torch.float32, spread=1.0, seed=0):
    """Hidden states, weight, bias and targets. The bias grows, so maxima do from chunk to chunk."""
    torch.manual_seed(seed)
    weight = torch.randn(vocab, hidden) / hidden**0.5
    bias = torch.linspace(-3, 3, vocab)
    state = spread * torch.randn(tokens, hidden)
    target = torch.randint(vocab, (tokens,))
    return state.to(dtype), weight.to(dtype), bias.to(dtype), target


def run(call, tensors, target, grad=None, trained=(True, True, True)):
    """Log-probs, and the gradients of hidden states, weight and bias."""
    tensors = [
        None if x is None else x.detach().requires_grad_(wanted)
        for x, wanted in zip(tensors, trained, strict=True)
    ]
    logps = call(*tensors, target)
    if grad is None:
        grad = torch.linspace(-1, 2, len(target), device=target.device)
    logps.backward(grad.to(logps.dtype))
    return logps.detach(), *(None if x is None else x.grad for x in tensors)


class Calls(TorchDispatchMode):
    """Operators called, dtypes of matrix products, elements of the largest tensor made."""

    def __init__(self):
        super().__init__()
        self.names, self.largest, self.product_dtypes = [], 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        given, made = (
            {
                x.untyped_storage()._cdata: x.numel()
                for x in tree_leaves(values)
                if torch.is_tensor(x)
            }
            for values in ((args, kwargs), output)
        )
        self.largest = max([self.largest, *(made[key] for key in made.keys() - given)])
        if self.names[-1] == "mm":
            self.product_dtypes |= {x.dtype for x in args}
        return output

    @property
    def products(self):
        return self.names.count("mm")


# Equal to full logits


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("chunk_size", [1, 16, V, 1000, None])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_full_logits(options, chunk_size, with_bias):
    hidden, weight, bias, target = inputs(spread=3)
    tensors = hidden, weight, bias if with_bias else None
    want = run(lambda *x: full_logps(*x, **options), tensors, target)
    got = run(lambda *x: linear_logps(*x, **options, chunk_size=chunk_size), tensors, target)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("trained", torch.cartesian_prod(*[torch.tensor([0, 1])] * 3).tolist()[1:])
def test_gradients_of_what_is_trained(trained):
    hidden, weight, bias, target = inputs()
    trained = [bool(x) for x in trained]
    options = {"scale": 0.5, "softcap": 4.0}
    tensors = hidden, weight, bias
    want = run(lambda *x: full_logps(*x, **options), tensors, target, trained=trained)
    got = run(lambda *x: linear_logps(*x, **options), tensors, target, trained=trained)
    for ours, theirs, wanted in zip(got, want, [True, *trained], strict=True):
        assert (ours is not None) == wanted
        if wanted:
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradients_by_finite_differences(options):
    hidden, weight, bias, target = inputs(tokens=3, hidden=4, vocab=11, dtype=torch.float64)

    def logps(*tensors):
        return linear_logps(*tensors, target, **options, chunk_size=4)

    assert logps(hidden, weight, bias).dtype == torch.float64
    assert torch.autograd.gradcheck(logps, [x.requires_grad_() for x in (hidden, weight, bias)])


def test_every_target():
    """The first and the last of every chunk too."""
    _, weight, bias, _ = inputs()
    hidden, target = torch.randn(V, H), torch.arange(V)
    want = run(full_logps, (hidden, weight, bias), target)
    got = run(lambda *x: linear_logps(*x, chunk_size=10), (hidden, weight, bias), target)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_any_layout():
    hidden, weight, bias, target = inputs()
    strided = hidden.t().contiguous().t(), weight.t().contiguous().t(), bias.repeat(2, 1).t()[:, 0]
    part = torch.cat([weight, weight])[V:]
    want = run(full_logps, (hidden, weight, bias), target)
    for tensors in (strided, (hidden, part, bias)):
        targets = torch.stack([target, target], dim=1)[:, 0]
        got = run(lambda *x: linear_logps(*x, chunk_size=16), tensors, targets)
        for ours, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_no_tokens():
    hidden, weight, bias, target = inputs(tokens=0)
    logps, *gradients = run(linear_logps, (hidden, weight, bias), target)
    assert logps.shape == (0,)
    for x, gradient in zip((hidden, weight, bias), gradients, strict=True):
        torch.testing.assert_close(gradient, torch.zeros_like(x))


def test_tokens_that_cannot_be():
    """A vocabulary padded with rows of bias -inf, at both ends."""
    hidden, weight, bias, target = inputs()
    bias[:20] = bias[-20:] = -torch.inf
    target = target.clamp(20, V - 21)
    want = run(full_logps, (hidden, weight, bias), target)
    got = run(lambda *x: linear_logps(*x, chunk_size=10), (hidden, weight, bias), target)
    assert all(x.isfinite().all() for x in want)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("vocab", [1, 40])
def test_targets_that_are_certain(vocab):
    """Of a vocabulary of one, or of one whose other tokens cannot be."""
    hidden, weight, bias, target = inputs(vocab=vocab)
    target = torch.full_like(target, vocab - 1)
    bias[:-1] = -torch.inf
    got = run(lambda *x: linear_logps(*x, chunk_size=10), (hidden, weight, bias), target)
    for x in got:
        torch.testing.assert_close(x, torch.zeros_like(x))


# The compiler raises warnings that it hides itself, and stops at them where they are errors.
@pytest.mark.filterwarnings("ignore")
def test_inside_a_compiled_region():
    """Around it there are graphs, of three operators here; its own loops are not unrolled."""
    hidden, weight, bias, target = inputs()

    def step(call, hidden, weight, bias, target):
        return 2 * call(hidden + 1, weight, bias, target, scale=0.5).exp()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter)
    want = run(lambda *x: step(full_logps, *x), (hidden, weight, bias), target)
    got = run(lambda *x: compiled(linear_logps, *x), (hidden, weight, bias), target)
    assert counter.op_count == 3
    torch._dynamo.reset()
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)


# Rounding


def errors(got, truth, *, by_token):
    """Error of each result over its own size; that of hidden states token by token."""
    for name, x, true in zip(("logps", "hidden", "weight"), got, truth, strict=False):
        rows = x.double().reshape(len(x), -1) if by_token and name == "hidden" else x[None].double()
        of = true.double().reshape(rows.shape)
        yield name, ((rows - of).norm(dim=1) / of.norm(dim=1)).max().item()


def assert_rounds_as_well(ours, theirs, truth, **kind):
    for (name, error), (_, allowed) in zip(
        errors(ours, truth, **kind), errors(theirs, truth, **kind), strict=True
    ):
        assert error <= 2 * allowed, name


HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("spread", [0.1, 1.0, 6.0])
def test_half_precision_rounds_as_full_logits(dtype, options, spread):
    sizes = {"tokens": 48, "hidden": 64, "vocab": 2000}
    hidden, weight, _, target = inputs(**sizes, dtype=dtype, spread=spread)
    tensors = hidden, weight, None
    truth = run(
        lambda *x: full_logps(*x, **options), (hidden.double(), weight.double(), None), target
    )
    theirs = run(lambda *x: full_logps(*x, **options), tensors, target)
    ours = run(lambda *x: linear_logps(*x, **options, chunk_size=128), tensors, target)
    assert ours[0].dtype == torch.float32
    assert [x.dtype for x in ours[1:3]] == [dtype, dtype]
    assert_rounds_as_well(ours, theirs, truth, by_token=False)


def likely_tokens(dtype):
    """Inputs whose targets have probabilities of 1 less 1e-2 to 1e-7, and that rest `[C]`."""
    torch.manual_seed(1)
    weight, target = torch.randn(500, 64) / 8, torch.arange(40)
    hidden = F.normalize(weight[target]) * torch.linspace(15, 21, 40)[:, None]
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    rest = -full_logps(hidden.double(), weight.double(), None, target).expm1()
    assert 1e-7 < rest.min() < 1e-6 < 5e-3 < rest.max() < 1e-2
    return hidden, weight, target, rest


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_likely_tokens_round_as_full_logits(dtype):
    """Token by token, with a gradient scaled as a loss in fp16 is."""
    hidden, weight, target, _ = likely_tokens(dtype)
    tensors, grad = (hidden, weight, None), torch.full((40,), 2.0**12)
    truth = run(full_logps, (hidden.double(), weight.double(), None), target, grad)
    theirs = run(full_logps, tensors, target, grad)
    ours = run(lambda *x: linear_logps(*x, chunk_size=128), tensors, target, grad)
    assert_rounds_as_well(ours, theirs, truth, by_token=True)


# Not bf16, as products on a CPU are rounded to it.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_likely_tokens_keep_their_digits(dtype):
    """Full logits lose them beside p = 1, in fp32 too."""
    hidden, weight, target, rest = likely_tokens(dtype)
    truth = run(full_logps, (hidden.double(), weight.double(), None), target, 1 / rest)
    ours = run(
        lambda *x: linear_logps(*x, chunk_size=128), (hidden, weight, None), target, 1 / rest
    )
    torch.testing.assert_close((ours[0] / rest).float(), (truth[0] / rest).float())
    torch.testing.assert_close(ours[1], truth[1].to(hidden.dtype))


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("dtype", "of_products"), [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)]
)
def test_autocast(hidden_dtype, dtype, of_products):
    """In its dtype, in backward too, and gradients in those of the inputs."""
    hidden, weight, bias, target = inputs(tokens=48, hidden=64, vocab=500)
    tensors = hidden.to(hidden_dtype), weight, bias
    truth = run(full_logps, [x.double() for x in tensors], target)
    with torch.autocast("cpu", dtype):
        theirs = run(full_logps, tensors, target)
        with Calls() as calls:
            ours = run(lambda *x: linear_logps(*x, chunk_size=128), tensors, target)
    assert calls.product_dtypes == {of_products}
    assert ours[0].dtype == torch.float32
    assert [x.dtype for x in ours[1:]] == [x.dtype for x in tensors]
    assert_rounds_as_well(ours, theirs, truth, by_token=False)


def test_autocast_leaves_fp64_as_it_is():
    hidden, weight, bias, target = inputs(dtype=torch.float64)
    want = run(full_logps, (hidden, weight, bias), target)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(linear_logps, (hidden, weight, bias), target)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)


# Memory and work


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_memory_is_that_of_a_chunk(dtype, trained, softcap):
    tokens, hidden, vocab, chunk = 64, 48, 4096, 128
    state, weight, _, target = inputs(tokens=tokens, hidden=hidden, vocab=vocab, dtype=dtype)

    def step():
        run(
            lambda *x: linear_logps(*x, softcap=softcap, chunk_size=chunk),
            (state, weight, None),
            target,
            trained=(True, trained, False),
        )

    step()
    with TensorMemory() as memory:
        step()
    of_weight = trained * weight.numel() * weight.element_size()
    cells = 4 * (tokens * chunk + chunk * hidden + tokens * hidden)
    assert memory.peak < of_weight + 2 * cells
    with Calls() as calls:
        step()
    assert calls.largest <= max(tokens * chunk, trained * weight.numel())
    assert calls.largest < tokens * vocab


@pytest.mark.parametrize(
    ("tokens", "hidden", "rows"), [(4096, 4, 1024), (4, 4096, 1024), (2**14, 4, 512)]
)
def test_the_chunk_is_chosen_by_the_size_of_what_it_makes(tokens, hidden, rows):
    """16 MiB of fp32 for many tokens as for long hidden states, but never too narrow."""
    state, weight, _, target = inputs(tokens=tokens, hidden=hidden, vocab=4 * rows + 1)
    with Calls() as calls, torch.no_grad():
        linear_logps(state, weight, None, target)
    assert calls.products == 5
    assert calls.largest == tokens * rows


def test_a_frozen_head_costs_two_products_and_its_backward_none():
    hidden, weight, _, target = inputs()
    with Calls() as forward:
        logps = linear_logps(hidden.requires_grad_(), weight, None, target, chunk_size=20)
    with Calls() as backward:
        logps.sum().backward()
    assert (forward.products, backward.products) == (2 * 5, 0)


@pytest.mark.parametrize("grad", [False, True])
def test_a_reference_costs_one_product(grad):
    """Under no_grad, and of hidden states that want no gradient."""
    hidden, weight, _, target = inputs()
    with Calls() as calls, torch.set_grad_enabled(grad):
        linear_logps(hidden.requires_grad_(not grad), weight, None, target, chunk_size=20)
    assert calls.products == 5


# Refusals


def test_it_is_differentiable_once():
    hidden, weight, _, target = inputs()
    logps = linear_logps(hidden.requires_grad_(), weight, None, target)
    with pytest.raises(RuntimeError, match="differentiated once, but got create_graph=True"):
        torch.autograd.grad(logps.sum(), hidden, create_graph=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.zeros(2, 3, H)}, r"hidden \[2, 3, 16\] .* needs \[C, H\] and \[V, H\]"),
        ({"weight": torch.zeros(V, H + 1)}, r"weight \[97, 17\], but needs \[C, H\] and \[V, H\]"),
        ({"weight": torch.zeros(H)}, r"weight \[16\], but needs"),
        ({"bias": torch.zeros(V + 1)}, r"bias has shape \[98\], but needs \[V\] = \[97\]"),
        ({"target": torch.zeros(C + 1, dtype=torch.int64)}, r"target is \[8\] of torch.int64"),
        ({"target": torch.zeros(C, dtype=torch.int32)}, r"torch.int32, but needs \[C\] = \[7\]"),
        (
            {"target": torch.tensor([0] * 6 + [V])},
            "ids from 0 to 97, but the vocabulary is 0 to 96",
        ),
        ({"target": torch.tensor([0] * 6 + [-100])}, r"ids from -100 .* drop ignored tokens"),
        ({"weight": torch.zeros(V, H, device="meta")}, r"on \['cpu', 'meta'\], but must be on one"),
        ({"weight": torch.zeros(V, H).bfloat16()}, "must have one; cast the hidden states"),
        (
            {"bias": torch.zeros(V).double()},
            r"'torch.float32', 'torch.float64'\], but must have one",
        ),
        ({"hidden": torch.zeros(C, H).long()}, "torch.int64.* must be floating"),
        ({"softcap": 0.0}, "softcap is 0.0, but must be positive"),
        ({"chunk_size": 0}, "chunk_size is 0, but must be 1 or more"),
    ],
)
def test_bad_inputs(changes, message):
    good = dict(zip(("hidden", "weight", "bias", "target"), inputs(), strict=True))
    with pytest.raises(ValueError, match=message):
        linear_logps(**good | changes)


# CUDA


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_cuda(dtype, options):
    """As well rounded as full logits, without waiting for the device."""
    hidden, weight, _, target = inputs(tokens=200, hidden=64, vocab=5000, dtype=dtype)
    hidden, weight, target = (x.cuda() for x in (hidden, weight, target))
    truth = run(
        lambda *x: full_logps(*x, **options), (hidden.double(), weight.double(), None), target
    )
    theirs = run(lambda *x: full_logps(*x, **options), (hidden, weight, None), target)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours = run(
            lambda *x: linear_logps(*x, **options, chunk_size=700), (hidden, weight, None), target
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_rounds_as_well(ours, theirs, truth, by_token=False)
