"""Batches of a training: who is in them, with which targets, from any position on."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from genkl_ext import reference
from genkl_ext.data import ImageError, Manifest, Transforms
from genkl_ext.objective import CLEAN, NC, NNC
from genkl_ext.relabel import Targets
from genkl_ext.training import batches as batches_module
from genkl_ext.training.batches import grouped, labelled
from genkl_ext.training.settings import Compatibility, Data, Training

K = 3
DATA = Data(train=Transforms(size=8, resize=9, crop="random", flip=0.5), threads=1)
NOISY, CLEAN_IMAGES = 23, 7


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Manifest:
    """23 noisy, 7 clean and 2 validation images, their rows interleaved, in 3 classes."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    splits = rng.permutation(["train"] * NOISY + ["clean"] * CLEAN_IMAGES + ["val"] * 2)
    for i in range(len(splits)):
        pixels = rng.integers(0, 256, (10, 12, 3), np.uint8)
        Image.fromarray(pixels).save(root / f"{i}.png")
    names = [f"{i}.png" for i in range(len(splits))]
    labels = rng.integers(0, K, len(splits))
    columns = {"key": names, "path": names, "given_label": labels, "split": splits}
    return Manifest(pa.table(columns), ("a", "b", "c"), "test", str(root))


@dataclasses.dataclass
class Relabelled:
    """Predictions and what relabelling makes of them."""

    members: list[np.ndarray]  #: M of (N, k)
    files: list[str]
    ratio: np.ndarray
    nc: np.ndarray
    used: np.ndarray
    targets: Targets


@pytest.fixture(scope="module")
def relabelled(manifest, tmp_path_factory) -> Relabelled:
    rng = np.random.default_rng(1)
    folder = tmp_path_factory.mktemp("predictions")
    members = [rng.dirichlet([0.7] * K, NOISY).astype(np.float32) for _ in range(3)]
    files = [str(folder / f"{i}.npy") for i in range(3)]
    for file, q in zip(files, members, strict=True):
        np.save(file, q)
    q = (members[0] + members[1] + members[2]) / np.float32(3)
    ratio = np.array([0.2, 0.5, 0.3], np.float32)
    nc = rng.random(NOISY) < 0.3
    used = np.ones(NOISY, bool)
    used[[4, 11]] = False
    labels = manifest.labels[manifest.rows("train")]
    targets = Targets(
        q.argmax(axis=1).astype(np.int32), q.max(axis=1), labels, ratio[labels], nc, K
    )
    return Relabelled(members, files, ratio, nc, used, targets)


def make(manifest, relabelled, training=None, seed=5, targets=None, used=None, **settings):
    """Noisy batches of 4, each with a clean one of 4, unless ``training`` says otherwise."""
    return grouped(
        manifest,
        relabelled.targets if targets is None else targets,
        relabelled.used if used is None else used,
        manifest.rows("clean"),
        settings.pop("data", DATA),
        training or Training(batch_size=4),
        seed,
        **settings,
    )


def same(a, b) -> bool:
    """Whether two batches are equal to the last bit."""
    flat = [
        {k: v for name, x in batch.items() for k, v in (
            ((f"{name}.0", x[0]), (f"{name}.1", x[1])) if name == "mixup" else ((name, x),)
        )}
        for batch in (a, b)
    ]  # fmt: skip
    return flat[0].keys() == flat[1].keys() and all(
        torch.equal(flat[0][name], flat[1][name]) for name in flat[0]
    )


def expected_targets(relabelled, manifest, row, compatibility, prior_row=None):
    """Target of one row of the manifest from the predictions, entry by entry."""
    if row in manifest.rows("clean"):
        return [float(c == manifest.labels[row]) for c in range(K)]
    noisy = manifest.rows("train").tolist()
    i = noisy.index(row)
    a, b, c = (q[i] for q in relabelled.members)
    q = [(a[n] + b[n] + c[n]) / np.float32(3) for n in range(K)]
    if relabelled.nc[i]:
        return q if compatibility.nc_target == "averaged" else [1 / K] * K
    y = manifest.labels[row if prior_row is None else prior_row]
    t = [q[n] if n == int(np.argmax(q)) else np.float32(0) for n in range(K)]
    for n in range(K):
        if compatibility.ratio_broadcast or n == y:
            t[n] += relabelled.ratio[y]
    return t


class TestLabelled:
    def test_every_row_once_with_its_label(self, manifest):
        rows = manifest.rows("train")
        batches = labelled(manifest, rows, DATA, 1, 0)
        assert len(batches) == NOISY
        seen = []
        for batch in batches:
            assert batch.keys() == {"image", "label", "row"}
            assert batch["image"].shape == (1, 3, 8, 8)
            assert batch["image"].dtype == torch.float32
            assert batch["row"].dtype == batch["label"].dtype == torch.int64
            assert batch["label"].tolist() == manifest.labels[batch["row"].numpy()].tolist()
            seen += batch["row"].tolist()
        assert sorted(seen) == rows.tolist()
        assert seen != rows.tolist()

    def test_images_are_those_of_the_rows(self, manifest):
        data = Data(train=Transforms(size=8, resize=9), threads=1)
        oracle = data.train.torchvision()
        rows = manifest.rows("clean")[[3, 0, 5]]
        for batch in labelled(manifest, rows, data, 3, 0):
            for image, row in zip(batch["image"], batch["row"].tolist(), strict=True):
                with Image.open(manifest.path(row)) as picture:
                    pixels = pil_to_tensor(picture)
                torch.testing.assert_close(image, oracle(pixels), atol=2e-6, rtol=0)

    @pytest.mark.parametrize(("size", "batches"), [(5, [5] * 4), (23, [23]), (24, [23])])
    def test_batches_are_full_unless_there_is_only_one(self, manifest, size, batches):
        made = labelled(manifest, manifest.rows("train"), DATA, size, 0)
        assert len(made) == len(batches)
        assert [len(batch["row"]) for batch in made] == batches

    @pytest.mark.parametrize("channels_last", [False, True])
    def test_memory_format(self, manifest, channels_last):
        batches = labelled(
            manifest, manifest.rows("train"), DATA, 6, 0, channels_last=channels_last
        )
        form = torch.channels_last if channels_last else torch.contiguous_format
        assert next(iter(batches))["image"].is_contiguous(memory_format=form)

    def test_bad_arguments(self, manifest):
        rows = manifest.rows("train")
        with pytest.raises(ValueError, match="labelled: rows must be rows of the man.*, got none"):
            labelled(manifest, rows[:0], DATA, 4, 0)
        with pytest.raises(ValueError, match="batch_size must be a multiple of the 3 ranks, got 4"):
            labelled(manifest, rows, DATA, 4, 0, shard=(0, 3))
        table = manifest.table.set_column(
            2, "given_label", pa.array([None, *manifest.labels[1:]], pa.int32())
        )
        unlabelled = Manifest(table, manifest.class_names, "test", manifest.root)
        with pytest.raises(ValueError, match="must be rows with a label, got row 0, key '0.png'"):
            labelled(unlabelled, np.arange(5), DATA, 4, 0)


class TestClean:
    def test_loader(self, manifest, relabelled):
        """A clean batch beside every noisy one; clean rows come equally often."""
        batches = make(manifest, relabelled)
        noisy, clean = manifest.rows("train")[relabelled.used], manifest.rows("clean")
        assert len(batches) == 5  # of 21 used images
        seen_clean = []
        for _ in range(7):
            seen = []
            for batch in batches:
                assert batch["image"].shape == (8, 3, 8, 8)
                assert (batch["group"][4:] == CLEAN).all()
                assert (batch["group"][:4] != CLEAN).all()
                seen += batch["row"][:4].tolist()
                seen_clean += batch["row"][4:].tolist()
            assert len(set(seen)) == 20
            assert set(seen) <= set(noisy.tolist())
        # 7 clean images fill one batch in each of the clean epochs: 35 of those in 7 epochs.
        assert set(seen_clean) == set(clean.tolist())
        assert all(len(set(seen_clean[i : i + 4])) == 4 for i in range(0, 140, 4))
        assert len({tuple(seen_clean[i : i + 4]) for i in range(0, 140, 4)}) > 20

    def test_fewer_clean_images_than_a_batch(self, manifest, relabelled):
        batches = make(manifest, relabelled, Training(batch_size=10))
        for batch in batches:
            assert sorted(batch["row"][10:].tolist()) == manifest.rows("clean").tolist()

    def test_joint(self, manifest, relabelled):
        batches = make(manifest, relabelled, Training(batch_size=28, clean="joint"))
        (batch,) = batches
        rows = np.concatenate([manifest.rows("train")[relabelled.used], manifest.rows("clean")])
        assert sorted(batch["row"].tolist()) == sorted(rows.tolist())
        verified = np.isin(batch["row"].numpy(), manifest.rows("clean"))
        assert ((batch["group"] == CLEAN).numpy() == verified).all()
        assert 0 < batch["group"].argmin() < 20  # not one kind after the other

    def test_dynamic(self, manifest, relabelled):
        (batch,) = make(manifest, relabelled, Training(batch_size=21, clean="dynamic"))
        noisy = manifest.rows("train")[relabelled.used]
        assert sorted(batch["row"].tolist()) == noisy.tolist()
        assert set(batch["group"].tolist()) == {NNC, NC}

    def test_labels_and_groups(self, manifest, relabelled):
        nc_rows = manifest.rows("train")[relabelled.nc]
        for batch in make(manifest, relabelled):
            rows = batch["row"].numpy()
            assert batch["label"].tolist() == manifest.labels[rows].tolist()
            nc = np.isin(rows, nc_rows)
            assert ((batch["group"] == NC).numpy() == nc).all()
            assert batch["group"].dtype == batch["row"].dtype == torch.int64

    def test_the_two_orders_differ(self, manifest, relabelled):
        """Noisy and clean images in equal numbers are not shuffled alike."""
        used = np.zeros(NOISY, bool)
        used[:CLEAN_IMAGES] = True
        places = []
        for batch in make(manifest, relabelled, Training(batch_size=7), used=used):
            rows = batch["row"].numpy()
            noisy = np.searchsorted(manifest.rows("train"), rows[:7])
            clean = np.searchsorted(manifest.rows("clean"), rows[7:])
            places.append((noisy.tolist(), clean.tolist()))
        assert places[0][0] != places[0][1]


class TestTargets:
    @pytest.mark.parametrize("clean", ["loader", "joint", "dynamic"])
    @pytest.mark.parametrize("mixup_alpha", [-1.0, 0.5])
    @pytest.mark.parametrize("switch", [None, "nc_target", "ratio_broadcast", "unpermuted_prior"])
    def test_every_entry(self, manifest, relabelled, switch, mixup_alpha, clean):
        """T1 to T3: as meant, and with each switch as published."""
        value = {"nc_target": "averaged"}.get(switch, True)
        compatibility = Compatibility(**({switch: value} if switch else {}))
        targets = relabelled.targets
        if switch == "ratio_broadcast":
            targets = dataclasses.replace(targets, prior_everywhere=True)
        batches = make(
            manifest,
            relabelled,
            Training(batch_size=5, clean=clean, mixup_alpha=mixup_alpha),
            targets=targets,
            compatibility=compatibility,
            averaged=relabelled.files if switch == "nc_target" else None,
        )
        groups = []
        for batch in batches:
            rows = batch["row"].tolist()
            groups += batch["group"].tolist()
            expected = [expected_targets(relabelled, manifest, row, compatibility) for row in rows]
            assert batch["target"].dtype == torch.float32
            np.testing.assert_array_equal(batch["target"], np.array(expected, np.float32))
            if mixup_alpha <= 0:
                assert batch.keys() == {"image", "label", "row", "group", "target"}
                continue
            assert batch["partner_target"].dtype == torch.float32
            for i, j in enumerate(batch["mixup"].partner.tolist()):
                prior_row = rows[i] if switch == "unpermuted_prior" else None
                if batch["group"][i] != NC:  # which is not mixed
                    partner = expected_targets(
                        relabelled, manifest, rows[j], compatibility, prior_row
                    )
                    np.testing.assert_array_equal(batch["partner_target"][i], np.float32(partner))
        assert set(groups) == ({NNC, NC} if clean == "dynamic" else {CLEAN, NNC, NC})

    def test_ablations(self, manifest, relabelled):
        """Without NC rows everything is double-hot; without belief the given label is alone."""
        targets = relabelled.targets
        none = np.zeros(NOISY, bool)
        for batch in make(manifest, relabelled, targets=dataclasses.replace(targets, nc=none)):
            assert NC not in batch["group"]
            assert (batch["target"] > 0).sum(dim=1).max() <= 2
        given = dataclasses.replace(targets, top_prob=np.zeros(NOISY, np.float32), nc=none)
        for batch in make(manifest, relabelled, targets=given):
            assert ((batch["target"] > 0).sum(dim=1) == 1).all()
            assert torch.equal(batch["target"].argmax(dim=1), batch["label"])

    def test_averages_of_one_file_and_of_half_precision(self, manifest, relabelled, tmp_path):
        half = relabelled.members[0].astype(np.float16)
        np.save(tmp_path / "half.npy", half)
        compatibility = Compatibility(nc_target="averaged")
        noisy = manifest.rows("train")
        for files, q in (
            ([tmp_path / "half.npy"], half.astype(np.float32)),
            ([tmp_path / "half.npy"] * 2, (half.astype(np.float32) * 2) / np.float32(2)),
        ):
            for batch in make(manifest, relabelled, compatibility=compatibility, averaged=files):
                nc = batch["group"] == NC
                rows = np.searchsorted(noisy, batch["row"][nc].numpy())
                np.testing.assert_array_equal(batch["target"][nc], q[rows])

    def test_predictions_are_read_row_by_row(self, manifest, relabelled, monkeypatch):
        """Nothing of size N x k is made of the files."""
        sizes = []

        def watching(models):
            sizes.append([len(model) for model in models])
            return reference.average(models)

        monkeypatch.setattr(batches_module, "average", watching)
        list(
            make(
                manifest,
                relabelled,
                compatibility=Compatibility(nc_target="averaged"),
                averaged=relabelled.files,
            )
        )
        assert len(sizes) == 5
        assert all(len(models) == 3 for models in sizes)
        assert all(rows <= 4 for models in sizes for rows in models)


class TestMixup:
    def test_within_groups_and_drawn_from_the_position(self, manifest, relabelled):
        drawn = {}
        for seed in (5, 6):
            batches = make(manifest, relabelled, Training(batch_size=10), seed)
            for epoch in range(2):
                for number, batch in enumerate(batches):
                    mixup, group = batch["mixup"], batch["group"]
                    assert torch.equal(group[mixup.partner], group)
                    for g in (CLEAN, NNC):
                        (weight,) = mixup.weight[group == g].unique().tolist()
                        assert 0.5 <= weight <= 1
                        drawn[seed, epoch, number, g] = weight
                    assert (mixup.weight[group == NC] == 1).all()
        assert len(set(drawn.values())) == len(drawn) == 16

    def test_ranks_draw_apart(self, manifest, relabelled):
        weights = [
            next(iter(make(manifest, relabelled, shard=(rank, 2))))["mixup"].weight.min()
            for rank in range(2)
        ]
        assert weights[0] != weights[1]


class TestPosition:
    @pytest.mark.parametrize("clean", ["loader", "joint", "dynamic"])
    def test_resumes_anywhere(self, manifest, relabelled, clean):
        training = Training(batch_size=4, clean=clean)
        whole = make(manifest, relabelled, training)
        undisturbed = [list(whole) for _ in range(3)]
        positions = [(epoch, given) for epoch in range(2) for given in range(len(whole) + 1)]
        for epoch, given in positions:
            before = make(manifest, relabelled, training)
            for _ in range(epoch):
                for _ in before:
                    pass
            loop = iter(before)
            for _ in range(given):
                next(loop)
            state = json.loads(json.dumps(before.state_dict()))
            loop.close()
            before.close()

            after = make(manifest, relabelled, training)
            after.load_state_dict(state)
            rest = undisturbed[epoch][given:]
            if not rest:
                epoch, given, rest = epoch + 1, 0, undisturbed[epoch + 1]
            now = after.state_dict()
            assert (now["epoch"], now["batches"]) == (epoch, given)
            made = list(after)
            assert len(made) == len(rest)
            assert all(map(same, made, rest))
            if epoch < 2:
                assert all(map(same, after, undisturbed[epoch + 1]))
            after.close()

    def test_state_counts_what_was_given_out(self, manifest, relabelled):
        """However much is made ahead."""
        batches = make(manifest, relabelled)
        assert (batches.state_dict()["epoch"], batches.state_dict()["batches"]) == (0, 0)
        for number, _ in enumerate(batches, 1):
            state = batches.state_dict()
            assert (state["epoch"], state["batches"]) == (0, number)
            assert state["clean"]["epoch"] == number - 1  # a clean epoch has one batch
        next(iter(batches))
        assert (batches.state_dict()["epoch"], batches.state_dict()["batches"]) == (1, 1)

    @pytest.mark.parametrize("clean", ["loader", "joint", "dynamic"])
    def test_set_epoch(self, manifest, relabelled, clean):
        training = Training(batch_size=4, clean=clean)
        batches = make(manifest, relabelled, training)
        undisturbed = [list(batches) for _ in range(3)]
        for epoch in (2, 0, 1):
            batches.set_epoch(epoch)
            assert all(map(same, batches, undisturbed[epoch]))
        next(iter(batches))
        batches.set_epoch(1)
        assert all(map(same, batches, undisturbed[1]))

    def test_labelled(self, manifest):
        def new():
            return labelled(manifest, manifest.rows("train"), DATA, 5, 3)

        batches = new()
        undisturbed = list(batches)
        assert not all(map(same, batches, undisturbed))  # another epoch
        before = new()
        loop = iter(before)
        next(loop)
        after = new()
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
        assert all(map(same, after, undisturbed[1:]))
        after.set_epoch(0)
        assert all(map(same, after, undisturbed))

    def test_a_state_of_other_batches_is_refused(self, manifest, relabelled):
        state = make(manifest, relabelled, seed=5).state_dict()
        with pytest.raises(ValueError, match="seed must be that of this loader, 6, got 5"):
            make(manifest, relabelled, seed=6).load_state_dict(state)

    def test_after_close_another_loop(self, manifest, relabelled):
        batches = make(manifest, relabelled)
        first = list(batches)
        batches.close()
        assert len(list(batches)) == 5
        batches.set_epoch(0)
        assert all(map(same, batches, first))


class TestRanks:
    @pytest.mark.parametrize("ranks", [2, 4])
    @pytest.mark.parametrize("clean", ["loader", "joint", "dynamic"])
    def test_share_an_epoch(self, manifest, relabelled, clean, ranks):
        training = Training(batch_size=4, clean=clean)
        shards = [make(manifest, relabelled, training, shard=(r, ranks)) for r in range(ranks)]
        assert len({len(shard) for shard in shards}) == 1
        rows = []
        for parts in zip(*shards, strict=True):
            sizes = [len(part["row"]) for part in parts]
            assert sizes == [4 // ranks * (2 if clean == "loader" else 1)] * ranks
            noisy = [part["row"][part["group"] != CLEAN] for part in parts]
            rows += torch.cat(noisy).tolist()
        assert len(set(rows)) == len(rows)
        assert len(rows) > 10

    def test_batch_size(self, manifest, relabelled):
        with pytest.raises(ValueError, match="grouped: batch_size must be a multiple of the 3"):
            make(manifest, relabelled, shard=(1, 3))


class TestBrokenImages:
    @pytest.fixture
    def broken(self, manifest, tmp_path):
        """The same manifest with other files: these noisy rows and clean rows are broken."""

        def make(rows):
            for i, path in enumerate(manifest.paths()):
                content = b"no image" if i in rows else Path(path).read_bytes()
                (tmp_path / f"{i}.png").write_bytes(content)
            return dataclasses.replace(manifest, root=str(tmp_path))

        return make

    @pytest.mark.filterwarnings("ignore:make_loader")
    def test_skipped_images_leave_valid_batches(self, manifest, relabelled, broken):
        rows = [*manifest.rows("train")[::3], *manifest.rows("clean")[:2]]
        damaged = broken(set(rows))
        healthy, smaller = make(manifest, relabelled), make(damaged, relabelled)
        for _ in range(2):
            for whole, rest in zip(healthy, smaller, strict=True):
                kept = ~np.isin(whole["row"].numpy(), rows)
                assert 0 < kept.sum() <= 8
                for name in ("image", "row", "label", "group", "target"):
                    assert torch.equal(rest[name], whole[name][torch.from_numpy(kept)]), name
                n = len(rest["row"])
                assert rest["mixup"].weight.shape == (n,)
                assert torch.equal(rest["group"][rest["mixup"].partner], rest["group"])
                assert rest["partner_target"].shape == (n, K)

    @pytest.mark.filterwarnings("ignore:make_loader")
    def test_a_rank_without_images_gives_an_empty_batch(self, manifest, relabelled, broken):
        damaged = broken(set(range(len(manifest))))
        training = Training(batch_size=4, clean="dynamic")
        batches = make(damaged, relabelled, training, shard=(0, 2))
        assert len(list(batches)) == 5
        for batch in batches:
            assert batch["image"].shape == (0, 3, 8, 8)
            assert batch["target"].shape == batch["partner_target"].shape == (0, K)
            assert len(batch["group"]) == len(batch["row"]) == 0

    @pytest.mark.filterwarnings("ignore:make_loader")
    def test_a_batch_that_is_passed_over_shifts_no_position(self, manifest, relabelled, broken):
        """One process gives out only batches with images."""
        training = Training(batch_size=2, clean="dynamic")
        order = [batch["row"].tolist() for batch in make(manifest, relabelled, training)]
        damaged = broken(set(order[1] + order[4]))
        undisturbed = list(make(damaged, relabelled, training))
        assert [batch["row"].tolist() for batch in undisturbed] == [
            rows for i, rows in enumerate(order) if i not in (1, 4)
        ]
        before = make(damaged, relabelled, training)
        loop = iter(before)
        for given in range(1, len(undisturbed)):
            next(loop)
            after = make(damaged, relabelled, training)
            after.load_state_dict(before.state_dict())
            assert all(map(same, after, undisturbed[given:]))

    @pytest.mark.filterwarnings("ignore:make_loader")
    def test_no_clean_image_at_all(self, manifest, relabelled, broken):
        damaged = broken(set(manifest.rows("clean").tolist()))
        with pytest.raises(ValueError, match="clean_rows must have images that can be read"):
            next(iter(make(damaged, relabelled)))

    def test_raise(self, manifest, relabelled, broken):
        damaged = broken(set(manifest.rows("train")[:10].tolist()))
        data = dataclasses.replace(DATA, on_error="raise")
        with pytest.raises(ImageError):
            list(make(damaged, relabelled, data=data))


def test_bad_arguments(manifest, relabelled):
    targets, used = relabelled.targets, relabelled.used
    bad_labels = dataclasses.replace(targets, label=np.roll(targets.label, 1))
    averaged = Compatibility(nc_target="averaged")
    for changes, message in (
        ({"targets": targets[1:]}, "targets must be of 23 noisy images and 3 classes, got 22 and"),
        ({"targets": dataclasses.replace(targets, num_classes=4)}, ".* got 23 and 4"),
        ({"targets": bad_labels}, "targets must be made of the given labels of the manifest, got"),
        ({"used": used[1:]}, r"used must be \(23,\) bool, got \(22,\) bool"),
        ({"used": used.astype(int)}, r"used must be \(23,\) bool, got \(23,\) int64"),
        ({"used": np.zeros(NOISY, bool)}, "used must be True for some noisy image, got none"),
        ({"compatibility": averaged}, "averaged must be prediction files .*, got None"),
    ):
        with pytest.raises(ValueError, match=f"^grouped: {message}"):
            make(manifest, relabelled, **changes)


def test_files_of_another_shape(manifest, relabelled, tmp_path):
    np.save(tmp_path / "q.npy", relabelled.members[0][1:])
    with pytest.raises(ValueError, match=r"averaged must be files of shape \(23, 3\), got \(22, 3"):
        make(
            manifest,
            relabelled,
            compatibility=Compatibility(nc_target="averaged"),
            averaged=[relabelled.files[0], tmp_path / "q.npy"],
        )


def test_clean_rows_are_needed(manifest, relabelled):
    for clean in ("loader", "joint"):
        with pytest.raises(ValueError, match="grouped: clean_rows must be rows .*, got none"):
            grouped(
                manifest,
                relabelled.targets,
                relabelled.used,
                np.empty(0, np.int64),
                DATA,
                Training(batch_size=4, clean=clean),
                0,
            )
