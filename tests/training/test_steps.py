"""One step against the published programs written out in loops, and on awkward batches."""

import copy
import itertools
import json
import math
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.autograd import gradcheck

from genkl_ext.data import Manifest, Transforms
from genkl_ext.objective import CLEAN, NC, NNC, Mixup
from genkl_ext.relabel import Targets
from genkl_ext.training.batches import grouped
from genkl_ext.training.settings import Compatibility, Data, Training
from genkl_ext.training.steps import GenKLStep, PlainStep

K = 4
AS_MEANT = Compatibility()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Hardly any work is in a tiny operation, and much in sharing it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network(seed=0, dtype=torch.float64):
    """A convolution, batch normalisation and K logits."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.AdaptiveAvgPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(20, K)).to(dtype)


class Given(nn.Module):
    """A network whose logits are given, whatever the images."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, images):
        return self.logits


def make_batch(clean=3, nnc=5, nc=2, seed=0, dtype=torch.float64, mixed=True):
    """A shuffled batch of the three groups, mixed within clean and NNC images."""
    rng = np.random.default_rng(seed)
    group = rng.permutation(np.repeat([CLEAN, NNC, NC], [clean, nnc, nc]))
    n = len(group)
    label = rng.integers(0, K, n)
    target = np.zeros((n, K))
    target[np.arange(n), rng.integers(0, K, n)] = rng.uniform(0.3, 1, n)
    target[np.arange(n), label] += rng.uniform(0.05, 0.3, n)
    target[group == CLEAN] = np.eye(K)[label[group == CLEAN]]
    target[group == NC] = 1 / K
    batch = {
        "image": torch.tensor(rng.normal(size=(n, 3, 6, 6)), dtype=dtype),
        "label": torch.tensor(label),
        "group": torch.tensor(group),
        "target": torch.tensor(target, dtype=torch.float32),
    }
    if mixed:
        partner, weight = np.arange(n), np.ones(n, np.float32)
        for g, coefficient in ((CLEAN, 0.8), (NNC, 0.6)):
            members = np.flatnonzero(group == g)
            partner[members] = rng.permutation(members)
            weight[members] = coefficient
        batch["mixup"] = Mixup(torch.tensor(partner), torch.tensor(weight))
        batch["partner_target"] = batch["target"][batch["mixup"].partner]
    return batch


def run(step, net, batch):
    """Losses, gradients and buffers of a step."""
    net.zero_grad()
    losses = step(net, batch)
    losses["loss"].backward()
    return losses, [p.grad.clone() for p in net.parameters()], [b.clone() for b in net.buffers()]


def assert_same(got, wanted, **tolerance):
    """Equal losses (those that the second names), gradients and buffers."""
    for name, value in wanted[0].items():
        rel = 1e-6 if name == "clean_share" else 1e-9
        assert got[0][name].item() == pytest.approx(value, rel=rel, abs=1e-12), name
    for a, b in itertools.chain(
        zip(got[1], wanted[1], strict=True), zip(got[2], wanted[2], strict=True)
    ):
        torch.testing.assert_close(a, b, **tolerance)


def naive(net, batch, training, passes):
    """The objective as the programs compute it: softmax, inner products, logarithms.

    ``passes``: the groups of each forward pass, in order.
    """
    n = len(batch["label"])
    partner = batch["mixup"].partner.tolist() if "mixup" in batch else range(n)
    weight = batch["mixup"].weight.double().tolist() if "mixup" in batch else [1.0] * n
    others = batch.get("partner_target", batch["target"]).double()
    x = batch["image"]
    mixed = torch.stack([weight[i] * x[i] + (1 - weight[i]) * x[partner[i]] for i in range(n)])
    p = {}
    for groups in passes:
        rows = [i for i in range(n) if batch["group"][i] in groups]
        if rows:
            p.update(zip(rows, net(mixed[rows]).softmax(dim=1), strict=True))
    terms = {CLEAN: [], NNC: [], NC: []}
    for i in range(n):
        t, other, w = batch["target"][i].double(), others[i], weight[i]
        group = int(batch["group"][i])
        if group == NC:
            terms[group].append(-(t * p[i].log()).sum())
            continue
        if training.clean == "dynamic" and p[i][batch["label"][i]] >= training.clean_threshold:
            group = CLEAN
            t = F.one_hot(batch["label"][i], K).double()
            other = F.one_hot(batch["label"][partner[i]], K).double()
        loss = -w * torch.log((p[i] * t).sum())
        if w < 1:
            loss = loss - (1 - w) * torch.log((p[i] * other).sum())
        terms[group].append(loss)
    means = {g: sum(t) / len(t) if t else torch.zeros((), dtype=x.dtype) for g, t in terms.items()}
    loss = (
        training.omega_clean * means[CLEAN]
        + training.omega_nnc * means[NNC]
        + training.omega_nc * means[NC]
    ) / training.batch_size
    net.zero_grad()
    loss.backward()
    losses = {
        "loss": loss.item(),
        "clean_loss": means[CLEAN].item(),
        "nnc_loss": means[NNC].item(),
        "nc_loss": means[NC].item(),
    }
    if training.clean == "dynamic":
        losses["clean_share"] = len(terms[CLEAN]) / n
        losses["belief"] = sum(p[i][batch["label"][i]].item() for i in range(n)) / n
    return losses, [q.grad.clone() for q in net.parameters()], [b.clone() for b in net.buffers()]


TOGETHER = [(CLEAN, NNC, NC)]
APART = [(NC,), (NNC,), (CLEAN,)]


class TestPlainStep:
    @pytest.mark.parametrize("loss_scale", [1.0, 0.25, None])
    @pytest.mark.parametrize("n", [1, 7])
    def test_cross_entropy(self, n, loss_scale):
        batch, net = make_batch(n, 0, 0), network()
        expected = F.cross_entropy(net(batch["image"]), batch["label"])
        losses = PlainStep(loss_scale)(net, batch)
        assert losses.keys() == {"loss", "cross_entropy"}
        torch.testing.assert_close(losses["cross_entropy"], expected.detach())
        scale = 1 / n if loss_scale is None else loss_scale
        torch.testing.assert_close(losses["loss"], expected * scale)
        assert losses["loss"].requires_grad
        assert not losses["cross_entropy"].requires_grad

    def test_gradcheck(self):
        batch = make_batch(5, 0, 0)
        logits = torch.randn(5, K, dtype=torch.float64, requires_grad=True)
        assert gradcheck(lambda x: PlainStep(0.3)(Given(x), batch)["loss"], logits)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_summed_in_float32(self, dtype):
        batch = make_batch(7, 0, 0)
        logits = 1e4 * torch.randn(7, K).to(dtype)
        losses = PlainStep()(Given(logits), batch)
        assert losses["loss"].dtype == torch.float32
        torch.testing.assert_close(
            losses["loss"], F.cross_entropy(logits.float(), batch["label"]), check_dtype=False
        )


class TestGenKLStep:
    @pytest.mark.parametrize("separate", [False, True])
    @pytest.mark.parametrize("sizes", list(itertools.product((0, 1, 4), (0, 1, 4), (0, 1, 2)))[1:])
    def test_any_groups(self, sizes, separate):
        """T6, C2: empty groups and lone images, in one pass or one for each group."""
        training = Training(omega_clean=2, omega_nnc=5, omega_nc=3, batch_size=7)
        batch = make_batch(*sizes, mixed=sum(sizes) % 4 > 0)
        net = network()
        other = copy.deepcopy(net)
        step = GenKLStep(training, Compatibility(separate_passes=separate))
        for _ in range(2):  # nothing of the first is left in the second
            got = run(step, net, batch)
            assert_same(got, naive(other, batch, training, APART if separate else TOGETHER))
            batch = {**batch, "image": batch["image"].flip(0)}

    def test_separate_passes_differ(self):
        training, batch = Training(batch_size=10), make_batch()
        together = run(GenKLStep(training, AS_MEANT), network(), batch)
        apart = run(GenKLStep(training, Compatibility(separate_passes=True)), network(), batch)
        assert together[0]["loss"].item() != pytest.approx(apart[0]["loss"].item(), rel=1e-4)
        assert (together[2][2].item(), apart[2][2].item()) == (1, 3)  # num_batches_tracked

    def test_nothing_is_stale(self):
        """C2: a batch without NNC and clean images after one with them."""
        training = Training(batch_size=4)
        step, net = GenKLStep(training, AS_MEANT), network()
        run(step, net, make_batch(3, 5, 2))
        losses, gradients, _ = run(step, net, make_batch(0, 0, 3))
        assert losses["clean_loss"].item() == losses["nnc_loss"].item() == 0
        assert losses["loss"].item() == pytest.approx(losses["nc_loss"].item() / 4)
        assert any(g.any() for g in gradients)

    @pytest.mark.parametrize("loss_scale", [None, 1.0, 0.2])
    def test_loss_scale(self, loss_scale):
        """T7."""
        training = Training(batch_size=8, loss_scale=loss_scale)
        losses = GenKLStep(training, AS_MEANT)(network(), make_batch())
        means = losses["clean_loss"] + 32 * losses["nnc_loss"] + losses["nc_loss"]
        factor = 1 / 8 if loss_scale is None else loss_scale
        torch.testing.assert_close(losses["loss"].detach(), factor * means)

    def test_group_weight(self):
        """T8: each image of a group weighs the same in every batch."""
        training = Training(omega_clean=2, omega_nnc=5, omega_nc=3, batch_size=1)
        by_size = Training(**{**vars(training), "group_weight": "size"})
        for sizes in ((3, 3, 3), (6, 2, 1), (0, 4, 1)):
            batch = make_batch(*sizes)
            equal = GenKLStep(training, AS_MEANT)(network(), batch)
            losses = GenKLStep(by_size, AS_MEANT)(network(), batch)
            parts = zip((2, 5, 3), sizes, ("clean_loss", "nnc_loss", "nc_loss"), strict=True)
            expected = sum(3 * w * n / sum(sizes) * equal[name].item() for w, n, name in parts)
            assert losses["loss"].item() == pytest.approx(expected)
            if len(set(sizes)) == 1:
                assert losses["loss"].item() == pytest.approx(equal["loss"].item())
            assert losses["nnc_loss"].item() == equal["nnc_loss"].item()

    @pytest.mark.parametrize("clean", ["loader", "dynamic"])
    def test_keys(self, clean):
        batch = make_batch(0 if clean == "dynamic" else 3)
        losses = GenKLStep(Training(clean=clean), AS_MEANT)(network(), batch)
        names = ["loss", "clean_loss", "nnc_loss", "nc_loss"]
        names += ["clean_share", "belief"] if clean == "dynamic" else []
        assert list(losses) == names
        assert all(value.requires_grad == (name == "loss") for name, value in losses.items())

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("clean", ["loader", "dynamic"])
    def test_extreme_logits_in_half_precision(self, dtype, clean):
        batch = make_batch(0 if clean == "dynamic" else 3)
        n = len(batch["label"])
        logits = torch.tensor(np.random.default_rng(0).choice([-1e4, 0, 1e4], (n, K))).to(dtype)
        step = GenKLStep(Training(clean=clean), AS_MEANT)
        losses = step(Given(logits.requires_grad_()), batch)
        assert all(value.dtype == torch.float32 for value in losses.values())
        assert all(value.isfinite() for value in losses.values())
        losses["loss"].backward()
        assert logits.grad.isfinite().all()

    @pytest.mark.parametrize(
        "settings",
        [{}, {"clean": "dynamic"}, {"clean": "dynamic", "clean_test": "unmixed"}],
    )
    def test_autocast(self, settings):
        training = Training(clean_threshold=0.0, **settings)
        batch = make_batch(0, dtype=torch.float32)
        net = network(dtype=torch.float32)
        expected, gradients, _ = run(GenKLStep(training, AS_MEANT), copy.deepcopy(net), batch)
        with torch.autocast("cpu", torch.bfloat16):
            losses = GenKLStep(training, AS_MEANT)(net, batch)
        assert losses["loss"].dtype == torch.float32
        torch.testing.assert_close(losses["loss"], expected["loss"], rtol=0.05, atol=0)
        losses["loss"].backward()
        for parameter, gradient in zip(net.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=0.2, atol=0.05)


class TestDynamic:
    @pytest.mark.parametrize("mixed", [False, True])
    @pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0])
    @pytest.mark.parametrize("nc", [0, 1, 4])
    def test_as_published(self, nc, threshold, mixed):
        """T9: the softmax of the mixed image at the label of its first part, training mode."""
        training = Training(
            omega_clean=10, omega_nc=4, batch_size=8, clean="dynamic", clean_threshold=threshold
        )
        believed = []
        for seed in range(3):
            batch = make_batch(0, 8, nc, seed, mixed=mixed)
            net = network(seed)
            other = copy.deepcopy(net)
            got = run(GenKLStep(training, AS_MEANT), net, batch)
            assert_same(got, naive(other, batch, training, TOGETHER))
            believed.append(got[0]["clean_share"].item())
        share = 8 / (8 + nc)
        if threshold == 0.3:
            assert 0 < np.mean(believed) < share
        else:
            assert believed == pytest.approx([share if threshold == 0 else 0] * 3)

    def test_the_partner_need_not_be_clean(self):
        logits = torch.tensor([[3.0, 0, 0, 0], [3.0, 0, 0, 0]], dtype=torch.float64)
        batch = {
            "image": torch.zeros(2, 3, 6, 6),
            "label": torch.tensor([0, 1]),
            "group": torch.tensor([NNC, NNC]),
            "target": torch.tensor([[0.9, 0, 0, 0.2], [0, 0.3, 0.6, 0]]),
            "mixup": Mixup(torch.tensor([1, 0]), torch.tensor([0.75, 0.75])),
            "partner_target": torch.tensor([[0, 0.3, 0.6, 0], [0.9, 0, 0, 0.2]]),
        }
        log_p = logits[0].log_softmax(0)
        clean = -0.75 * log_p[0] - 0.25 * log_p[1]
        p = log_p.exp()
        nnc = -0.75 * (0.3 * p[1] + 0.6 * p[2]).log() - 0.25 * (0.9 * p[0] + 0.2 * p[3]).log()
        losses = GenKLStep(Training(clean="dynamic"), AS_MEANT)(Given(logits), batch)
        assert losses["clean_loss"].item() == pytest.approx(clean.item(), rel=1e-6)
        assert losses["nnc_loss"].item() == pytest.approx(nnc.item(), rel=1e-6)

    def test_a_softmax_at_the_threshold_is_enough(self):
        batch = {**make_batch(0, 2, 0, mixed=False), "label": torch.tensor([0, 1])}
        logits = torch.tensor([[0, 0, -1e4, -1e4], [0.01, 0, -1e4, -1e4]], dtype=torch.float64)
        losses = GenKLStep(Training(clean="dynamic", clean_threshold=0.5), AS_MEANT)(
            Given(logits), batch
        )
        assert losses["clean_share"].item() == 0.5

    def test_nc_images_are_never_clean(self):
        batch = make_batch(0, 0, 5)
        logits = 9.0 * F.one_hot(batch["label"], K).double()
        losses = GenKLStep(Training(clean="dynamic"), AS_MEANT)(Given(logits), batch)
        assert losses["clean_share"].item() == losses["clean_loss"].item() == 0

    def test_unmixed(self):
        """T9: the softmax of the image itself, in evaluation mode, which changes nothing else."""
        batch, net = make_batch(0, 12, 2), network()
        net[1].running_mean.fill_(0.3)
        net[1].running_var.fill_(2.0)
        before = copy.deepcopy(net)
        q = copy.deepcopy(net).eval()(batch["image"]).softmax(dim=1).detach()
        belief = q[range(14), batch["label"]]
        threshold = belief.median().item()
        believed = (belief >= threshold) & (batch["group"] == NNC)
        assert 0 < believed.sum() < 12

        training = Training(clean="dynamic", clean_test="unmixed", clean_threshold=threshold)
        net[0].eval()  # a part that is not trained stays so
        losses, gradients, buffers = run(GenKLStep(training, AS_MEANT), net, batch)
        assert [module.training for module in net] == [False] + 5 * [True]
        marked = {**batch, "group": batch["group"].masked_fill(believed, CLEAN)}
        one_hot = F.one_hot(batch["label"], K).float()
        partner = batch["mixup"].partner
        marked["target"] = torch.where(believed[:, None], one_hot, batch["target"])
        marked["partner_target"] = torch.where(
            believed[:, None], one_hot[partner], batch["partner_target"]
        )
        assert_same((losses, gradients, buffers), naive(before, marked, Training(), TOGETHER))

    def test_the_two_tests_differ(self):
        batch = make_batch(0, 40, 0)
        shares = [
            GenKLStep(
                Training(clean="dynamic", clean_test=test, clean_threshold=0.3), AS_MEANT
            )(network(), batch)["clean_share"].item()
            for test in ("mixed", "unmixed")
        ]  # fmt: skip
        assert shares[0] != shares[1]

    @pytest.mark.parametrize("mixed", [False, True])
    def test_gradcheck(self, mixed):
        """The test itself is not differentiated."""
        batch = make_batch(0, 6, 2, mixed=mixed)
        step = GenKLStep(Training(clean="dynamic", clean_threshold=0.25), AS_MEANT)

        logits = torch.randn(8, K, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        assert 0 < step(Given(logits), batch)["clean_share"].item() < 0.75
        assert gradcheck(lambda x: step(Given(x), batch)["loss"], logits.requires_grad_())


class TestNotFinite:
    """C5: whoever trains sees it in the losses, and nothing passes silently."""

    @pytest.mark.parametrize("clean", ["loader", "dynamic"])
    def test_logits(self, clean):
        logits = torch.zeros(8, K)
        logits[3, 1] = math.nan
        losses = GenKLStep(Training(clean=clean), AS_MEANT)(
            Given(logits.requires_grad_()), make_batch(0, 6, 2)
        )
        assert losses["loss"].isnan()
        losses["loss"].backward()
        assert logits.grad.isnan().any()
        assert PlainStep()(Given(logits), make_batch(8, 0, 0))["loss"].isnan()

    def test_scores_alone(self):
        """The loss is finite, but the softmax of the unmixed images is not."""
        net, batch = network(), make_batch(0, 6, 2)
        net[1].running_var[2] = math.nan
        for test, finite in (("mixed", True), ("unmixed", False)):
            step = GenKLStep(Training(clean="dynamic", clean_test=test), AS_MEANT)
            losses = step(copy.deepcopy(net), batch)
            assert losses["loss"].isfinite()
            assert losses["belief"].isfinite() == finite


class TestEmptyBatch:
    """A rank whose images were all broken."""

    @pytest.mark.parametrize("clean", ["loader", "joint", "dynamic"])
    @pytest.mark.parametrize("test", ["mixed", "unmixed"])
    @pytest.mark.parametrize("separate", [False, True])
    def test_genkl(self, clean, test, separate):
        step = GenKLStep(
            Training(clean=clean, clean_test=test), Compatibility(separate_passes=separate)
        )
        self.check(step, make_batch(0, 0, 0))

    @pytest.mark.parametrize("loss_scale", [1.0, None])
    def test_plain(self, loss_scale):
        self.check(PlainStep(loss_scale), make_batch(0, 0, 0))

    def check(self, step, batch):
        net = network()
        before = [b.clone() for b in net.buffers()]
        losses, gradients, buffers = run(step, net, batch)
        assert all(value.item() == 0 for value in losses.values())
        assert not any(g.any() for g in gradients)
        assert all(map(torch.equal, before, buffers))
        assert all(module.training for module in net.modules())


def test_devices(device):
    """The same on every device, and without the host waiting for it."""
    batch, net = make_batch(0, 6, 2, dtype=torch.float32), network(dtype=torch.float32)
    for clean, test in (("loader", "mixed"), ("dynamic", "mixed"), ("dynamic", "unmixed")):
        training = Training(clean=clean, clean_test=test, clean_threshold=0.3)
        expected = run(GenKLStep(training, AS_MEANT), copy.deepcopy(net), batch)
        there = {name: value.to(device) for name, value in batch.items()}
        step, moved = GenKLStep(training, AS_MEANT), copy.deepcopy(net).to(device)
        run(step, moved, there)  # libraries may wait the first time
        moved.load_state_dict(net.state_dict())
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            losses, gradients, _ = run(step, moved, there)
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        for name, value in expected[0].items():
            torch.testing.assert_close(losses[name].cpu(), value, rtol=1e-4, atol=1e-5)
        for a, b in zip(gradients, expected[1], strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-3, atol=1e-4)


# The three published programs, from files to losses: what each does, and with which switches.

N_NOISY, N_CLEAN = 24, 9


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Manifest:
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    splits = rng.permutation(["train"] * N_NOISY + ["clean"] * N_CLEAN)
    names = [f"{i}.png" for i in range(len(splits))]
    for name in names:
        Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)).save(root / name)
    labels = rng.integers(0, K, len(splits))
    columns = {"key": names, "path": names, "given_label": labels, "split": splits}
    return Manifest(pa.table(columns), tuple("abcd"), "test", str(root))


class Published:
    """Raw material of a published program, and its targets in loops over rows and classes."""

    def __init__(self, manifest, folder):
        rng = np.random.default_rng(7)
        self.manifest = manifest
        self.models = [rng.dirichlet([0.6] * K, N_NOISY).astype(np.float32) for _ in range(2)]
        self.files = [folder / "0.npy", folder / "1.npy"]
        for file, model in zip(self.files, self.models, strict=True):
            np.save(file, model)
        self.ratio = rng.dirichlet([3.0] * K).astype(np.float32)
        self.nc = rng.random(N_NOISY) < 0.3
        self.noisy = manifest.rows("train").tolist()

    def q(self, row):
        i = self.noisy.index(row)
        return [(a + b) / np.float32(2) for a, b in zip(*(m[i] for m in self.models), strict=True)]

    def model_part(self, row):
        q = self.q(row)
        return [max(q) if c == q.index(max(q)) else 0.0 for c in range(K)]

    def prior_part(self, row, broadcast):
        y = self.manifest.labels[row]
        return [self.ratio[y] if broadcast or c == y else 0.0 for c in range(K)]

    def targets(self, broadcast):
        q = np.array([self.q(row) for row in self.noisy])
        labels = self.manifest.labels[self.noisy]
        top = q.argmax(axis=1).astype(np.int32), q.max(axis=1)
        return Targets(*top, labels, self.ratio[labels], self.nc, K, broadcast)

    def batch(self, made, *, averaged, broadcast, unpermuted):
        """The batch with targets as the program makes them, slips included."""
        rows, group = made["row"].tolist(), made["group"].tolist()
        partner = made["mixup"].partner.tolist() if "mixup" in made else range(len(rows))
        t, t_partner = [], []
        for i, row in enumerate(rows):
            other = rows[partner[i]]
            if group[i] == CLEAN:
                t.append([float(c == self.manifest.labels[row]) for c in range(K)])
                t_partner.append([float(c == self.manifest.labels[other]) for c in range(K)])
            elif group[i] == NC:
                t.append(self.q(row) if averaged else [1 / K] * K)
                t_partner.append([0.0] * K)
            else:
                r = self.prior_part(row, broadcast)
                r_partner = r if unpermuted else self.prior_part(other, broadcast)
                t.append(np.add(self.model_part(row), r))
                t_partner.append(np.add(self.model_part(other), r_partner))
        own = {"target": torch.tensor(np.array(t, np.float32))}
        if "mixup" in made:
            own["partner_target"] = torch.tensor(np.array(t_partner, np.float32))
        return {**made, **own}


@pytest.fixture(scope="module")
def published(manifest, tmp_path_factory) -> Published:
    return Published(manifest, tmp_path_factory.mktemp("predictions"))


CLOTHING1M = Training(batch_size=8, mixup_alpha=0.5, clean="loader")
FOOD101N = Training(
    omega_clean=20, omega_nnc=100, omega_nc=1, batch_size=8, mixup_alpha=-1, clean="joint"
)
WEBVISION = Training(
    omega_clean=10,
    omega_nc=4,
    batch_size=8,
    mixup_alpha=3.0,
    clean="dynamic",
    clean_threshold=0.26,
)


@pytest.mark.parametrize(
    ("training", "switches", "passes"),
    [
        (CLOTHING1M, {}, TOGETHER),
        (CLOTHING1M, {"nc_target": "averaged"}, TOGETHER),
        (CLOTHING1M, {"unpermuted_prior": True}, TOGETHER),
        (CLOTHING1M, {"separate_passes": True}, APART),
        (
            CLOTHING1M,
            {"nc_target": "averaged", "unpermuted_prior": True, "separate_passes": True},
            APART,
        ),
        (FOOD101N, {}, TOGETHER),
        (FOOD101N, {"unpermuted_prior": True, "separate_passes": True}, APART),
        (WEBVISION, {}, TOGETHER),
        (WEBVISION, {"ratio_broadcast": True}, TOGETHER),
        (WEBVISION, {"unpermuted_prior": True, "ratio_broadcast": True}, TOGETHER),
    ],
)
def test_published_programs(manifest, published, training, switches, passes):
    """Five steps of each, with every switch: losses, gradients, running statistics."""
    compatibility = Compatibility(**switches)
    broadcast = compatibility.ratio_broadcast
    batches = grouped(
        manifest,
        published.targets(broadcast),
        np.ones(N_NOISY, bool),
        manifest.rows("clean"),
        Data(train=Transforms(size=6, resize=8, crop="random"), threads=1),
        training,
        3,
        compatibility=compatibility,
        averaged=published.files if compatibility.nc_target == "averaged" else None,
    )
    step = GenKLStep(training, compatibility)
    net = network()
    other = copy.deepcopy(net)
    for made in itertools.islice(itertools.chain(batches, batches), 5):
        made["image"] = made["image"].double()
        batch = published.batch(
            made,
            averaged=compatibility.nc_target == "averaged",
            broadcast=broadcast,
            unpermuted=compatibility.unpermuted_prior,
        )
        wanted = naive(other, batch, training, passes)
        assert_same(run(step, net, made), wanted, rtol=1e-8, atol=1e-11)
        for n in (net, other):  # as an optimiser would
            with torch.no_grad():
                for parameter in n.parameters():
                    parameter -= 0.01 * parameter.grad


@pytest.mark.parametrize(
    ("training", "switch"),
    [
        (CLOTHING1M, {"nc_target": "averaged"}),
        (CLOTHING1M, {"unpermuted_prior": True}),
        (CLOTHING1M, {"separate_passes": True}),
        (WEBVISION, {"ratio_broadcast": True}),
    ],
)
def test_every_switch_changes_the_gradient(manifest, published, training, switch):
    gradients = []
    for compatibility in (AS_MEANT, Compatibility(**switch)):
        batches = grouped(
            manifest,
            published.targets(compatibility.ratio_broadcast),
            np.ones(N_NOISY, bool),
            manifest.rows("clean"),
            Data(train=Transforms(size=6, resize=8), threads=1),
            training,
            3,
            compatibility=compatibility,
            averaged=published.files,
        )
        step, net = GenKLStep(training, compatibility), network()
        gradients.append([])
        for batch in batches:
            batch["image"] = batch["image"].double()
            gradients[-1].append(run(step, net, batch)[1][-1])
    # Far more than what test_published_programs lets pass.
    assert not torch.allclose(*map(torch.stack, gradients), rtol=1e-5, atol=1e-7)


# Two processes against one.

RANKS = """
import json, sys
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from genkl_ext.training.settings import Compatibility, Training
from genkl_ext.training.steps import GenKLStep, PlainStep

K, n = 4, 11
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
batch = {
    "image": torch.randn(n, 3, 4, 4, generator=generator, dtype=torch.float64),
    "label": torch.randint(0, K, (n,), generator=generator),
    "group": torch.tensor([1, 1, 2, 0, 1, 0, 1, 1, 1, 0, 0]),
    "target": torch.rand(n, K, generator=generator),
}
training = {
    "genkl": Training(batch_size=12),
    "by size": Training(batch_size=12, group_weight="size"),
    "dynamic": Training(batch_size=12, clean="dynamic", clean_threshold=0.3),
}
steps = {name: GenKLStep(settings, Compatibility()) for name, settings in training.items()}
steps["separate passes"] = GenKLStep(training["genkl"], Compatibility(separate_passes=True))
steps["plain"] = PlainStep()
steps["scaled"] = PlainStep(None)


def run(step, part, wrap):
    torch.manual_seed(1)
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(20, K)).double()
    wrapped = wrap(network)
    losses = step(wrapped, part)
    losses["loss"].backward()
    values = {name: value.item() for name, value in losses.items()}
    return [values, [p.grad.flatten().tolist() for p in network.parameters()]]


whole = {name: run(step, batch, lambda network: network) for name, step in steps.items()}
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
shared = {}
# Rank 1 has no NC image, and then no image.
for first in (7, n):
    mine = slice(0, first) if rank == 0 else slice(first, n)
    part = {name: value[mine] for name, value in batch.items()}
    for name, step in steps.items():
        shared[f"{name}, {first} images"] = run(step, part, DistributedDataParallel)
dist.destroy_process_group()
json.dump([whole, shared], open(sys.argv[3], "w"))
"""


def test_two_ranks_are_one(tmp_path):
    """The averaged gradient of two processes is the gradient of the whole batch."""
    program = tmp_path / "program.py"
    program.write_text(RANKS)
    outs = [tmp_path / "0.json", tmp_path / "1.json"]
    processes = [
        subprocess.Popen([sys.executable, program, str(rank), tmp_path / "meeting", out])
        for rank, out in enumerate(outs)
    ]
    try:
        assert [process.wait(240) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    (whole, first), (_, second) = (json.loads(out.read_text()) for out in outs)
    assert len(first) == 2 * len(whole) == 12
    for case in first:
        losses, gradients = whole[case.split(",")[0]]
        for _, shared in (first[case], second[case]):
            for a, b in zip(shared, gradients, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-13, err_msg=case)
        for name in losses.keys() - {"clean_share", "belief"}:  # of each rank's own images
            mean = (first[case][0][name] + second[case][0][name]) / 2
            assert mean == pytest.approx(losses[name]), (case, name)
