"""transformers' models with attn_implementation="lmengine" against the same models with eager attention."""

import random
import subprocess
import sys

import pytest
import torch
from transformers import DynamicCache, StaticCache, masking_utils

import lmengine
import lmengine.integrations.transformers as integration
from lmengine.ops.attention import attention
from tests.integrations.models import (
    BATCH,
    CLASSES,
    DECODERS,
    LENGTH,
    VOCABULARY,
    WINDOW,
    batch,
    build,
    inputs_of,
    valid,
)
from tests.numerics import assert_right

pytestmark = pytest.mark.filterwarnings("ignore:lmengine.attention. no kernel supports this call")


@pytest.fixture
def calls(monkeypatch):
    """The options of every call of lmengine's attention."""
    seen = []

    def recorded(query, key, value, **options):
        seen.append({name: option for name, option in options.items() if name != "scale"})
        return attention(query, key, value, **options)

    monkeypatch.setattr(integration, "attention", recorded)
    return seen


@pytest.fixture
def kernels():
    """What the kernels cannot do is an error; the exact models do not come by here."""
    with lmengine.use_backend("cpu"):
        yield


# ---- whole models ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("name", CLASSES)
def test_logits(name, padding, calls, kernels):
    models = build(name)
    ids, tokens = batch(padding)
    inputs = inputs_of(name, ids, tokens)
    with torch.no_grad():
        exact, eager, ours = (model(**inputs).logits[valid(name, tokens) == 1] for model in models)
    assert_right(ours, eager, exact, tiny=1e-4)
    assert len(calls) == (6 if name == "t5" else 2)


@pytest.mark.parametrize("name", ["llama", "gemma2", "t5"])
def test_logits_bfloat16(name, kernels):
    models = build(name, torch.bfloat16)
    ids, tokens = batch("left")
    inputs = inputs_of(name, ids, tokens)
    with torch.no_grad():
        exact, eager, ours = (model(**inputs).logits[valid(name, tokens) == 1] for model in models)
    assert_right(ours, eager, exact, tiny=1e-3)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", CLASSES)
def test_gradients(name, padding, kernels):
    models = build(name)
    ids, tokens = batch(padding)
    inputs = inputs_of(name, ids, tokens)
    chosen = valid(name, tokens) == 1
    weights = torch.randn(int(chosen.sum()), VOCABULARY)
    results = []
    for model in models:
        logits = model(**inputs).logits[chosen]
        (logits * weights.to(logits)).sum().backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    exact, eager, ours = results
    assert exact.keys() == ours.keys()
    largest = max(gradient.abs().max().item() for gradient in exact.values())
    for parameter in exact:
        # what is left of large terms that cancel may be a few numbers, or 0 (a key's bias): PyTorch's error there is no
        # measure of ours
        tiny = 1e-3 * exact[parameter].abs().max().item() + 1e-5 * largest
        assert_right(ours[parameter], eager[parameter], exact[parameter], tiny=tiny, name=parameter)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", [*DECODERS, "t5"])
def test_generate(name, cache, kernels):
    _, eager, ours = build(name)
    ids, tokens = batch("right" if name == "t5" else "left")
    arguments = {"max_new_tokens": 10, "do_sample": False, "cache_implementation": cache, "attention_mask": tokens}
    expected = eager.generate(ids, **arguments)
    assert expected.shape[1] == 10 + (1 if name == "t5" else LENGTH)
    torch.testing.assert_close(ours.generate(ids, **arguments), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", DECODERS)
def test_generate_in_a_batch_as_alone(name):
    _, _, model = build(name)
    ids, tokens = batch("left")
    generated = model.generate(ids, attention_mask=tokens, max_new_tokens=8, do_sample=False)
    for row in range(BATCH):
        alone = ids[row : row + 1, tokens[row] == 1]
        expected = model.generate(alone, attention_mask=torch.ones_like(alone), max_new_tokens=8, do_sample=False)
        torch.testing.assert_close(generated[row, LENGTH:], expected[0, alone.shape[1] :], rtol=0, atol=0)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", CLASSES)
def test_a_batch_gives_what_its_members_give_alone(name, padding):
    model = build(name)[-1].double()
    ids, tokens = batch(padding)
    inputs = inputs_of(name, ids, tokens)
    with torch.no_grad():
        together = model(**inputs).logits
        for row in range(BATCH):
            alone = {key: value[row : row + 1] for key, value in inputs.items()}
            for key in ("input_ids", "attention_mask", "position_ids"):
                if key in alone:
                    alone[key] = alone[key][:, tokens[row] == 1]
            chosen = valid(name, tokens)[row] == 1
            torch.testing.assert_close(together[row, chosen], model(**alone).logits[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("name", DECODERS)
def test_no_token_sees_what_comes_after_it(name, padding):
    model = build(name)[-1]
    ids, tokens = batch(padding)
    changed = ids.clone()
    changed[:, 8:] = (ids[:, 8:] + 5) % VOCABULARY
    changed = torch.where(tokens == 1, changed, 5)  # and what stands in the place of padding
    with torch.no_grad():
        before = model(**inputs_of(name, ids, tokens)).logits[:, :8][tokens[:, :8] == 1]
        after = model(**inputs_of(name, changed, tokens)).logits[:, :8][tokens[:, :8] == 1]
        last = (
            model(**inputs_of(name, ids, tokens)).logits[0, 8],
            model(**inputs_of(name, changed, tokens)).logits[0, 8],
        )
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert (last[0] - last[1]).abs().max() > 0.1


def test_without_a_mask_function_padding_would_be_seen(monkeypatch):
    """Why the mask is registered too: transformers says nothing where it is missing."""
    _, eager, ours = build("llama")
    ids, tokens = batch("left")
    inputs = inputs_of("llama", ids, tokens)
    mapping = masking_utils.AttentionMaskInterface._global_mapping
    with torch.no_grad():
        expected = eager(**inputs).logits[tokens == 1]
        torch.testing.assert_close(ours(**inputs).logits[tokens == 1], expected, rtol=1e-3, atol=1e-3)
        monkeypatch.delitem(mapping, "lmengine")
        wrong = ours(**inputs).logits[tokens == 1]
    assert (wrong - expected).abs().max() > 0.1


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_prompt_in_pieces(name, calls):
    """Queries that stand behind a cache: with a cache that grows, and with one of fixed size."""
    exact, eager, ours = build(name)
    ids, tokens = batch("left")
    inputs = inputs_of(name, ids, tokens)
    for padded in (False, True):
        results = []
        for model in (exact, eager, ours):
            for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=20)):
                pieces = []
                for piece in (slice(0, 5), slice(5, 8), slice(8, 11)):
                    mask = tokens[:, : piece.stop] if padded else None
                    positions = inputs["position_ids"][:, piece] if padded else torch.arange(LENGTH)[None, piece]
                    with torch.no_grad():
                        output = model(
                            ids[:, piece], attention_mask=mask, position_ids=positions, past_key_values=cache
                        )
                    pieces.append(output.logits)
                results.append(torch.cat(pieces, 1)[tokens == 1])
        for ours_then in results[4:]:
            assert_right(ours_then, results[2], results[0], tiny=1e-4)
    assert any(call.get("bottom_right") for call in calls)
    if name == "llama":
        assert any("key_lengths" in call and call.get("bottom_right") for call in calls)


def test_packed_sequences(calls):
    """Sequences one behind the other, told apart by their positions alone."""
    for name in ("llama", "mistral"):
        exact, eager, ours = build(name)
        lengths = [3, 1, 9, 6]
        ids = torch.randint(3, VOCABULARY, (1, sum(lengths)))
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        with torch.no_grad():
            results = [model(ids, position_ids=positions, use_cache=False).logits for model in (exact, eager, ours)]
            assert_right(results[2], results[1], results[0], tiny=1e-4)
            alone = [ours(piece).logits for piece in ids.split(lengths, 1)]
        torch.testing.assert_close(results[2], torch.cat(alone, 1), rtol=1e-4, atol=1e-4)
        told = calls[0]  # later calls are of the sequences alone
        assert told["cu_seqlens_q"].tolist() == [0, 3, 4, 13, 19] and "mask" not in told
        calls.clear()


def test_dropout_in_training():
    for name in ("llama", "t5"):
        changes = {"attention_dropout": 0.4} if name == "llama" else {}
        model = build(name, **changes)[-1].train()
        for layer in model.modules():
            if name == "t5" and hasattr(layer, "relative_attention_num_buckets"):
                layer.dropout = 0.4
        ids, tokens = batch("right")
        inputs = inputs_of(name, ids, tokens)
        results = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            model.zero_grad()
            logits = model(**inputs).logits
            logits.logsumexp(-1).sum().backward()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            assert all(gradient.isfinite().all() for gradient in gradients)
            results.append(logits.detach())
        torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
        assert (results[0] - results[2]).abs().max() > 1e-3
        model.eval()
        torch.testing.assert_close(model(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)


def test_gradient_checkpointing():
    ids, tokens = batch("left")
    inputs = inputs_of("mistral", ids, tokens)
    model = build("mistral", attention_dropout=0.3)[-1].train()
    results = []
    for reentrant in (None, False, True):
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(4)
        model.zero_grad()
        model(**inputs).logits[tokens == 1].logsumexp(-1).sum().backward()
        results.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


def test_compiled():
    _, _, model = build("gemma2")
    batches = [batch(padding) for padding in ("left", "right")]
    batches += [(ids.flip(0), tokens.flip(0)) for ids, tokens in batches]  # other values, which no graph may hold

    def logits(function, ids, tokens):
        with torch.no_grad():
            return function(**inputs_of("gemma2", ids, tokens), use_cache=False).logits[tokens == 1]

    expected = [logits(model, *inputs) for inputs in batches]
    whole = torch.compile(model, backend="aot_eager", fullgraph=True)
    for inputs, right in zip(batches, expected, strict=True):
        torch.testing.assert_close(logits(whole, *inputs), right, rtol=1e-4, atol=1e-4)
    for layer in model.model.layers:  # the mask is made outside of what is compiled, and enters it as a Structure
        layer.compile(backend="aot_eager", fullgraph=True)
    for inputs, right in zip(batches, expected, strict=True):
        torch.testing.assert_close(logits(model, *inputs), right, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_autocast():
    models = build("llama")
    ids, tokens = batch("left")
    inputs = inputs_of("llama", ids, tokens)
    with torch.no_grad():
        exact = models[0](**inputs).logits[tokens == 1]
        with torch.autocast("cpu", torch.bfloat16):
            eager, ours = (model(**inputs).logits[tokens == 1] for model in models[1:])
    assert_right(ours, eager, exact, tiny=1e-3)


def test_a_mask_of_the_users_own():
    exact, eager, ours = build("llama")
    ids, _ = batch(None)
    seen = (torch.rand(BATCH, 1, LENGTH, LENGTH) < 0.5) | torch.eye(LENGTH, dtype=torch.bool)
    with torch.no_grad():
        expected = [
            model(ids, attention_mask=torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min))
            for model, dtype in ((exact, torch.float64), (eager, torch.float32), (ours, torch.float32))
        ]
        assert_right(expected[2].logits, expected[1].logits, expected[0].logits, tiny=1e-4)
        assert_right(ours(ids, attention_mask=seen).logits, expected[1].logits, expected[0].logits, tiny=1e-4)


def test_what_is_refused():
    model = build("llama")[-1]
    ids, _ = batch(None)
    with pytest.raises(NotImplementedError, match="output_attentions: expected False"):
        model(ids, output_attentions=True)
    with pytest.raises(NotImplementedError, match="indices: expected None"):
        query = torch.randn(1, 2, 3, 16)
        integration.attention_forward(model, query, query, query, None, indices=torch.zeros(1))


# ---- the mask --------------------------------------------------------------------------------------------------


def test_what_the_kernels_are_told(calls):
    """Causality, windows and right padding by their own arguments, left padding by a mask of one row."""
    expected = {
        ("llama", None): [{"is_causal"}] * 2,
        ("llama", "left"): [{"is_causal", "mask"}] * 2,
        ("llama", "right"): [{"is_causal", "key_lengths"}] * 2,
        ("mistral", None): [{"is_causal", "window_size"}] * 2,
        ("mistral", "left"): [{"is_causal", "window_size", "mask"}] * 2,
        ("mistral", "right"): [{"is_causal", "window_size", "key_lengths"}] * 2,
        ("gemma2", None): [{"is_causal", "window_size", "softcap"}, {"is_causal", "softcap"}],
        ("bert", None): [set()] * 2,
        ("bert", "right"): [{"key_lengths"}] * 2,
        ("modernbert", None): [set(), {"window_size"}],
        ("t5", "right"): [{"mask", "key_lengths"}] * 2 + [{"is_causal", "mask"}, {"mask", "key_lengths"}] * 2,
    }
    for (name, padding), names in expected.items():
        calls.clear()
        ids, tokens = batch(padding)
        inputs = inputs_of(name, ids, tokens)
        if padding is None:
            del inputs["attention_mask"]
        with torch.no_grad():
            build(name)[-1](**inputs)
        assert [set(call) for call in calls] == names, (name, padding)
        for call in calls:
            if "mask" in call and name != "t5":
                assert call["mask"].shape == (BATCH, 1, 1, LENGTH)
            if "window_size" in call:
                assert call["window_size"] == ((WINDOW - 1, -1) if "is_causal" in call else (WINDOW, WINDOW))


def random_mask():
    """Arguments of a mask function, and a query, key and value for it."""
    queries, before, behind, cut = random.choice([2, 3, 7]), *(random.choice([0, 0, 1, 5]) for _ in range(3))
    keys = queries + before + behind
    kv_offset = cut
    rows = random.choice([1, 3])
    window = random.choice([None, 1, 2, 5, 20])
    patterns = [masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function]
    if window is not None:
        patterns = [
            masking_utils.sliding_window_causal_mask_function(window),
            masking_utils.sliding_window_bidirectional_mask_function(window),
            masking_utils.chunked_causal_mask_function(window, torch.zeros(rows, dtype=torch.long)),
        ]
    padding = random.choice([None, "left", "right", "both"])
    tokens = None
    if padding is not None:
        tokens = torch.ones(rows, kv_offset + keys - random.choice([0, behind]), dtype=torch.bool)
        for row in tokens:
            if padding != "right":
                row[: random.choice([0, 1, kv_offset + keys // 2])] = False
            if padding != "left":
                row[len(row) - random.choice([0, 1, keys // 2]) :] = False
    arguments = {
        "batch_size": rows, "q_length": queries, "kv_length": keys, "q_offset": kv_offset + before,
        "kv_offset": kv_offset, "mask_function": random.choice(patterns), "attention_mask": tokens,
        "local_size": window,
    }  # fmt: skip
    query = torch.randn(rows, 4, queries, 16, dtype=torch.float64)
    return arguments, query, torch.randn(2, rows, 2, keys, 16, dtype=torch.float64).unbind()


def test_the_arguments_say_what_the_mask_says():
    made = 0
    for _ in range(200):
        arguments, query, (key, value) = random_mask()
        mask = integration.attention_mask(**arguments)
        dense = masking_utils.sdpa_mask(**{**arguments, "allow_is_causal_skip": False})
        module = torch.nn.Module()
        ours, _ = integration.attention_forward(module, query, key, value, mask, is_causal=mask is None)
        expected = attention(query, key, value, mask=dense).transpose(1, 2)
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
        if isinstance(mask, integration.Structure):
            made += 1
            assert mask.shape == dense.shape and torch.equal(mask & True, dense)
    assert made > 50


def test_a_mask_that_is_written_to_counts_as_written():
    arguments = {"batch_size": 2, "q_length": 6, "kv_length": 6, "local_size": 3}
    arguments["mask_function"] = masking_utils.sliding_window_causal_mask_function(3)
    query, key, value = torch.randn(3, 2, 4, 6, 16, dtype=torch.float64).unbind()

    def run(mask):
        return integration.attention_forward(torch.nn.Module(), query, key, value, mask)[0]

    for write in (
        lambda m: m.logical_not_(),
        lambda m: m[..., 2:].fill_(True),
        lambda m: m.__setitem__((0, 0, 1), True),
    ):
        mask, dense = integration.attention_mask(**arguments), masking_utils.sdpa_mask(**arguments).contiguous()
        assert isinstance(mask, integration.Structure)
        write(mask)
        write(dense)
        torch.testing.assert_close(run(mask), run(dense))
    mask = integration.attention_mask(**arguments)
    added = torch.where(mask, 0.0, -torch.inf)
    assert type(added) is torch.Tensor and not mask.exposed
    torch.testing.assert_close(run(added), run(mask))
    assert "window_size" in repr(mask)


def test_sinks_take_part_in_the_softmax():
    query, key, value = torch.randn(3, 2, 4, 6, 16, dtype=torch.float64).unbind()
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    ours, _ = integration.attention_forward(torch.nn.Module(), query, key, value, None, is_causal=False, s_aux=sinks)
    scores = torch.cat([query @ key.mT / 4, sinks[:, None, None].expand(2, 4, 6, 1)], -1)
    expected = (scores.softmax(-1)[..., :-1] @ value).transpose(1, 2)
    torch.testing.assert_close(ours, expected)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(*(torch.autograd.grad(output, sinks, grad)[0] for output in (ours, expected)))


# ---- the registration ------------------------------------------------------------------------------------------


def test_registered_on_request_alone():
    """In a process of its own: importing lmengine does not import transformers, and a missing one is named."""
    script = """
import sys, lmengine, lmengine.integrations
assert not any(name.split(".")[0] == "transformers" for name in sys.modules)
sys.modules["transformers"] = None
try:
    lmengine.integrations.register_transformers()
except ImportError as error:
    assert "pip install lmengine[transformers]" in str(error)
else:
    raise AssertionError("no error")
del sys.modules["transformers"]
lmengine.integrations.register_transformers()
from transformers import AttentionInterface, AttentionMaskInterface
assert "lmengine" in AttentionInterface() and "lmengine" in AttentionMaskInterface()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
