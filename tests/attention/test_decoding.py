"""Decoding on every backend that this machine can use, against float64, beside PyTorch's own operator."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import lmengine
from lmengine.backends import OPERATORS, unusable
from lmengine.ops import attention_decode
from lmengine.ops.decoding import lowered
from lmengine.ops.decoding_reference import in_order, reference, rotated
from tests.attention.test_attention import device_of, tolerance
from tests.numerics import assert_right

GPU = torch.cuda.is_available()
BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(unusable(name) is not None, reason=str(unusable(name))))
    for name in (["cpu", "triton", "cuda"] if GPU else ["cpu", "triton"])
    if name in OPERATORS["attention_decode"].implementations
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# in Triton's interpreter, which is slow, float16 is what bfloat16 is
BACKENDS_AND_DTYPES = [
    pytest.param(*backend.values, dtype, marks=backend.marks, id=f"{backend.values[0]}-{dtype}")
    for backend in BACKENDS
    for dtype in DTYPES
    if GPU or backend.values[0] == "cpu" or dtype != torch.float16
]


@dataclasses.dataclass
class Problem:
    """What a test varies; `tensors` draws the rest."""

    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    queries: int = 1
    capacity: int = 300
    head_dim: int = 32
    value_dim: int = 32
    append: bool = False
    page_size: int = 0  # 0: not paged
    transposed: bool = False
    rotary_dim: int = 0
    interleaved: bool = False
    window: int = -1
    softcap: float = 0.0
    alibi: bool = False
    num_splits: int = 0
    lengths: tuple[int, ...] | None = None  # after appending; drawn where None
    magnitude: float = 1.0

    def tensors(self, dtype, device="cpu"):
        """query, key_cache, value_cache, cache_lengths, and the options of attention_decode that are tensors."""
        draw = lambda *shape: (torch.randn(*shape) * self.magnitude).to(dtype).to(device)  # noqa: E731
        fewest = self.queries if self.append else 0
        lengths = torch.randint(fewest, self.capacity + 1, (self.batch,))
        if self.lengths is not None:
            lengths = torch.tensor(self.lengths)
        query = draw(self.batch, self.queries, self.heads, self.head_dim).transpose(1, 2)
        options = {}
        if self.page_size:
            pages = -(-self.capacity // self.page_size)
            blocks = pages * self.batch + 3
            caches = [draw(blocks, self.page_size, self.kv_heads, dim) for dim in (self.head_dim, self.value_dim)]
            options["block_table"] = torch.randperm(blocks)[: pages * self.batch].view(self.batch, pages).int()
        elif self.transposed:
            caches = [
                draw(self.batch, self.capacity, self.kv_heads, dim).transpose(1, 2)
                for dim in (self.head_dim, self.value_dim)
            ]
        else:
            caches = [draw(self.batch, self.kv_heads, self.capacity, dim) for dim in (self.head_dim, self.value_dim)]
        if self.append:
            for name, dim in (("key", self.head_dim), ("value", self.value_dim)):
                options[name] = draw(self.batch, self.queries, self.kv_heads, dim).transpose(1, 2)
        if self.rotary_dim:
            frequencies = 100.0 ** -(torch.arange(self.rotary_dim // 2) / (self.rotary_dim // 2))
            angles = torch.arange(self.capacity)[:, None] * frequencies
            options.update(rotary_cos=angles.cos().to(dtype), rotary_sin=angles.sin().to(dtype))
        if self.alibi:
            options["alibi_slopes"] = torch.rand(self.heads) * 0.1
        lengths = (lengths - (self.queries if self.append else 0)).int().to(device)
        return query, *caches, lengths, {name: tensor.to(device) for name, tensor in options.items()}

    def numbers(self):
        return dict(
            window_size=(self.window, -1), softcap=self.softcap, num_splits=self.num_splits,
            rotary_interleaved=self.interleaved, return_logsumexp=True,
        )  # fmt: skip


def copied(tensors):
    """The same with caches of their own, laid out alike."""
    query, key_cache, value_cache, lengths, options = tensors
    return (
        query,
        *(cache.clone(memory_format=torch.preserve_format) for cache in (key_cache, value_cache)),
        lengths,
        options,
    )


def widened(tensors):
    query, *caches, lengths, options = tensors
    wide = {name: t if name in ("block_table", "alibi_slopes") else t.double() for name, t in options.items()}
    return query.double(), *(cache.double() for cache in caches), lengths, wide


def decode(tensors, problem):
    *arguments, options = tensors
    return attention_decode(*arguments, **options, **problem.numbers())


def right(tensors, problem):
    *arguments, options = tensors
    with lmengine.use_backend("reference"):
        return attention_decode(*arguments, **options, **problem.numbers())


def torch_decode(tensors, problem):
    """The output with PyTorch's operators in the tensors' own dtype; the caches are changed."""
    query, key_cache, value_cache, lengths, options = copied(tensors)
    if problem.softcap:
        return right((query, key_cache, value_cache, lengths, options), problem)[0]
    table = options.get("block_table")
    lengths = lengths.long() + (problem.queries if problem.append else 0)
    positions = lengths[:, None] - problem.queries + torch.arange(problem.queries, device=query.device)
    if problem.append:
        right((query, key_cache, value_cache, tensors[3], options), problem)  # appends
    if problem.rotary_dim:
        query = rotated(query, positions, options["rotary_cos"], options["rotary_sin"], problem.interleaved)
    if table is not None:
        key_cache, value_cache = in_order(key_cache, table), in_order(value_cache, table)
    distance = positions[:, None, :, None] - torch.arange(key_cache.shape[2], device=query.device)
    seen = distance >= 0
    if problem.window >= 0:
        seen &= distance <= problem.window
    bias = torch.zeros(seen.shape, dtype=query.dtype, device=query.device)
    if problem.alibi:
        bias = (-options["alibi_slopes"][:, None, None] * distance).to(query.dtype)
    bias = bias.masked_fill(~seen, -torch.inf)
    output = F.scaled_dot_product_attention(query, key_cache, value_cache, bias, enable_gqa=True)
    return torch.where(seen.any(-1, keepdim=True), output, 0)


def check_right(tensors, problem, tiny=2e-6):
    wide, plain = widened(tensors), copied(tensors)
    theirs = torch_decode(tensors, problem)
    expected, expected_sum = right(wide, problem)
    same = copied(tensors)
    right(same, problem)  # appends in the tensors' own dtype
    output, logsumexp = decode(plain, problem)
    dtype = output.dtype
    assert_right(output, theirs, expected, tiny=tolerance(dtype, tiny) * max(1.0, expected.abs().max().item()))
    # 16-bit rotated queries and keys are rounded before they are multiplied
    loose = 3e-5 if dtype == torch.float32 or not problem.rotary_dim else 0.05 * problem.magnitude**2
    torch.testing.assert_close(logsumexp.double(), expected_sum, rtol=1e-5, atol=max(loose, tiny))
    for index, name in ((1, "key_cache"), (2, "value_cache")):
        bound = max(1.0, wide[index].abs().max().item())
        assert_right(plain[index], same[index], wide[index], tiny=tolerance(dtype) * bound, name=name)
        if not problem.append:
            assert torch.equal(plain[index], tensors[index])


CASES = {
    "plain": Problem(),
    "many heads a key head": Problem(heads=9, kv_heads=1, head_dim=64, value_dim=64),
    "several queries": Problem(queries=5, heads=6, kv_heads=2, head_dim=40, value_dim=40),
    "other value_dim": Problem(head_dim=128, value_dim=48, queries=2),
    "long heads": Problem(batch=1, head_dim=256, value_dim=256, capacity=140),
    "append": Problem(append=True, queries=3, capacity=150),
    "append the first keys": Problem(append=True, queries=7, capacity=7),
    "append, rotate": Problem(append=True, queries=2, rotary_dim=32, capacity=100),
    "append, rotate pairs of a part": Problem(append=True, rotary_dim=16, interleaved=True, capacity=100),
    "rotate the query": Problem(rotary_dim=24, queries=3),
    "paged": Problem(page_size=16, queries=2),
    "paged, append, rotate": Problem(page_size=7, append=True, queries=4, rotary_dim=32, capacity=150),
    "transposed": Problem(transposed=True, append=True),
    "window": Problem(window=20, queries=3),
    "window, paged": Problem(window=70, queries=2, page_size=32, append=True),
    "softcap": Problem(softcap=2.0),
    "alibi": Problem(alibi=True, queries=3),
    "all": Problem(alibi=True, softcap=5.0, window=100, page_size=8, append=True, queries=2, rotary_dim=8),
    "a given number of splits": Problem(num_splits=3),
    "one split": Problem(num_splits=1),
    "one key": Problem(lengths=(1, 1), capacity=1, queries=1),
    "more queries than keys": Problem(lengths=(2, 0), queries=4, rotary_dim=8),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
def test_output_logsumexp_and_cache(backend, case, dtype):
    problem = CASES[case]
    with lmengine.use_backend(backend):
        check_right(problem.tensors(dtype, device_of(backend)), problem)


@pytest.mark.parametrize("head_dim", [1, 3, 17, 33, 100, 130, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_head_dim_on_the_cpu(head_dim, dtype):
    problem = Problem(head_dim=head_dim, value_dim=head_dim + 2, queries=3, append=True, capacity=80)
    with lmengine.use_backend("cpu"):
        check_right(problem.tensors(dtype), problem)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
def test_a_batch_gives_the_bits_of_its_members(backend, dtype):
    """Whatever the batch, the threads, and the room in the cache."""
    lengths = (1100, 65, 640) if backend != "triton" or GPU else (300, 65, 170)  # in one split of the CPU, and in more
    problem = Problem(batch=3, kv_heads=1, queries=2, capacity=lengths[0], lengths=lengths, append=True)
    tensors = problem.tensors(dtype, device_of(backend))
    query, key_cache, value_cache, cached, options = tensors
    with lmengine.use_backend(backend):
        output, logsumexp = decode(copied(tensors), problem)
        for b, length in enumerate(lengths):
            one = slice(b, b + 1)
            member = {name: tensor[one] for name, tensor in options.items()}
            caches = (cache[one, :, :length].clone() for cache in (key_cache, value_cache))
            alone = decode((query[one], *caches, cached[one], member), problem)
            assert torch.equal(alone[0], output[one])
            assert torch.equal(alone[1], logsumexp[one])


@pytest.mark.parametrize("backend", BACKENDS)
def test_pages_give_the_bits_of_a_cache_in_one_piece(backend):
    problem = Problem(page_size=16, capacity=320, window=250)
    tensors = problem.tensors(torch.bfloat16, device_of(backend))
    table = tensors[4]["block_table"]
    with lmengine.use_backend(backend):
        paged = decode(tensors, problem)
        whole = decode((tensors[0], *(in_order(cache, table) for cache in tensors[1:3]), tensors[3], {}), problem)
    assert torch.equal(paged[0], whole[0]) and torch.equal(paged[1], whole[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("page_size", [0, 16])
def test_what_no_query_sees_is_not_read(backend, page_size):
    problem = Problem(queries=3, window=40, capacity=160, lengths=(97, 140), page_size=page_size)
    tensors = problem.tensors(torch.float32, device_of(backend))
    query, key_cache, value_cache, lengths, options = tensors
    with lmengine.use_backend(backend):
        expected = decode(copied(tensors), problem)
        if page_size:
            for b, length in enumerate((97, 140)):
                table = options["block_table"]
                first, behind = (length - 3 - 40) // 16, -(-length // 16)
                unseen = torch.cat([table[b, :first], table[b, behind:]]).long()
                key_cache[unseen] = value_cache[unseen] = torch.nan
                table[b, :first] = table[b, behind:] = -1
        else:
            for b, length in enumerate((97, 140)):
                for cache in (key_cache, value_cache):
                    cache[b, :, : length - 3 - 40] = torch.nan
                    cache[b, :, length:] = torch.inf
        found = decode((query, key_cache, value_cache, lengths, options), problem)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_nan_stays_in_its_sequence_and_is_not_hidden(backend, dtype):
    problem = Problem(batch=3, capacity=200, lengths=(200, 150, 170))
    tensors = problem.tensors(dtype, device_of(backend))
    with lmengine.use_backend(backend):
        clean = decode(tensors, problem)[0]
        tensors[1][1, 0, 140, 3] = torch.nan
        tensors[2][2, 1, 20, 5] = torch.inf
        output, logsumexp = decode(tensors, problem)
    assert output[1, :2].isnan().all() and logsumexp[1, :2].isnan().all()
    assert output[2, 2:, :, 5].isinf().all()
    assert torch.equal(output[0], clean[0]) and torch.equal(output[1, 2:], clean[1, 2:])
    assert torch.equal(output[2, :2], clean[2, :2])


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
def test_large_magnitudes(backend, dtype):
    problem = Problem(capacity=200, magnitude=6.0)
    with lmengine.use_backend(backend):
        check_right(problem.tensors(dtype, device_of(backend)), problem, tiny=3e-5)
        huge = dataclasses.replace(problem, magnitude=1e4)
        assert decode(huge.tensors(dtype, device_of(backend)), huge)[0].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend):
    device = device_of(backend)
    with lmengine.use_backend(backend):
        for changed in (
            {"batch": 0},
            {"queries": 0},
            {"heads": 0, "kv_heads": 0},
            {"capacity": 0},
            {"lengths": (0, 0)},
        ):
            problem = dataclasses.replace(Problem(capacity=20), **changed)
            output, logsumexp = decode(problem.tensors(torch.float32, device), problem)
            assert output.shape == (problem.batch, problem.heads, problem.queries, problem.value_dim)
            assert (output == 0).all() and (logsumexp == -torch.inf).all()
        problem = Problem(batch=0, append=True, page_size=4, rotary_dim=8)
        assert decode(problem.tensors(torch.float32, device), problem)[0].shape[0] == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_layouts(backend):
    """A slice of a wider cache, float32 tables for a 16-bit cache, slopes of each sequence, queries with a stride."""
    problem = Problem(append=True, rotary_dim=32, alibi=True, queries=2)
    query, key_cache, value_cache, lengths, options = problem.tensors(torch.bfloat16, device_of(backend))
    wide = [F.pad(cache, (8, 16, 0, 3), value=torch.nan) for cache in (key_cache, value_cache)]
    inside = [cache[:, :, :-3, 8:-16] for cache in wide]
    options |= {name: options[name].float() for name in ("rotary_cos", "rotary_sin")}
    with lmengine.use_backend(backend):
        expected = decode((query, key_cache, value_cache, lengths, options), problem)
        columns = query.transpose(2, 3).contiguous().transpose(2, 3)
        options["alibi_slopes"] = options["alibi_slopes"].expand(2, -1)
        found = decode((columns, *inside, lengths, options), problem)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    for cache, plain in zip(inside, (key_cache, value_cache), strict=True):
        assert torch.equal(cache, plain)
    assert all(cache[..., :8].isnan().all() and cache[..., -16:].isnan().all() for cache in wide)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_beyond_32_bits(backend):
    """Two sequences that lie more than 2^31 elements apart; what lies between them is never touched."""
    step = 2**31 + 64
    problem = Problem(heads=1, kv_heads=1, head_dim=16, value_dim=16, capacity=20, append=True)
    tensors = problem.tensors(torch.bfloat16, device_of(backend))
    memory = torch.empty(step + 20 * 16, dtype=torch.bfloat16, device=device_of(backend))
    far = memory.as_strided((2, 1, 20, 16), (step, 16, 16, 1))
    with lmengine.use_backend(backend):
        near = decode(copied(tensors), problem)
        for index in (1, 2):
            far.copy_(tensors[index])
            mixed = [far if i == index else tensor for i, tensor in enumerate(copied(tensors))]
            found = decode(mixed, problem)
            assert torch.equal(found[0], near[0]) and torch.equal(found[1], near[1])


def test_a_long_cache():
    problem = Problem(batch=1, heads=2, kv_heads=1, head_dim=64, value_dim=64, capacity=131072, lengths=(131072,))
    with lmengine.use_backend("cpu"):
        check_right(problem.tensors(torch.bfloat16), problem)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_the_bits(threads):
    problem = Problem(batch=1, heads=3, kv_heads=1, capacity=5000, lengths=(5000,))
    torch.manual_seed(threads)
    tensors = problem.tensors(torch.float32)
    before = torch.get_num_threads()
    with lmengine.use_backend("cpu"):
        expected = decode(tensors, problem)
        torch.set_num_threads(threads)
        try:
            found = decode(tensors, problem)
        finally:
            torch.set_num_threads(before)
    assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_what_the_cpu_refuses_by_name(backend):
    problem = Problem(append=True, capacity=20, lengths=(20, 7), rotary_dim=8)
    query, key_cache, value_cache, lengths, options = problem.tensors(torch.float32)
    before = key_cache.clone()
    with lmengine.use_backend(backend):
        message = r"cache_lengths\[1\]: expected a number from 0 to 19, got 20"
        with pytest.raises((ValueError, RuntimeError), match=message):
            attention_decode(query, key_cache, value_cache, torch.tensor([19, 20]).int(), **options)
        with pytest.raises((ValueError, RuntimeError), match=r"cache_lengths\[0\]: .*, got -1"):
            attention_decode(query, key_cache, value_cache, torch.tensor([-1, 3]).int(), **options)
        short = {name: table[:19] for name, table in options.items() if name.startswith("rotary")}
        with pytest.raises((ValueError, RuntimeError), match="rotary_cos: expected at least 20 positions, got 19"):
            attention_decode(query, key_cache, value_cache, lengths, **{**options, **short})
        assert torch.equal(key_cache, before)
        paged = dataclasses.replace(problem, page_size=4, append=False)
        query, key_cache, value_cache, lengths, options = paged.tensors(torch.float32)
        for wrong in (-1, len(key_cache)):
            options["block_table"][1, 1] = wrong
            with pytest.raises((ValueError, RuntimeError), match=rf"block_table\[1.*got .*{wrong}"):
                attention_decode(query, key_cache, value_cache, lengths, **options)
        options["block_table"][1, 1:] = 0  # sequence 1 has 7 keys, in two pages
        options["block_table"][1, 2:] = -5
        attention_decode(query, key_cache, value_cache, lengths, **options)


def test_wrong_arguments_are_named():
    problem = Problem(append=True, rotary_dim=8)
    query, key_cache, value_cache, lengths, options = problem.tensors(torch.float32)

    def refused(match, error=ValueError, **changed):
        arguments = dict(query=query, key_cache=key_cache, value_cache=value_cache, cache_lengths=lengths, **options)
        with pytest.raises(error, match=match):
            attention_decode(**{**arguments, **changed})

    refused(r"query: expected four dimensions", query=query[0])
    refused(r"key_cache: expected torch.float32", TypeError, key_cache=key_cache.half())
    refused(
        r"key_cache: expected a number of heads that divides the query's 4, got 3", key_cache=torch.randn(2, 3, 300, 32)
    )
    refused(r"key_cache: expected a last dimension of stride 1", key_cache=torch.randn(2, 2, 300, 64)[..., ::2])
    refused(r"value_cache: expected \(2, 2, 300\)", value_cache=torch.randn(2, 2, 299, 32))
    refused(r"cache_lengths: expected torch.int32, got torch.int64", TypeError, cache_lengths=lengths.long())
    refused(r"cache_lengths: expected shape \(2,\)", cache_lengths=lengths[:1])
    refused(r"value: expected to be given", value=None)
    refused(r"key: expected \(2, 2, 1, 32\), got \(2, 4, 1, 32\)", key=torch.randn(2, 4, 1, 32))
    refused(r"rotary_sin: expected to be given", rotary_sin=None)
    refused(r"rotary_sin: expected shape", rotary_sin=torch.randn(300, 5))
    refused(r"rotary_cos: expected \(positions, rotary_dim / 2\)", rotary_cos=torch.randn(300, 20))
    refused(
        r"rotary_cos: expected float32 or torch.float32, got torch.float64",
        TypeError,
        rotary_cos=torch.randn(300, 4).double(),
    )
    refused(
        r"block_table: expected torch.int32",
        TypeError,
        block_table=torch.zeros(2, 3).long(),
        key_cache=torch.randn(6, 16, 2, 32),
        value_cache=torch.randn(6, 16, 2, 32),
    )
    refused(r"alibi_slopes: expected shape \(4,\)", alibi_slopes=torch.randn(3))
    refused(r"window_size: expected two numbers", window_size=(-2, 0))
    refused(r"softcap: expected a number from 0 up", softcap=-1.0)
    refused(r"num_splits: expected a number from 0 up", num_splits=-1)


def test_a_gradient_is_refused():
    problem = Problem(append=True)
    query, key_cache, value_cache, lengths, options = problem.tensors(torch.float32)
    with pytest.raises(ValueError, match="query: expected a tensor that requires no gradient"):
        attention_decode(query.detach().requires_grad_(), key_cache, value_cache, lengths, **options)
    options["value"] = options["value"].detach().requires_grad_()
    with pytest.raises(ValueError, match="value: expected a tensor that requires no gradient"):
        attention_decode(query, key_cache, value_cache, lengths, **options)
    with torch.no_grad():
        attention_decode(query, key_cache, value_cache, lengths, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("page_size", [0, 8])
def test_opcheck(backend, page_size):
    problem = Problem(
        batch=1, heads=2, kv_heads=1, capacity=24, append=True, rotary_dim=8, alibi=True, page_size=page_size
    )
    *arguments, options = problem.tensors(torch.bfloat16, device_of(backend))
    name = "attention_decode_triton" if backend == "triton" else "attention_decode"
    operator = getattr(torch.ops.lmengine, name).default
    torch.library.opcheck(operator, (*arguments, *lowered(arguments[0], 0.2, **options)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_without_graph_breaks(backend, compiler, dynamic):
    torch._dynamo.reset()

    def layer(query, key_cache, value_cache, lengths, **options):
        return attention_decode(query * 2, key_cache, value_cache, lengths, **options).sin()

    compiled = torch.compile(layer, fullgraph=True, backend=compiler, dynamic=dynamic)
    with lmengine.use_backend(backend):
        for batch in (3, 2) if dynamic else (3,):
            problem = Problem(batch=batch, append=True, rotary_dim=8, capacity=50)
            tensors = problem.tensors(torch.float32, device_of(backend))
            (*ours, options), (*eager, _) = copied(tensors), copied(tensors)
            torch.testing.assert_close(compiled(*ours, **options), layer(*eager, **options))
            for index in (1, 2):
                assert torch.equal(ours[index], eager[index])
                assert not torch.equal(ours[index], tensors[index])


def test_the_reference_is_differentiable():
    problem = Problem(batch=1, heads=2, kv_heads=1, capacity=6, head_dim=4, value_dim=4, lengths=(6,), rotary_dim=4)
    query, key_cache, value_cache, lengths, options = problem.tensors(torch.float64)
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key_cache, value_cache)]
    torch.autograd.gradcheck(lambda q, k, v: reference(q, k, v, lengths, **options)[0], leaves)


@pytest.mark.skipif(unusable("cpu") is not None, reason=str(unusable("cpu")))
@pytest.mark.parametrize("instructions", ["avx2", "avx512"])
def test_older_processors(instructions):
    code = (
        "import torch, lmengine, tests.attention.test_decoding as t\n"
        "print(lmengine.info()['instruction set'])\n"
        "with lmengine.use_backend('cpu'):\n"
        "    for dtype in t.DTYPES:\n"
        "        for problem in (t.CASES[c] for c in ('all', 'several queries', 'other value_dim', 'paged, append, rotate')):\n"
        "            t.check_right(problem.tensors(dtype), problem)\n"
        "        t.test_any_head_dim_on_the_cpu(37, dtype)\n"
    )
    environment = {**os.environ, "LMENGINE_ISA": instructions}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] in (instructions, "avx2")
