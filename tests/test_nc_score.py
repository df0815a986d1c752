"""nc_score against its definition: every kernel, every input, rows built to sit on the thresholds.

`agree` holds the results of one scoring against reference.py: votes, decisions, top class and top
probability must be equal on every row, and the float results within the proven bound.
"""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import genkl_ext as gk
from genkl_ext import _native, ops, reference
from genkl_ext.rule import sum_tolerance

KERNELS = _native.build_info()["simd_supported"]
CLASSES = [2, 3, 7, 8, 9, 14, 15, 16, 17, 31, 32, 33, 50, 64, 101, 127, 128, 129, 1000]


@pytest.fixture(params=KERNELS)
def kernel(request):
    return request.param


def run(models, rule, *, logits=False, kernel="", threads=2, alpha=None, tau=None):
    vectors, entropies, ballot = rule._distinct
    return _native.nc_score(
        models, vectors, entropies, rule.alpha if alpha is None else alpha,
        rule.tau if tau is None else tau, ballot, logits, threads, kernel,
    )  # fmt: skip


def agree(got, models, rule, *, logits=False, alpha=None, tau=None):
    """Raise unless `got` is what the definition says of every row."""
    alpha = rule.alpha if alpha is None else alpha
    tau = rule.tau if tau is None else tau
    critical_alpha, divergence, votes, top_class, top_prob, first_bad_row = map(np.asarray, got)
    wanted = reference.nc_score(models, rule.vectors, alpha, tau, logits=logits)
    np.testing.assert_array_equal(votes, wanted.votes)
    np.testing.assert_array_equal(top_class, wanted.top_class)
    np.testing.assert_array_equal(top_prob, wanted.top_prob.astype(np.float32))
    np.testing.assert_allclose(
        critical_alpha, wanted.critical_alpha, rtol=rule.resolution, atol=1e-30
    )
    scale = np.abs(rule.entropies).max() * (alpha + np.abs(wanted.critical_alpha))
    finite = np.isfinite(wanted.divergence)
    error = np.abs(divergence[finite] - wanted.divergence[finite])
    smallest = 2.0**-149  # a divergence of either sign may be rounded to it
    assert (error <= 2 * rule.resolution * scale[finite] + smallest).all()
    # The stored numbers tell the same decision as the votes.
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(critical_alpha.astype(np.float64) >= alpha, votes > 0)
        np.testing.assert_array_equal(divergence >= 0, votes > 0)
    tolerance = sum_tolerance(models[0].dtype)
    assert int(first_bad_row) == reference.first_bad_row(models, logits=logits, tolerance=tolerance)


def rows_of(classes, rows, seed, spread=1.0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return reference.softmax(rng.normal(size=(rows, classes)) * spread).astype(dtype)


def rule_of(classes, *, alpha=1.05, sigma=0.4, vectors=20, beta=0.4, seed=0):
    """A rule for k classes; beta and sigma in units of 1/k."""
    return gk.GenKL(classes, alpha, beta / classes, sigma / classes, vectors, seed)


def awkward_rows(rule, seed=0):
    """(N, k) float32 rows that sit where kernels go wrong."""
    k, tau = rule.num_classes, np.float32(rule.tau)
    below, above = np.nextafter(tau, np.float32(0)), np.nextafter(tau, np.float32(1))
    rng = np.random.default_rng(seed)
    rows = []

    def put(head, tail_sum):
        """`head` first, the rest sharing tail_sum; in a random order of the classes."""
        q = np.zeros(k, dtype=np.float32)
        q[: len(head)] = head
        if k > len(head):
            q[len(head) :] = max(tail_sum, 0) / (k - len(head))
        rows.append(rng.permutation(q))

    for edge in (below, tau, above):
        for n in {1, 2, k // 2, k - 1} - {0}:
            rest = 1 - n * float(edge)
            if n < k and rest > 0:
                put([edge] * n + [rest], 0.0)  # n entries on the edge, one takes the rest
                put([edge] * n, rest)
    put([1.0], 0.0)
    put([0.5, 0.5], 0.0)
    put([np.nextafter(np.float32(0.5), np.float32(1)), 0.5], 0.0)
    put([], 1.0)
    put([1 - 1e-7], 1e-7)
    put([0.9], 0.1)
    put([1.0, 1e-40], 0.0)  # subnormal
    put([np.float32(1.0000002)], 0.0)  # a softmax may overshoot
    put([0.999], 0.0)
    put([-0.0, 1.0], 0.0)
    for p in np.linspace(1 / k, 1, 30):
        put([p], 1 - p)
    return np.array(rows)


def near_alpha(q, rule, row):
    """Alphas around every a_j of one row: exactly there, one ulp and 1e-7 to either side."""
    cross = reference.cross_terms(q[row : row + 1], rule.vectors, rule.tau)[0]
    for a in np.unique(cross / reference.entropies(rule.vectors)):
        if a > 0:
            yield from (a, np.nextafter(a, 0), np.nextafter(a, 9), a * (1 - 1e-7), a * (1 + 1e-7))


@pytest.mark.parametrize("classes", CLASSES)
def test_random_rows(classes, kernel):
    for sigma, vectors in ((0.4, 20), (0.0, 20), (0.4, 1), (0.4, 3), (0.7, 33)):
        rule = rule_of(classes, sigma=sigma, vectors=vectors)
        for spread in (0.05, 0.5, 1.0, 2.0, 5.0, 20.0):
            q = rows_of(classes, 75, int(spread * 10), spread)
            agree(run([q], rule, kernel=kernel), [q], rule)


@pytest.mark.parametrize("classes", CLASSES)
def test_awkward_rows(classes, kernel):
    for beta in (0.4, -0.5, 0.999):
        for sigma in (0.4, 0.0):
            rule = rule_of(classes, sigma=sigma, beta=beta)
            q = awkward_rows(rule)
            agree(run([q], rule, kernel=kernel), [q], rule)


@pytest.mark.parametrize("classes", [2, 9, 14, 33, 50, 101])
@pytest.mark.parametrize("sigma", [0.4, 0.0])
def test_alpha_next_to_the_critical_alpha(classes, sigma, kernel):
    rule = rule_of(classes, sigma=sigma)
    q = np.concatenate([awkward_rows(rule), rows_of(classes, 40, 1, 0.6)])
    rng = np.random.default_rng(classes)
    for row in rng.choice(len(q), 6, replace=False):
        for alpha in near_alpha(q, rule, row):
            agree(run([q], rule, kernel=kernel, alpha=alpha), [q], rule, alpha=alpha)


@pytest.mark.parametrize("classes", [2, 8, 16, 32, 64, 128])
def test_exact_ties_vote(classes, kernel):
    """Uniform predictions, sigma = 0, alpha = 1: D = 0 exactly, and equality votes NC."""
    rule = rule_of(classes, sigma=0.0, alpha=1.0)
    q = np.full((5, classes), 1 / classes, dtype=np.float32)
    got = run([q], rule, kernel=kernel)
    agree(got, [q], rule)
    assert (got[2] == 20).all() and (got[1] == 0).all()


@pytest.mark.parametrize("alpha", [0.0, 1e-30, 1e30])
def test_extreme_alpha(alpha, kernel):
    rule = rule_of(14)
    q = awkward_rows(rule)
    agree(run([q], rule, kernel=kernel, alpha=alpha), [q], rule, alpha=alpha)


@pytest.mark.parametrize("tau", [1e-3, 1e-9, 1e-20, 1e-39, 1e-50])
def test_small_tau(tau, kernel):
    """Down to thresholds that are subnormal, or nothing, in float32 and float16."""
    rule = rule_of(14)
    q = rows_of(14, 60, 0, 12.0)
    q[0] = [1.0] + [1e-41] * 13
    for dtype in (np.float32, np.float16, np.float64):
        x = q.astype(dtype)
        agree(run([x], rule, kernel=kernel, tau=tau), [x], rule, tau=tau)


@pytest.mark.parametrize("models", [2, 3, 5, 64])
@pytest.mark.parametrize("classes", [3, 14, 50, 129])
def test_averages(models, classes, kernel):
    for sigma in (0.4, 0.0):
        rule = rule_of(classes, sigma=sigma)
        for dtype in (np.float32, np.float16, np.float64):
            q = [rows_of(classes, 70, i, 0.7, dtype) for i in range(models)]
            agree(run(q, rule, kernel=kernel), q, rule)


def test_an_average_on_the_threshold(kernel):
    """Three models whose float32 mean, in this order and by division, is tau to the last bit."""
    rule = gk.GenKL.preset("clothing1m")
    tau = np.float32(rule.tau)
    candidates = (tau + np.arange(-40, 41) * np.spacing(tau)).astype(np.float32)
    a, b = np.meshgrid(candidates, candidates)
    q = [rows_of(14, a.size, i, 0.3) for i in range(3)]
    for model, edge in zip(q, (a.ravel(), b.ravel(), np.full(a.size, tau)), strict=True):
        model[:, 5] = 0
        model *= ((1 - edge) / model.sum(1))[:, None]
        model[:, 5] = edge
    steps = np.round((reference.average(q)[:, 5] - tau) / np.spacing(tau))
    assert (steps == 0).any() and (steps == -1).any() and ((steps > 0) & (steps <= 2)).any()
    agree(run(q, rule, kernel=kernel), q, rule)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
@pytest.mark.parametrize("classes", [2, 14, 33, 101])
def test_dtypes(dtype, classes, kernel):
    for sigma in (0.4, 0.0):
        rule = rule_of(classes, sigma=sigma)
        q = np.concatenate([awkward_rows(rule), rows_of(classes, 60, 2)]).astype(dtype)
        tau = np.asarray(rule.tau).astype(dtype)
        q[-1, :3] = [tau, np.nextafter(tau, dtype(0)), np.nextafter(tau, dtype(1))][:classes]
        agree(run([q], rule, kernel=kernel), [q], rule)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
@pytest.mark.parametrize("classes", [2, 14, 33, 101])
def test_logits(dtype, classes, kernel):
    for models in (1, 3):
        for spread in (0.1, 3.0, 300.0):
            rng = np.random.default_rng(models)
            q = [(rng.normal(size=(50, classes)) * spread).astype(dtype) for _ in range(models)]
            q[0][0] = 1.5
            rule = rule_of(classes)
            agree(run(q, rule, kernel=kernel, logits=True), q, rule, logits=True)


def layouts(q):
    yield "transposed", np.asfortranarray(q)
    yield "every second row", np.repeat(q, 2, axis=0)[::2]
    yield "every second class", np.repeat(q, 2, axis=1)[:, ::2]
    yield "reversed", q[::-1, ::-1].copy()[::-1, ::-1]
    yield "one row", np.broadcast_to(q[:1], q.shape)
    yield "columns of a wider array", np.pad(q, ((0, 0), (3, 2)))[:, 3:-2]
    record = np.zeros(len(q), dtype=[("x", "u1"), ("q", q.dtype, q.shape[1])])
    record["q"] = q
    yield "unaligned field of a record", record["q"]


@pytest.mark.parametrize("classes", [2, 14, 50])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_layouts(classes, dtype, kernel):
    rule = rule_of(classes)
    q = rows_of(classes, 150, 0, dtype=dtype)
    for _, view in layouts(q):
        agree(run([view], rule, kernel=kernel), [view], rule)
        agree(run([view, q], rule, kernel=kernel), [view, q], rule)


@pytest.mark.parametrize("rows", [0, 1, 2, 7, 8, 9, 15, 16, 17, 255, 65_537, 200_001])
def test_row_counts(rows, kernel):
    rule = rule_of(14)
    q = rows_of(14, rows, rows)
    for threads in (1, 3):
        agree(run([q], rule, kernel=kernel, threads=threads), [q], rule)


def test_one_thread_or_many_the_same_bytes(kernel):
    for classes in (14, 101):
        rule = rule_of(classes)
        q = rows_of(classes, 60_000, 5)
        one, many = (run([q], rule, kernel=kernel, threads=n) for n in (1, 7))
        for a, b in zip(one[:5], many[:5], strict=True):
            assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("classes", [8, 14, 33, 50, 101, 300])
def test_numbers_of_a_row_do_not_depend_on_its_neighbours(classes, kernel):
    """Rows with few dominant entries and rows with many are walked differently, and in blocks."""
    rule = rule_of(classes)
    rng = np.random.default_rng(0)
    q = np.concatenate([rows_of(classes, 60, i, s) for i, s in enumerate((0.1, 0.6, 1.0, 4.0))])
    whole = run([q], rule, kernel=kernel)
    for rows in (np.arange(60), rng.permutation(len(q)), np.array([7]), np.array([200])):
        part = run([q[rows]], rule, kernel=kernel)
        for a, b in zip(whole[:5], part[:5], strict=True):
            assert a[rows].tobytes() == b.tobytes()


def test_scoring_from_several_threads():
    rule = rule_of(14)
    q = rows_of(14, 50_000, 5)
    wanted = rule.score(q).critical_alpha.tobytes()
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(rule.score(q).critical_alpha.tobytes()))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [wanted] * 4


def test_offsets_beyond_31_bits(kernel):
    """Rows 2^30 entries apart in a sparse mapping."""
    rule = rule_of(14)
    q = rows_of(14, 4, 0)
    base = np.zeros(3 * 2**30 + 14, dtype=np.float32)
    view = np.lib.stride_tricks.as_strided(base, (4, 14), (2**32, 4))
    view[:] = q
    agree(run([view], rule, kernel=kernel), [q], rule)
    agree(run([view, view], rule, kernel=kernel), [q, q], rule)


def test_memory_map(tmp_path):
    rule = rule_of(14)
    q = rows_of(14, 1000, 0)
    np.save(tmp_path / "q.npy", q)
    mapped = np.load(tmp_path / "q.npy", mmap_mode="r")
    np.testing.assert_array_equal(rule.score(mapped).critical_alpha, rule.score(q).critical_alpha)


def test_more_classes_than_the_fast_path_takes(kernel):
    rule = rule_of(70_000, vectors=2)
    q = rows_of(70_000, 3, 0)
    agree(run([q], rule, kernel=kernel), [q], rule)


def test_dense_rows_of_many_classes(kernel):
    rule = rule_of(4096, beta=0.9)
    q = np.concatenate([rows_of(4096, 20, 0, 0.3), rows_of(4096, 20, 1, 3.0)])
    agree(run([q], rule, kernel=kernel), [q], rule)


def test_invalid_rows(kernel):
    rng = np.random.default_rng(0)
    for classes in (3, 14, 50, 101):
        for sigma in (0.4, 0.0):
            rule = rule_of(classes, sigma=sigma)
            for value in (np.nan, np.inf, -np.inf, -1e-30, -0.3, 0.9, 1.1e-3):
                q = rows_of(classes, 90, 0)
                rows = rng.choice(90, 3, replace=False)
                q[rows, rng.integers(classes)] += np.float32(value)
                agree(run([q], rule, kernel=kernel), [q], rule)
                # A negative entry in a row that sums to 1 all the same.
                if value in (-1e-30, -0.3):
                    p = rows_of(classes, 90, 0)
                    p[rows, 1] = value
                    p[rows, 0] = 1 - np.delete(p[rows], 0, axis=1).sum(1)
                    agree(run([p], rule, kernel=kernel), [p], rule)
                good = rows_of(classes, 90, 1)
                agree(run([good, q], rule, kernel=kernel), [good, q], rule)
                half, good_half = q.astype(np.float16), good.astype(np.float16)
                agree(run([half], rule, kernel=kernel), [half], rule)
                agree(run([half, good_half], rule, kernel=kernel), [half, good_half], rule)
                agree(run([q], rule, kernel=kernel, logits=True), [q], rule, logits=True)


def test_the_sum_is_judged_in_float64(kernel):
    """Rows whose sum is 1 + 1e-3 to within a few float32 ulp."""
    rule = rule_of(14)
    for offset in range(-6, 7):
        q = rows_of(14, 20, 3)
        q[11, 0] += np.float32(1e-3) + np.float32(offset * 1.2e-7) - (q[11].sum() - 1)
        agree(run([q], rule, kernel=kernel), [q], rule)


@given(data=st.data())
def test_search(data):
    """Any small input, drawn from numbers that matter to the rule."""
    classes = data.draw(st.integers(2, 40), label="classes")
    rule = gk.GenKL(
        classes,
        alpha=data.draw(st.floats(0, 4), label="alpha"),
        beta=data.draw(st.floats(-1, 0.999), label="beta * k") / classes,
        sigma=data.draw(st.sampled_from([0.0, 0.01, 0.05, 0.5]), label="sigma"),
        num_vectors=data.draw(st.integers(1, 23), label="vectors"),
        seed=data.draw(st.integers(0, 3), label="seed"),
    )
    tau = np.float32(rule.tau)
    weights = st.one_of(
        st.floats(0, 1, width=32),
        st.sampled_from([0.0, float(tau), float(np.nextafter(tau, np.float32(0))), 1.0, 1e-40]),
    )
    rows = data.draw(st.integers(0, 20), label="rows")
    models = [
        np.array(
            data.draw(
                st.lists(
                    st.lists(weights, min_size=classes, max_size=classes),
                    min_size=rows,
                    max_size=rows,
                )
            ),
            dtype=np.float32,
        ).reshape(rows, classes)
        for _ in range(data.draw(st.integers(1, 3), label="models"))
    ]
    if data.draw(st.booleans(), label="normalise"):
        models = [m / np.maximum(m.sum(1, keepdims=True), np.float32(1e-30)) for m in models]
    kernel = data.draw(st.sampled_from(KERNELS), label="kernel")
    agree(run(models, rule, kernel=kernel), models, rule)


@pytest.mark.parametrize("classes", CLASSES[1:])
@pytest.mark.parametrize("sigma", [0.4, 0.0])
def test_ordinary_rows_take_the_fast_path(classes, sigma, kernel):
    """Settled rows come out correctly rounded; were all of them, this would be no fast path."""
    rule = rule_of(classes, sigma=sigma)
    q = np.concatenate([rows_of(classes, 300, 0, spread) for spread in (1.0, 3.0)])
    got = run([q], rule, kernel=kernel)[0]
    exact = reference.nc_score([q], rule.vectors, rule.alpha, rule.tau).critical_alpha
    assert (got != exact.astype(np.float32)).mean() > 0.02


def test_real_predictions(shared_data, kernel):
    """Cross-validated softmax vectors of a ResNet-50 on CIFAR-10, float16."""
    files = sorted((shared_data / "softmax").glob("*_probs.npy"))
    assert files
    rule = gk.GenKL(10, alpha=1.05, beta=0.03, sigma=0.05)
    arrays = [np.load(f) for f in files]
    for q in arrays:
        agree(run([q], rule, kernel=kernel), [q], rule)
    agree(run(arrays, rule, kernel=kernel), arrays, rule)


# ---- the torch operator --------------------------------------------------------------------------


def on(device, rule):
    return rule._distinct_on(torch.device(device))


def run_op(tensors, rule, *, logits=False, alpha=None, tau=None):
    vectors, entropies, ballot = on(tensors[0].device, rule)
    got = ops.nc_score(
        tensors, vectors, entropies, rule.alpha if alpha is None else alpha,
        rule.tau if tau is None else tau, ballot=ballot, logits=logits,
    )  # fmt: skip
    return [t.cpu().numpy() for t in got[:5]] + [int(got[5])]


@pytest.mark.parametrize("classes", [2, 14, 31, 32, 33, 50, 101, 128, 1000])
@pytest.mark.parametrize("sigma", [0.4, 0.0])
def test_operator(classes, sigma, device):
    rule = rule_of(classes, sigma=sigma)
    q = np.concatenate([awkward_rows(rule)] + [rows_of(classes, 90, 0, s) for s in (0.2, 1, 5)])
    for dtype in (np.float32, np.float16, np.float64):
        x = q.astype(dtype)
        agree(run_op([torch.tensor(x, device=device)], rule), [x], rule)
    for models in (2, 3):
        x = [rows_of(classes, 70, i) for i in range(models)]
        agree(run_op([torch.tensor(a, device=device) for a in x], rule), x, rule)
        agree(run_op([torch.tensor(a, device=device) for a in x], rule, logits=True), x, rule,
              logits=True)  # fmt: skip


@pytest.mark.parametrize("classes", [2, 14, 33, 101])
def test_operator_next_to_the_critical_alpha(classes, device):
    rule = rule_of(classes)
    q = np.concatenate([awkward_rows(rule), rows_of(classes, 40, 1, 0.6)])
    for alpha in list(near_alpha(q, rule, 3))[:20]:
        agree(run_op([torch.tensor(q, device=device)], rule, alpha=alpha), [q], rule, alpha=alpha)


@pytest.mark.parametrize("classes", [14, 101])
def test_operator_on_strided_tensors(classes, device):
    rule = rule_of(classes)
    q = rows_of(classes, 130, 0)
    t = torch.tensor(q, device=device)
    for view in (t.T.contiguous().T, t.repeat_interleave(2, 0)[::2], t[:1].expand(130, -1), t[5:]):
        agree(run_op([view], rule), [view.cpu().numpy()], rule)
        agree(run_op([view, t[: len(view)]], rule), [view.cpu().numpy(), q[: len(view)]], rule)


@pytest.mark.parametrize("classes", [2, 14, 50])
def test_bfloat16(classes, device):
    """bfloat16 rows, and tau rounded to bfloat16; the reference reads them as float32."""
    rule = rule_of(classes)
    q = torch.tensor(np.concatenate([awkward_rows(rule), rows_of(classes, 80, 0)])).bfloat16()
    tau = torch.tensor(rule.tau, dtype=torch.float64).bfloat16()
    q[-1, 0] = tau
    got = run_op([q.to(device)], rule)
    x = q.float().numpy()
    wanted = reference.nc_score([x], rule.vectors, rule.alpha, float(tau))
    np.testing.assert_array_equal(got[2], wanted.votes)
    np.testing.assert_array_equal(got[3], wanted.top_class)
    np.testing.assert_allclose(got[0], wanted.critical_alpha, rtol=rule.resolution)
    got = run_op([q.to(device), q.flip(0).to(device)], rule)
    np.testing.assert_array_equal(
        got[2], reference.nc_score([x, x[::-1]], rule.vectors, rule.alpha, rule.tau).votes
    )


def test_opcheck(device):
    rule = rule_of(14)
    vectors, entropies, ballot = on(device, rule)
    for rows in (0, 33):
        q = [torch.tensor(rows_of(14, rows, i), device=device) for i in range(2)]
        torch.library.opcheck(
            torch.ops.genkl_ext.nc_score.default,
            (q, vectors, entropies, rule.alpha, rule.tau, ballot, False),
        )


def test_compiles_into_a_graph():
    rule = rule_of(14)
    vectors, entropies, ballot = on("cpu", rule)

    def flagged(q):
        return ops.nc_score([q], vectors, entropies, rule.alpha, rule.tau, ballot=ballot)[2] > 0

    q = torch.tensor(rows_of(14, 64, 0, 0.4))
    compiled = torch.compile(flagged, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q), flagged(q))


def test_operator_honours_torch_threads():
    before = torch.get_num_threads()
    rule = rule_of(14)
    q = torch.tensor(rows_of(14, 100_000, 0))
    try:
        torch.set_num_threads(1)
        one = rule.score(q).critical_alpha
        torch.set_num_threads(2)
        assert torch.equal(one, rule.score(q).critical_alpha)
    finally:
        torch.set_num_threads(before)


def test_operator_refuses_what_would_read_wild():
    rule = rule_of(14)
    vectors, entropies, _ = on("cpu", rule)
    q = torch.tensor(rows_of(14, 5, 0))

    def call(predictions=None, held=vectors, bits=entropies, tau=rule.tau):
        ops.nc_score(predictions or [q], held, bits, 1.0, tau)

    for wrong in (
        {"predictions": [q[0]]},
        {"predictions": [q, q[:4]]},
        {"predictions": [q.int()]},
        {"predictions": [q] * 65},
        {"held": vectors[:, :13]},
        {"held": vectors.float()},
        {"held": vectors.T.contiguous().T},
        {"bits": entropies[:3]},
        {"tau": 0.0},
    ):
        with pytest.raises(RuntimeError, match="nc_score: "):
            call(**wrong)


def test_unknown_kernel(monkeypatch):
    rule = rule_of(14)
    q = rows_of(14, 5, 0)
    with pytest.raises(ValueError, match="no kernel for sse9 on this processor"):
        run([q], rule, kernel="sse9")
    monkeypatch.setenv("GENKL_SIMD", "portable")
    assert _native.build_info()["simd"] == "portable"
