"""The training objective against its published form and its known gradient."""

import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from genkl_ext.objective import (
    CLEAN,
    NC,
    NNC,
    Mixup,
    Objective,
    double_hot_loss,
    soft_cross_entropy,
)

K = 5


def make_batch(seed, clean=4, nnc=6, nc=3, dtype=torch.float64, spread=2.0):
    """Shuffled logits, targets and groups of a batch."""
    rng = np.random.default_rng(seed)
    groups = np.repeat([CLEAN, NNC, NC], [clean, nnc, nc])
    t = np.zeros((len(groups), K))
    rows = np.arange(len(groups))
    t[rows, rng.integers(0, K, len(rows))] = rng.uniform(1 / K, 1, len(rows))
    t[rows, rng.integers(0, K, len(rows))] += rng.uniform(0.04, 0.2, len(rows))
    t[groups == CLEAN] = np.eye(K)[rng.integers(0, K, clean)]
    t[groups == NC] = 1 / K
    order = rng.permutation(len(groups))
    logits = torch.tensor(rng.standard_normal(t.shape) * spread, dtype=dtype)
    return logits, torch.tensor(t[order], dtype=dtype), torch.tensor(groups[order])


def naive(objective, logits, t, groups, mixup):
    """The published form: logarithms of softmax outputs and inner products, group by group."""
    p = logits.softmax(dim=1)

    def hot(rows):
        own = -(p[rows] * t[rows]).sum(1).log()
        if mixup is None:
            return own
        other = -(p[rows] * t[mixup.partner[rows]]).sum(1).log()
        w = mixup.weight[rows].double()
        return w * own + (1 - w) * other

    clean, nnc, nc = (torch.nonzero(groups == g).flatten() for g in (CLEAN, NNC, NC))
    l_clean = hot(clean).mean() if len(clean) else 0.0
    l_nnc = hot(nnc).mean() if len(nnc) else 0.0
    l_nc = -(t[nc] * p[nc].log()).sum(1).mean() if len(nc) else 0.0
    total = objective.clean * l_clean + objective.nnc * l_nnc + objective.nc * l_nc
    return total / objective.batch_size, l_clean, l_nnc, l_nc


class TestDoubleHotLoss:
    def test_by_hand(self):
        t = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.9, 0.0]], dtype=torch.float64)
        p = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]], dtype=torch.float64)
        expected = [-math.log(0.7 * 0.5 + 0.3 * 0.25), -math.log(0.9 * 0.2)]
        np.testing.assert_allclose(double_hot_loss(p.log(), t), expected, rtol=1e-14)

    def test_one_hot_is_cross_entropy(self):
        logits, _, _ = make_batch(0)
        y = torch.arange(len(logits)) % K
        loss = double_hot_loss(logits, torch.eye(K, dtype=torch.float64)[y])
        expected = torch.nn.functional.cross_entropy(logits, y, reduction="none")
        torch.testing.assert_close(loss, expected)

    def test_gradient_is_p_minus_rho(self):
        logits, t, _ = make_batch(1)
        logits.requires_grad_()
        double_hot_loss(logits, t).sum().backward()
        p = logits.detach().softmax(dim=1)
        rho = t * p / (t * p).sum(dim=1, keepdim=True)
        torch.testing.assert_close(logits.grad, p - rho, rtol=1e-12, atol=1e-14)

    def test_gradcheck(self):
        logits, t, _ = make_batch(2)
        assert gradcheck(lambda x: double_hot_loss(x, t), logits.requires_grad_())

    def test_scale_of_the_target_does_not_matter(self):
        logits, t, _ = make_batch(3)
        a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        loss, scaled = double_hot_loss(a, t), double_hot_loss(b, 8 * t)
        torch.testing.assert_close(loss - scaled, torch.full_like(loss, math.log(8)))
        loss.sum().backward()
        scaled.sum().backward()
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-14)

    @pytest.mark.parametrize("size", [1e2, 1e4, 1e30])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_extreme_logits(self, size, dtype):
        # Where softmax underflows, the published form gives ln 0 and a NaN gradient.
        logits = torch.tensor([[size, 0, -size], [-size, size, 0]], dtype=dtype).requires_grad_()
        t = torch.tensor([[0.0, 0.3, 0.7], [0.6, 0.0, 0.1]], dtype=dtype)
        loss = double_hot_loss(logits, t)
        assert torch.isfinite(loss).all()
        expected = torch.tensor([size, size], dtype=dtype)
        torch.testing.assert_close(loss.detach(), expected, rtol=0.03, atol=0)
        loss.sum().backward()
        # All of rho lies on the less unlikely of the two hot classes.
        torch.testing.assert_close(
            logits.grad, torch.tensor([[1.0, -1, 0], [0, 1, -1]], dtype=dtype)
        )

    def test_lower_bound(self):
        # -ln max t, reached where p is one-hot there; negative when both hot entries coincide.
        t = torch.tensor([[0.0, 1.1]])
        assert double_hot_loss(torch.tensor([[-50.0, 50.0]]), t).item() == pytest.approx(
            -math.log(1.1)
        )

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_logits_are_summed_in_float32(self, dtype):
        logits, t, _ = make_batch(4)
        loss = double_hot_loss(logits.to(dtype), t.float())
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, double_hot_loss(logits.to(dtype).float(), t.float()))


class TestSoftCrossEntropy:
    def test_uniform_target(self):
        logits, _, _ = make_batch(5)
        t = torch.full_like(logits, 1 / K)
        torch.testing.assert_close(
            soft_cross_entropy(logits, t), -logits.log_softmax(dim=1).mean(dim=1)
        )
        assert soft_cross_entropy(torch.zeros(1, K), t[:1].float()).item() == pytest.approx(
            math.log(K)
        )

    def test_zero_target_and_impossible_class(self):
        logits = torch.tensor([[1e4, -1e4]], requires_grad=True)
        loss = soft_cross_entropy(logits, torch.tensor([[1.0, 0.0]]))
        loss.sum().backward()
        assert loss.item() == 0  # the published 0 * ln 0 is NaN
        assert torch.isfinite(logits.grad).all()

    def test_gradcheck(self):
        logits, t, _ = make_batch(6)
        assert gradcheck(lambda x: soft_cross_entropy(x, t), logits.requires_grad_())


class TestObjective:
    @pytest.mark.parametrize("mixup_alpha", [-1.0, 0.5, 3.0])
    @pytest.mark.parametrize(
        "sizes", [(4, 6, 3), (0, 6, 3), (4, 0, 3), (4, 6, 0), (1, 1, 1), (0, 0, 3), (5, 0, 0)]
    )
    def test_equals_the_published_form(self, sizes, mixup_alpha):
        objective = Objective(3.0, 5.0, 0.5, batch_size=7, mixup_alpha=mixup_alpha)
        for seed in range(5):
            logits, t, groups = make_batch(seed, *sizes)
            mixup = objective.draw_mixup(groups, np.random.default_rng(seed))
            losses = objective(logits, t, groups, mixup)
            expected = naive(objective, logits, t, groups, mixup)
            for got, wanted in zip(losses, expected, strict=True):
                assert got.shape == ()
                assert got.item() == pytest.approx(float(wanted), rel=1e-12)

    @pytest.mark.parametrize(
        ("sizes", "loss_scale", "group_weight"),
        [((2, 3, 2), None, "equal"), ((2, 3, 1), 0.3, "size"), ((0, 1, 0), 0.3, "size")],
    )
    def test_gradcheck(self, sizes, loss_scale, group_weight):
        objective = Objective(
            3.0, 5.0, 0.5, batch_size=7, loss_scale=loss_scale, group_weight=group_weight
        )
        logits, t, groups = make_batch(0, *sizes)
        mixup = objective.draw_mixup(groups, np.random.default_rng(0))
        assert mixup is not None
        others = make_batch(1, *sizes)[1]
        for partners in (None, others):
            assert gradcheck(
                lambda x, partners=partners: objective(x, t, groups, mixup, partners).total,
                logits.requires_grad_(),
            )

    def test_empty_groups_give_zero_and_no_gradient(self):
        objective = Objective(batch_size=4)
        logits, t, groups = make_batch(0, clean=0, nnc=0, nc=0)
        losses = objective(logits.requires_grad_(), t, groups)
        losses.total.backward()
        assert losses.total.item() == 0
        assert [loss.item() for loss in losses] == [0, 0, 0, 0]

        logits, t, groups = make_batch(0, nnc=0)
        losses = objective(logits.requires_grad_(), t, groups)
        assert losses.nnc.item() == 0
        losses.nnc.backward()
        assert not logits.grad.any()

    def test_group_means_do_not_depend_on_group_size(self):
        objective = Objective(1, 1, 1, batch_size=1)
        logits, t, groups = make_batch(0)
        once = objective(logits, t, groups)
        twice = objective(*(torch.cat([x, x]) for x in (logits, t, groups)))
        torch.testing.assert_close(once, twice)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_extreme_logits(self, dtype):
        """N1: finite where logarithms of softmax outputs are not."""
        objective = Objective(batch_size=4)
        _, t, groups = make_batch(0, dtype=torch.float32)
        mixup = objective.draw_mixup(groups, np.random.default_rng(0))
        extreme = np.random.default_rng(0).choice([-1e4, 0.0, 1e4], t.shape)
        logits = torch.tensor(extreme, dtype=dtype).requires_grad_()
        losses = objective(logits, t, groups, mixup)
        losses.total.backward()
        assert all(torch.isfinite(loss) for loss in losses)
        assert all(loss.dtype == torch.float32 for loss in losses)
        assert torch.isfinite(logits.grad).all()

        logits.grad = None
        published = naive(objective, logits.float(), t, groups, mixup)
        published[0].backward()
        assert not torch.isfinite(published[0])
        assert torch.isnan(logits.grad).any()

    def test_no_partner_term_where_lambda_is_one(self):
        """N2: the published term is 0 times infinity, and then NaN."""
        t = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]])
        logits = torch.tensor([[200.0, 0, 0], [0, 200.0, 0]])
        p = logits.softmax(dim=1)
        own, partner = -(p * t).sum(1).log(), -(p * t.flip(0)).sum(1).log()
        assert torch.isnan(1.0 * own + 0.0 * partner).all()

        class AlwaysOne(np.random.Generator):
            def beta(self, a, b):
                return 1.0

        groups = torch.tensor([NNC, NNC])
        mixup = Objective().draw_mixup(groups, AlwaysOne(np.random.PCG64(0)))
        losses = Objective()(logits, t, groups, mixup, t[mixup.partner])
        assert losses.nnc.item() == 0

    @pytest.mark.parametrize("sizes", [(4, 6, 3), (0, 1, 3)])
    def test_partner_targets(self, sizes):
        """Those that are given count, not those of the batch."""
        objective = Objective(2.0, 3.0, 4.0, batch_size=5)
        logits, t, groups = make_batch(0, *sizes)
        others = make_batch(1, *sizes)[1]
        mixup = objective.draw_mixup(groups, np.random.default_rng(0))
        p, w = logits.softmax(dim=1), mixup.weight.double()
        hot = -w * (p * t).sum(1).log() - (1 - w) * (p * others).sum(1).log()
        losses = objective(logits, t, groups, mixup, others)
        for got, group in ((losses.clean, CLEAN), (losses.nnc, NNC)):
            wanted = hot[groups == group].mean().item() if (groups == group).any() else 0
            assert got.item() == pytest.approx(wanted)
        same = objective(logits, t, groups, mixup, t[mixup.partner])
        torch.testing.assert_close(same, objective(logits, t, groups, mixup))

    def test_loss_scale(self):
        """T7."""
        logits, t, groups = make_batch(0)
        by_batch = Objective(batch_size=8)(logits, t, groups)
        torch.testing.assert_close(
            Objective(batch_size=3, loss_scale=1 / 8)(logits, t, groups), by_batch
        )

    @pytest.mark.parametrize("sizes", [(3, 3, 3), (6, 2, 1), (0, 4, 1), (0, 0, 2)])
    def test_group_weight(self, sizes):
        """T8: 3 / n times the sum of w l over all images."""
        logits, t, groups = make_batch(0, *sizes)
        weights = (2.0, 5.0, 3.0)
        equal = Objective(*weights, batch_size=1)(logits, t, groups)
        by_size = Objective(*weights, batch_size=1, group_weight="size")(logits, t, groups)
        n = sum(sizes)
        expected = sum(
            3 / n * weight * size * mean.item()
            for weight, size, mean in zip(weights, sizes, equal[1:], strict=True)
        )
        assert by_size.total.item() == pytest.approx(expected, rel=1e-12)
        assert by_size[1:] == equal[1:]
        if len(set(sizes)) == 1:
            torch.testing.assert_close(by_size.total, equal.total)

    def test_no_images(self):
        logits, t, groups = make_batch(0, 0, 0, 0)
        for weight in ("equal", "size"):
            losses = Objective(group_weight=weight)(logits.requires_grad_(), t, groups)
            losses.total.backward()
            assert [loss.item() for loss in losses] == [0, 0, 0, 0]

    def test_weights(self):
        logits, t, groups = make_batch(0)
        parts = Objective(1, 1, 1, batch_size=1)(logits, t, groups)
        for name in ("clean", "nnc", "nc"):
            weights = {"clean": 0.0, "nnc": 0.0, "nc": 0.0, name: 6.0}
            total = Objective(**weights, batch_size=3)(logits, t, groups).total
            torch.testing.assert_close(total, 2 * getattr(parts, name))

    def test_bad_shapes(self):
        logits, t, groups = make_batch(0)
        for bad in (
            (logits, t[:, :-1], groups),
            (logits, t, groups[1:]),
            (logits[0], t[0], groups),
        ):
            with pytest.raises(ValueError, match="^Objective: logits and targets must have shape"):
                Objective()(*bad)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"clean": -1.0}, "clean must be a finite number >= 0, got -1"),
            ({"nnc": math.nan}, "nnc must be a finite number >= 0, got nan"),
            ({"nc": math.inf}, "nc must be a finite number >= 0, got inf"),
            ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
            ({"mixup_alpha": math.inf}, "mixup_alpha must be finite, got inf"),
            ({"loss_scale": 0.0}, "loss_scale must be a finite number > 0, got 0.0"),
            ({"loss_scale": math.nan}, "loss_scale must be a finite number > 0, got nan"),
            ({"group_weight": "sizes"}, "group_weight must be 'equal' or 'size', got 'sizes'"),
        ],
    )
    def test_bad_settings(self, settings, message):
        with pytest.raises(ValueError, match=message):
            Objective(**settings)


def test_devices(device):
    """The same on every device, and without the host waiting for it."""
    objective = Objective()
    logits, t, groups = make_batch(0, dtype=torch.float32)
    images = torch.rand(len(logits), 3, 4, 4)
    mixup = objective.draw_mixup(groups, np.random.default_rng(0))
    expected = objective(logits, t, groups, mixup)
    mixed = mixup.mix(images)

    there = [x.to(device) for x in (logits, t, groups, images)]
    mixup = mixup.to(device)
    there[0].requires_grad_()
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        on_device = mixup.mix(there[3])
        losses = objective(*there[:3], mixup)
        losses.total.backward()
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(on_device.cpu(), mixed)
    for got, wanted in zip(losses, expected, strict=True):
        torch.testing.assert_close(got.detach().cpu(), wanted)


class TestMixup:
    def test_partners_stay_in_their_group_and_nc_is_not_mixed(self):
        objective = Objective(mixup_alpha=0.5)
        rng = np.random.default_rng(0)
        _, _, groups = make_batch(0, clean=40, nnc=60, nc=30)
        drawn = []
        for _ in range(50):
            mixup = objective.draw_mixup(groups, rng)
            assert torch.equal(groups[mixup.partner], groups)
            assert torch.equal(mixup.partner.sort().values, torch.arange(130))
            nc = groups == NC
            assert torch.equal(mixup.partner[nc], torch.nonzero(nc).flatten())
            assert (mixup.weight[nc] == 1).all()
            for group in (CLEAN, NNC):
                weights = mixup.weight[groups == group].unique()
                assert len(weights) == 1
                assert 0.5 <= weights.item() <= 1
                drawn.append(weights.item())
        assert len(set(drawn)) == 100  # each group has its own coefficient
        # max(l, 1 - l) of Beta(1/2, 1/2) has the mean 1/2 + 1/pi.
        assert np.mean(drawn) == pytest.approx(0.5 + 1 / math.pi, abs=0.05)

    def test_off(self):
        _, _, groups = make_batch(0)
        for alpha in (0.0, -1.0):
            assert Objective(mixup_alpha=alpha).draw_mixup(groups, np.random.default_rng(0)) is None

    def test_a_coefficient_of_one_has_no_partner(self):
        class AlwaysOne(np.random.Generator):
            def beta(self, a, b):
                return 0.0  # max(0, 1 - 0) = 1

        _, _, groups = make_batch(0)
        mixup = Objective().draw_mixup(groups, AlwaysOne(np.random.PCG64(0)))
        assert torch.equal(mixup.partner, torch.arange(len(groups)))
        assert (mixup.weight == 1).all()

    def test_the_partner_keeps_its_own_prior(self):
        # Two images swap roles; the loss of the first at weight w must see the whole target of
        # the second: model belief and prior.
        logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]] * 2, dtype=torch.float64)
        t = torch.tensor([[0.9, 0.1, 0, 0], [0, 0, 0.8, 0.2]], dtype=torch.float64)
        w = torch.tensor([0.75, 0.75])
        mixup = Mixup(torch.tensor([1, 0]), w)
        p = logits[0].softmax(0)
        first = -0.75 * torch.log(p @ t[0]) - 0.25 * torch.log(p @ t[1])
        second = -0.75 * torch.log(p @ t[1]) - 0.25 * torch.log(p @ t[0])
        losses = Objective()(logits, t, torch.tensor([NNC, NNC]), mixup)
        assert losses.nnc.item() == pytest.approx(((first + second) / 2).item(), rel=1e-12)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
    def test_images(self, dtype):
        images = torch.arange(24, dtype=dtype).reshape(3, 2, 2, 2)
        mixup = Mixup(torch.tensor([1, 0, 2]), torch.tensor([0.75, 0.75, 1.0]))
        mixed = mixup.mix(images)
        assert mixed.dtype == dtype
        torch.testing.assert_close(mixed[0], 0.75 * images[0] + 0.25 * images[1])
        torch.testing.assert_close(mixed[1], 0.75 * images[1] + 0.25 * images[0])
        assert torch.equal(mixed[2], images[2])

    def test_same_seed_same_draw(self):
        _, _, groups = make_batch(0)
        first, second = (Objective().draw_mixup(groups, np.random.default_rng(9)) for _ in range(2))
        assert torch.equal(first.partner, second.partner)
        assert torch.equal(first.weight, second.weight)
