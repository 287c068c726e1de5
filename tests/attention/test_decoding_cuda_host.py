"""The CUDA kernels of decoding on the CPU, under sanitizers, against float64 beside PyTorch's own operator."""

import dataclasses

import pytest
import torch

from tests import cuda_host
from tests.attention.test_attention import tolerance
from tests.attention.test_decoding import Problem, copied, in_order, right, torch_decode, widened
from tests.numerics import assert_right

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SOURCES = [
    cuda_host.ROOT / "csrc" / "attention" / "decoding_sm80.cu",
    cuda_host.ROOT / "tests" / "attention" / "decoding_cuda_host.cpp",
]


@pytest.fixture(scope="module")
def memory_library():
    return cuda_host.build("decoding", SOURCES)


@pytest.fixture(scope="module")
def races_library():
    return cuda_host.build("decoding", SOURCES, kind="races")


def heads_inside(tensor):
    """(B, N, length, D) as (B, length, N, D)."""
    return None if tensor is None else tensor.transpose(1, 2).contiguous()


def kernels(library, tensors, problem):
    """output, logsumexp and the two caches of the CUDA kernels."""
    query, key_cache, value_cache, lengths, options = tensors
    paged = problem.page_size > 0
    batch, heads, queries, dim = query.shape
    value_dim, kv_heads = value_cache.shape[3], key_cache.shape[2 if paged else 1]
    table, cos, slopes = (options.get(name) for name in ("block_table", "rotary_cos", "alibi_slopes"))
    capacity = table.shape[1] * problem.page_size if paged else key_cache.shape[2]
    inputs = {
        "query": heads_inside(query), "key": heads_inside(options.get("key")), "value": heads_inside(options.get("value")),
        "cache_lengths": lengths, "block_table": table, "rotary_cos": cos, "rotary_sin": options.get("rotary_sin"),
        "alibi_slopes": slopes,
    }  # fmt: skip
    sizes = (batch, heads, kv_heads, queries, capacity)
    floats = torch.zeros(1, dtype=torch.int64)
    found = cuda_host.run(
        library, "partial_floats", {}, {"floats": floats}, *sizes, value_dim, problem.window, problem.num_splits
    )
    outputs = {
        "key_cache": key_cache if paged else heads_inside(key_cache),
        "value_cache": value_cache if paged else heads_inside(value_cache),
        "output": ((batch, queries, heads, value_dim), query.dtype),
        "logsumexp": ((batch, heads, queries), torch.float32),
        "rotated_query": None if cos is None else ((batch, heads, queries, dim), query.dtype),
        "partials": ((int(found["floats"]),), torch.float32),
    }
    numbers = (
        TYPES[query.dtype], *sizes, dim, value_dim, problem.page_size, key_cache.shape[0], problem.rotary_dim,
        0 if cos is None else cos.shape[0], int(cos is not None and cos.dtype == torch.float32),
        int(problem.interleaved), heads if slopes is not None and slopes.dim() == 2 else 0, problem.window,
        problem.num_splits, dim**-0.5, problem.softcap,
    )  # fmt: skip
    done = cuda_host.run(library, "attention_decode", inputs, outputs, *numbers)
    caches = [done[name] if paged else done[name].transpose(1, 2) for name in ("key_cache", "value_cache")]
    return done["output"].transpose(1, 2), done["logsumexp"], *caches


def check_right(library, problem, dtype, tiny=2e-6):
    tensors = problem.tensors(dtype)
    wide, same = widened(tensors), copied(tensors)
    theirs = torch_decode(tensors, problem)
    expected, expected_sum = right(wide, problem)
    right(same, problem)
    output, logsumexp, *caches = kernels(library, tensors, problem)
    assert_right(output, theirs, expected, tiny=tolerance(dtype, tiny) * max(1.0, expected.abs().max().item()))
    loose = 3e-5 if dtype == torch.float32 or not problem.rotary_dim else 0.05
    torch.testing.assert_close(logsumexp.double(), expected_sum, rtol=1e-5, atol=max(loose, tiny))
    for mine, other, ref in zip(caches, same[1:3], wide[1:3], strict=True):
        assert_right(mine, other, ref, tiny=tolerance(dtype) * max(1.0, ref.abs().max().item()), name="cache")


# one shape for each compiled size of head, several splits and one, several tiles of rows
CASES = {
    "several splits": Problem(heads=4, kv_heads=2, head_dim=64, value_dim=40, capacity=300, lengths=(300, 131)),
    "many rows": Problem(batch=1, heads=10, kv_heads=1, queries=2, head_dim=128, value_dim=128, capacity=70),
    "long heads": Problem(batch=1, heads=1, kv_heads=1, head_dim=256, value_dim=8, capacity=150, lengths=(150,)),
    "long values": Problem(batch=1, heads=2, kv_heads=1, head_dim=72, value_dim=200, capacity=50),
    "append, rotate": Problem(head_dim=40, queries=3, append=True, rotary_dim=40, capacity=70),
    "append, rotate pairs": Problem(append=True, rotary_dim=16, interleaved=True, page_size=7, capacity=70),
    "paged": Problem(page_size=16, capacity=320, lengths=(320, 33)),
    "window, softcap, alibi": Problem(window=50, softcap=3.0, alibi=True, queries=2, capacity=200, page_size=8),
    "a given number of splits": Problem(num_splits=2, capacity=260, lengths=(260, 3)),
    "no keys": Problem(lengths=(0, 1), queries=2, capacity=5, num_splits=1),
}  # fmt: skip


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_output_logsumexp_and_cache(memory_library, case, dtype):
    check_right(memory_library, CASES[case], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_batch_gives_the_bits_of_its_members(memory_library, dtype):
    problem = Problem(batch=3, capacity=300, lengths=(300, 65, 170), queries=2, append=True)
    query, key_cache, value_cache, lengths, options = problem.tensors(dtype)
    output, logsumexp, *_ = kernels(memory_library, (query, key_cache, value_cache, lengths, options), problem)
    for b, length in enumerate(problem.lengths):
        one = slice(b, b + 1)
        member = {name: tensor[one] for name, tensor in options.items()}
        caches = (cache[one, :, :length] for cache in (key_cache, value_cache))
        alone = kernels(memory_library, (query[one], *caches, lengths[one], member), problem)
        assert torch.equal(alone[0], output[one]) and torch.equal(alone[1], logsumexp[one])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_does_not_fit_is_neither_written_nor_read(memory_library, dtype):
    """A length beyond the cache and a block number out of range, which a GPU's caller is not told of."""
    problem = Problem(batch=2, capacity=70, lengths=(70, 75), queries=2, append=True)
    tensors = problem.tensors(dtype)
    output, _, key_cache, _ = kernels(memory_library, tensors, problem)
    assert torch.equal(key_cache[1], tensors[1][1])
    shorter = dataclasses.replace(problem, append=False, lengths=(70, 70))
    assert output.isfinite().all()
    problem = Problem(batch=1, capacity=64, lengths=(60,), page_size=16)
    query, key_cache, value_cache, lengths, options = problem.tensors(dtype)
    for wrong in (-7, len(key_cache), 2**31 - 1):
        options["block_table"][0, 1] = wrong
        output, _, *_ = kernels(memory_library, (query, key_cache, value_cache, lengths, options), problem)
        table = options["block_table"][:, [0, 2, 3]]
        left = [in_order(cache, table)[:, :, :44] for cache in (key_cache, value_cache)]
        shorter = dataclasses.replace(problem, page_size=0)
        expected, _ = right(widened((query, *left, lengths - 16, {})), shorter)
        torch.testing.assert_close(output.double(), expected, rtol=0, atol=2e-2 if dtype == torch.bfloat16 else 1e-5)


def test_a_position_without_an_angle_gives_nan(memory_library):
    problem = Problem(batch=2, capacity=70, lengths=(30, 60), append=True, rotary_dim=8)
    query, key_cache, value_cache, lengths, options = problem.tensors(torch.bfloat16)
    options |= {name: options[name][:40].contiguous() for name in ("rotary_cos", "rotary_sin")}
    output, *_ = kernels(memory_library, (query, key_cache, value_cache, lengths, options), problem)
    assert output[0].isfinite().all() and output[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_nan_stays_in_its_sequence_and_is_not_hidden(memory_library, dtype):
    problem = Problem(batch=3, capacity=200, lengths=(200, 150, 170), window=160)
    tensors = problem.tensors(dtype)
    clean = kernels(memory_library, tensors, problem)[0]
    tensors[1][1, 0, 140, 3] = torch.nan
    tensors[1][2, :, 170:] = tensors[2][2, :, 170:] = torch.nan  # which no query sees
    tensors[1][0, :, :39] = tensors[2][0, :, :39] = torch.nan
    output, logsumexp, *_ = kernels(memory_library, tensors, problem)
    assert output[1, :2].isnan().all() and logsumexp[1, :2].isnan().all()
    assert torch.equal(output[[0, 2]], clean[[0, 2]]) and torch.equal(output[1, 2:], clean[1, 2:])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_large_magnitudes(memory_library, dtype):
    problem = Problem(batch=1, capacity=150, magnitude=6.0)
    check_right(memory_library, problem, dtype, tiny=3e-5)
    huge = dataclasses.replace(problem, magnitude=1e4)
    assert kernels(memory_library, huge.tensors(dtype), huge)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["several splits", "append, rotate pairs", "long values"])
def test_no_races(races_library, case, dtype):
    check_right(races_library, CASES[case], dtype)
