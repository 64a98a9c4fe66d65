"""Every backend on a CUDA device: kernels, models and a trainer against the unpatched model."""

import importlib.util

import pytest
import torch
from accelerate.utils import send_to_device
from batches import LayerTokens, boundaries, pad_rows, run
from composites import image_batch, tiny_composite
from families import NO_SDPA, set_checkpointing, tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_prefix_patch import (
    DataCollatorWithPrefixSharing,
    PrefixTree,
    attention,
    completion_logps,
    enable_prefix_sharing,
    kernel_check,
    selection,
)
from hf_prefix_patch.backends.base import Needs
from hf_prefix_patch.commands.verify import random_pairs
from hf_prefix_patch.comparison import compare_sharing
from hf_prefix_patch.packed import LOSS_INPUTS
from hf_prefix_patch.reference import duplicated_rows_attention

pytestmark = [
    pytest.mark.gpu,
    # Compilers and kernel loaders warn of their own affairs.
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(autouse=True)
def _compile_anew():
    """Kinds of attention beyond the compiler's limit would run unfused, without a word."""
    torch.compiler.reset()


HALF = [torch.bfloat16, torch.float16]
SIZES = [64, 80, 96, 128, 256]


def flash_implementation():
    """What a model can be loaded with here, if anything."""
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    if is_flash_attn_2_available():
        return "flash_attention_2"
    return "flash_attention_3" if is_flash_attn_3_available() else None


def skip_unless_served(name, **asked):
    """Skip with the reason of the backend itself; what auto picks must never be skipped."""
    needs = Needs(
        **(
            {
                "device": torch.device("cuda", 0),
                "dtype": torch.bfloat16,
                "implementation": "sdpa",
                "head_dims": frozenset({64}),
                "windows": frozenset({None}),
                "features": frozenset(),
            }
            | asked
        )
    )
    reason = selection.unserved(attention.BACKENDS[name], needs)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    return needs


def ragged_rows(seed=0):
    """Three prompts, the first with four responses; `[8, L]` rows of up to 400 tokens."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n):
        return torch.randint(3, 50, (n,), generator=generator).tolist()

    rows, lengths = [], []
    for prompt_length, responses in ((200, (90, 17, 64, 130)), (150, (3, 40)), (64, (200, 128))):
        prompt = draw(prompt_length)
        rows += [prompt + draw(n) for n in responses]
        lengths += [prompt_length] * len(responses)
    return pad_rows(rows, lengths, "right")


def on_cuda(batch):
    return type(batch)(*(x.cuda() for x in vars(batch).values()))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("name", ["torch_varlen", "flash", "flex", "sdpa"])
def test_attention_is_no_worse_than_on_rows(name, size, window, dtype):
    """Output, dq, dk and dv: error to fp64 at most twice that of a fused kernel on the rows."""
    implementation = flash_implementation() if name == "flash" else "sdpa"
    needs = skip_unless_served(
        name,
        dtype=dtype,
        implementation=implementation or "sdpa",
        head_dims=frozenset({size}),
        windows=frozenset({window}),
        features=frozenset({"window"} if window else ()),
    )
    backend = attention.BACKENDS[name]
    batch = ragged_rows()
    tree = PrefixTree.from_rows(batch.input_ids, batch.attention_mask).to("cuda")
    generator = torch.Generator().manual_seed(0)
    draws = [
        torch.randn(1, heads, tree.packed_tokens, size, generator=generator) for heads in (6, 2, 2)
    ]
    direction = torch.randn(1, tree.packed_tokens, 6, size, generator=generator).cuda()
    inputs = [x.cuda().to(dtype).requires_grad_() for x in draws]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    kwargs = tree.model_kwargs() | backend.plan(tree, needs)
    options = {"scaling": size**-0.5, "sliding_window": window}
    module = kernel_check.AttentionStandIn(needs)
    shared = backend.attend(module, *inputs, **options, dropout=0.0, **kwargs)
    rows = attention_on_rows(tree, inputs, size**-0.5, window)
    outputs = {
        "truth": (duplicated_rows_attention(tree, *exact, **options), exact),
        "shared": (shared, inputs),
        "rows": (rows, inputs),
    }
    found = {}
    for kind, (output, leaves) in outputs.items():
        grads = torch.autograd.grad(output, leaves, direction.to(output.dtype))
        found[kind] = [x.double() for x in (output, *grads)]
    for truth, ours, theirs in zip(*found.values(), strict=True):
        assert 0 < (ours - truth).norm() <= 2 * (theirs - truth).norm()


def attention_on_rows(tree, inputs, scale, window):
    """PyTorch's attention on the rows, as the unpatched model computes it."""
    q, k, v = (tree.unpack(x.transpose(1, 2)).transpose(1, 2) for x in inputs)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    mask = torch.ones(tree.row_length, tree.row_length, dtype=torch.bool, device=q.device).tril()
    if window is not None:
        mask = mask.triu(1 - window)
    output = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return tree.pack(output.transpose(1, 2))


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("features", [(), ("window",), ("softcap",), ("sinks",)])
@pytest.mark.parametrize("name", ["torch_varlen", "flash", "flex", "sdpa"])
def test_kernels_pass_their_check(name, features, dtype):
    implementation = flash_implementation() if name == "flash" else "sdpa"
    needs = skip_unless_served(
        name,
        dtype=dtype,
        implementation=implementation or "sdpa",
        windows=frozenset({None, 50} if "window" in features else {None}),
        features=frozenset(features),
    )
    assert kernel_check.find_fault(attention.BACKENDS[name], needs) is None


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("size", [*SIZES, 512])
@pytest.mark.parametrize("window", [None, 50])
def test_sdpa_needs_no_math_kernel(size, window, dtype):
    """It would keep all scores of a chain. Where no other kernel serves, PyTorch raises here."""
    windows = frozenset({window})
    needs = skip_unless_served("sdpa", dtype=dtype, head_dims=frozenset({size}), windows=windows)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        assert kernel_check.find_fault(attention.BACKENDS["sdpa"], needs) is None


@pytest.mark.parametrize("dtype", HALF)
def test_gradients_of_many_rows_are_summed_in_fp32(dtype):
    """The last token of a prompt of 64 responses: no more than one rounding off."""
    rows = torch.cat([torch.full((64, 1), 5), torch.arange(64)[:, None]], dim=1)
    tree = PrefixTree.from_rows(rows).to("cuda")
    packed = torch.zeros(1, 65, 128, dtype=dtype, device="cuda", requires_grad=True)
    generator = torch.Generator().manual_seed(0)
    grads = (1 + torch.randn(64, 2, 128, generator=generator)).to(dtype)
    (sums,) = torch.autograd.grad(tree.unpack(packed), packed, grads.cuda())
    want = grads[:, 0].double().sum(0)
    assert (sums[0, 0].cpu() - want).norm() <= torch.finfo(dtype).eps / 2 * want.norm()


def model_options(size):
    return {
        "hidden_size": 128,
        "head_dim": size,
        "intermediate_size": 128,
        "max_position_embeddings": 1024,
    }


@pytest.mark.parametrize("mode", ["none", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("torch_varlen", "llama"),
        ("torch_varlen", "mistral-window"),
        ("torch_varlen", "gemma3"),
        ("flash", "qwen3"),
        ("flex", "llama"),
        ("flex", "gemma2"),
        ("flex", "gpt-oss"),
        ("sdpa", "llama"),
        ("sdpa", "gemma2"),
        ("sdpa", "gpt-oss"),
    ],
)
def test_models_are_no_worse_than_unpatched(name, family, dtype, mode):
    """Log-probs and all gradients together: error to fp32 at most twice the unpatched one."""
    attention_name = "eager" if family in NO_SDPA else "sdpa"
    if name == "flash":
        attention_name = flash_implementation() or pytest.skip("flash: no flash attention here")
    batch = on_cuda(ragged_rows())
    options = model_options(64)
    truth_model = tiny_model(family, "eager" if family in NO_SDPA else "sdpa", **options).cuda()
    model = tiny_model(family, attention_name, **options).cuda().to(dtype)
    give_weights(model, truth_model)
    set_checkpointing(model, mode)
    truth = run(truth_model, batch)
    unpatched = run(model, batch)
    with enable_prefix_sharing(model, backend=name) as sharing:
        seen = LayerTokens(model)
        shared = run(model, batch)
        assert sharing.backend == name
    packed = sharing.stats.packed_tokens
    assert packed < batch.attention_mask.sum()
    assert set(seen.shapes) == {(1, packed)}
    for ours, theirs in zip(errors(shared, truth), errors(unpatched, truth), strict=True):
        assert 0 < ours <= 2 * theirs


def give_weights(rounded, exact):
    """Those of a model in half precision to one in fp32."""
    with torch.no_grad():
        for theirs, ours in zip(exact.parameters(), rounded.parameters(), strict=True):
            theirs.copy_(ours)


def errors(found, truth):
    """Of the log-probs, and of all gradients together."""
    squares = [(found[1][n] - g).double().square().sum().item() for n, g in truth[1].items()]
    return (found[0] - truth[0]).norm().item(), sum(squares) ** 0.5


@pytest.mark.parametrize(
    ("name", "implementation"),
    [("torch_varlen", "sdpa"), ("flash", None), ("flex", "sdpa"), ("sdpa", "sdpa")],
)
def test_documents_in_one_row(name, implementation):
    """Rows without padding, one after another: with sdpa apart by a mask that transformers makes of
    their positions, in flash attention by positions alone, or by what is given along."""
    implementation = implementation or flash_implementation()
    if implementation is None:
        pytest.skip("flash: no flash attention here")
    batch = on_cuda(ragged_rows())
    truth_model = tiny_model("llama", **model_options(64)).cuda()
    model = tiny_model("llama", implementation, **model_options(64)).cuda().bfloat16()
    give_weights(model, truth_model)
    truth = run(truth_model, batch)
    options = {"one_row": True, "use_cache": False}
    unpatched = run(model, batch, **options)
    with enable_prefix_sharing(model, backend=name) as sharing:
        found = [run(model, batch, **options), run(model, batch, **options, **boundaries(batch))]
    assert (sharing.stats.calls, sharing.stats.bypassed.total()) == (2, 0)
    assert sharing.stats.packed_tokens < sharing.stats.row_tokens
    for shared in found:
        for ours, theirs in zip(errors(shared, truth), errors(unpatched, truth), strict=True):
            assert 0 < ours <= 2 * theirs


@pytest.mark.parametrize("size", SIZES)
def test_auto_picks_the_fast_backend(size):
    model, batch = tiny_model("llama", **model_options(size)).cuda(), on_cuda(ragged_rows())
    with enable_prefix_sharing(model) as sharing:
        run(model, batch)
        assert sharing.backend == "sdpa"
        with torch.autocast("cuda", dtype=torch.bfloat16):
            run(model, batch)
        assert sharing.backend == "torch_varlen"
        run(model, batch)
        assert sharing.backend == "sdpa"
        run(model.bfloat16(), batch)
        assert sharing.backend == "torch_varlen"


def test_fp32_equals_the_unpatched_model():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        model, batch = tiny_model(**model_options(64)).cuda(), on_cuda(ragged_rows())
        want = run(model, batch)
        with enable_prefix_sharing(model) as sharing:
            got = run(model, batch)
    finally:
        torch.set_float32_matmul_precision(before)
    assert sharing.stats.calls == 1
    torch.testing.assert_close(got[0], want[0], atol=2e-4, rtol=2e-5)
    for name, gradient in want[1].items():
        error = (got[1][name] - gradient).norm() / gradient.norm()
        assert error < 1e-4, name


def test_deterministic_algorithms():
    """Allowed, and bitwise the same twice."""
    model, batch = tiny_model(**model_options(64)).cuda().bfloat16(), on_cuda(ragged_rows())
    torch.use_deterministic_algorithms(True)
    try:
        with enable_prefix_sharing(model, backend="torch_varlen"):
            first, second = run(model, batch), run(model, batch)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first[0], second[0])
    for name, gradient in first[1].items():
        assert torch.equal(gradient, second[1][name]), name


def test_compiled_layers():
    """The default compiler on ragged batches of the fast backend."""
    torch._dynamo.reset()
    model = tiny_model(**model_options(64)).cuda().bfloat16()
    batches = [on_cuda(ragged_rows(seed)) for seed in range(4)]
    want = [run(model, batch) for batch in batches]
    with enable_prefix_sharing(model) as sharing:
        for layer in model.model.layers:
            layer.compile()
        for batch, (logps, _) in zip(batches, want, strict=True):
            got, _ = run(model, batch)
            assert (got - logps).norm() <= 2e-2 * logps.norm()
    assert sharing.stats.calls == 4
    assert sharing.backend == "torch_varlen"


@pytest.mark.parametrize("lora", [False, True])
def test_one_trl_step(tmp_path, lora):
    """A stock trainer in bf16: the same loss with and without, on the fast backend."""
    if importlib.util.find_spec("trl") is None:
        pytest.skip("trl is not installed")
    from tiny_trl import build_trainer, load, save_tiny_model

    path = save_tiny_model(tmp_path)
    losses = {}
    for shared in (False, True):
        trainer = build_trainer(
            load(path),
            tmp_path / str(shared),
            lora=lora,
            bf16=True,
            max_steps=1,
            use_cpu=False,
        )
        if shared:
            sharing = enable_prefix_sharing(trainer)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                assert sharing.backend == "torch_varlen"
        trainer.train()
        losses[shared] = next(x["loss"] for x in trainer.state.log_history if "loss" in x)
    assert sharing.stats.calls >= 1
    assert abs(losses[True] - losses[False]) < 2e-2


@pytest.mark.parametrize("family", ["qwen2.5-vl", "llava", "smolvlm"])
def test_images(family):
    """In bf16, two calls, the first with a trial of the tower: log-probs and all gradients together
    are off the fp32 truth by at most twice what the unpatched model is."""
    batch, media = image_batch(family, (0,), (1,), (0,), (1,))
    batch, media = on_cuda(batch), send_to_device(media, torch.device("cuda"))
    model = tiny_composite(family).cuda()
    truth = run(model, batch, **media)
    model = model.bfloat16()
    media["pixel_values"] = media["pixel_values"].bfloat16()
    unpatched = run(model, batch, **media)
    with enable_prefix_sharing(model) as sharing:
        for _ in range(2):
            shared = run(model, batch, **media)
            for ours, theirs, exact in zip(*map(flat, (shared, unpatched, truth)), strict=True):
                assert (ours - exact).norm() <= 2 * (theirs - exact).norm()
    assert (sharing.stats.calls, sharing.stats.bypassed) == (2, {})
    assert sharing.stats.packed_tokens == 2 * (9 + 9 + 10)


def test_comparison():
    """What `hf-prefix-patch verify` runs: time and memory of the device, random states, verdict."""
    model = tiny_model(**model_options(64)).cuda()
    batch = DataCollatorWithPrefixSharing(pad_token_id=0)(random_pairs(model.config, 2, 48, 0))
    found = compare_sharing(model, send_to_device(batch, torch.device("cuda")))
    assert found.verdict == "equal", found.mismatches


def flat(results):
    """Log-probs, and all gradients as one vector."""
    logps, gradients = results
    return logps.float(), torch.cat([x.flatten().float() for x in gradients.values()])


def planned_batches(layout):
    """Two batches of the collator, in pinned memory, as a data loader hands them on."""
    pairs = [
        {"prompt_ids": list(range(5, 5 + n)), "chosen_ids": [7, 8, n], "rejected_ids": [9] * n}
        for n in (20, 30, 40, 25)
    ]
    collator = DataCollatorWithPrefixSharing(pad_token_id=0, layout=layout)
    for chosen in (pairs[:2], pairs[2:]):
        yield {
            name: x.pin_memory() if isinstance(x, torch.Tensor) else x
            for name, x in collator(chosen).items()
        }


def test_what_the_tests_of_devices_rest_on():
    """A tensor left on the host, and a wait, do raise here."""
    x, y = torch.ones(2, device="cuda"), torch.ones(2)
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        x + y
    torch.cuda.set_sync_debug_mode("error")
    try:
        for waits in (x.tolist, x.cpu, y.cuda, lambda: x[x > 0], lambda: bool(x.all())):
            with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
                waits()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("layout", ["rows", "packed"])
def test_planned_calls_never_wait_for_the_device(layout):
    """torch raises at whatever waits, from the copy of the batch to the end of backward."""
    model = tiny_model(**model_options(64)).cuda().bfloat16()
    names = {"completion_mask", *LOSS_INPUTS}
    with enable_prefix_sharing(model) as sharing:
        for batch, mode in zip(planned_batches(layout), ("default", "error"), strict=True):
            torch.cuda.set_sync_debug_mode(mode)
            try:
                moved = send_to_device(batch, torch.device("cuda"), non_blocking=True)
                inputs = {name: x for name, x in moved.items() if name not in names}
                model(**inputs, use_cache=False).logits.sum().backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert sharing.stats.calls == 2


@pytest.mark.parametrize("layout", ["rows", "packed"])
def test_completion_logps(layout):
    """In bf16: error to the fp32 truth at most twice that of full logits of the unpatched model."""
    exact = tiny_model(**model_options(64)).cuda()
    model = tiny_model(**model_options(64)).cuda().bfloat16()
    for rows, batch in zip(planned_batches("rows"), planned_batches(layout), strict=True):
        batch, rows = (send_to_device(x, torch.device("cuda")) for x in (batch, rows))
        inputs = {name: rows[name].clone() for name in ("input_ids", "attention_mask")}
        plain = inputs | {"completion_mask": rows["completion_mask"]}
        truth = completion_logps(exact, plain)
        logits = model(**inputs, use_cache=False).logits[:, :-1].float()
        logps = logits.log_softmax(-1).gather(2, inputs["input_ids"][:, 1:, None])[..., 0]
        naive = (logps * rows["completion_mask"][:, 1:]).sum(1)
        with enable_prefix_sharing(model):
            got = completion_logps(model, batch)
        assert (got - truth).norm() <= 2 * (naive - truth).norm()
