"""What finds non-conforming images better than entropy or GenKL alone, and which part does it?

On photographs of ten kinds of clothing (--data: folder with clothing/ and softmax/). 1,000 images
are verified; the crawl has the others, 30 % of their labels flipped, and pictures of other clothes,
or of nothing clear, under the label that a search would give them. Three members, logistic
regressions on bootstraps of the verified images' features, predict the crawl. Three views:

    sampled      the verified images are a random part of what the crawl's senders sent
    apart        the same, but an image is scored without any other image of its sender: members,
                 verified images and crawl come from other senders
    elsewhere    the verified images are those of senders who have nothing in the crawl

Then the same on scikit-learn's digits, where 8 and 9 are of no class, and on softmax files of
CIFAR-10 with wrong labels: without embeddings, the logarithm of the softmax stands in for them.

Nothing is fitted to the truth of a crawl, except for the row that says so.
"""

from __future__ import annotations

import csv
import dataclasses
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import record
from clothing import FLIPPED, FOUND_AS, SIZES
from numpy.typing import NDArray
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression

import genkl_ext as gk
from genkl_ext import evaluation, identifiers
from genkl_ext.identifiers.combined import combined, density_ratio, least_nc_share

MEMBERS = 3
FOLDS = 5
# Inverse penalty of the members: least log loss on validation images among 0.002, 0.01, 0.05, 0.3,
# in splits that are not among those reported.
INVERSE_PENALTY = 0.05
SECOND = 0.2  # share of the crawl that a second iteration takes for NC
DRAWS = 1000  # of the bootstrap over senders
FALSE_POSITIVES = 0.05

PARTS = ("entropy", "density ratio")
MORE = (
    "mutual information", "distance to neighbours", "Mahalanobis distance", "given label",
    "second iteration",
)  # fmt: skip
VARIANTS = ("shrinkage 0.1", "shrinkage 0.9", "shrinkage 1", "standardised features")
KEYS = ("data", "view", "identifier")
Scores = dict[str, NDArray[np.float64]]


@dataclasses.dataclass(frozen=True)
class Crawl:
    """Images with what is known of them; ``verified``, ``validation`` and ``rows`` index them."""

    features: NDArray[np.float32]  # (n, d)
    truth: NDArray[np.int64]  # (n,) the true class, -1: none
    given: NDArray[np.int64]  # (n,) the label of the crawl
    kinds: NDArray[np.str_]  # (n,) "right", "wrong label", or a kind of NC
    senders: NDArray[np.int64]  # (n,) who sent it; only judging and splitting see this
    unseen: NDArray[np.bool_]  # (n,) of a sender whose images had no say in the choice of the parts
    verified: NDArray[np.int64]
    validation: NDArray[np.int64]
    rows: NDArray[np.int64]  # the crawled images

    @property
    def classes(self) -> int:
        return int(self.truth.max()) + 1

    @property
    def nc(self) -> NDArray[np.bool_]:
        """(N,) of the crawled images."""
        return self.truth[self.rows] < 0


# ---- data ----------------------------------------------------------------------------------------


def clothing(folder: Path, seed: int, elsewhere: bool) -> Crawl:
    """The photographs, split by ``seed``; validation images are of senders of their own."""
    rng = np.random.default_rng(seed)
    with (folder / "images.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    features = np.load(folder / "features_efficientnet_lite0.npy").astype(np.float32)
    names = [row["sender"] or f"unknown {i}" for i, row in enumerate(table)]
    listed, senders = np.unique(names, return_inverse=True)
    inside = np.array([row["kind"] == "in_vocabulary" for row in table])
    classes = sorted({row["label"] for row, known in zip(table, inside, strict=True) if known})
    truth = np.array(
        [classes.index(row["label"]) if row["label"] in classes else -1 for row in table]
    )

    sizes = np.bincount(senders, weights=inside).astype(int)  # images of a class
    part = np.full(len(listed), "crawl", dtype="<U10")
    wanted = {"validation": SIZES["val"], "verified": SIZES["clean"] if elsewhere else 0}
    for sender in rng.permutation(len(listed)):
        # A sender of hundreds of photographs would be most of a validation set.
        if 0 < sizes[sender] <= 60 and sizes[part == "validation"].sum() < wanted["validation"]:
            part[sender] = "validation"
        elif sizes[sender] and sizes[part == "verified"].sum() < wanted["verified"]:
            part[sender] = "verified"
    kept = part[senders]
    verified = rng.permutation(np.flatnonzero(inside & (kept == "verified")))
    if not elsewhere:
        verified = rng.permutation(np.flatnonzero(inside & (kept == "crawl")))
    verified = verified[: SIZES["clean"]]
    rows = np.setdiff1d(np.flatnonzero(kept == "crawl"), verified)

    given, kinds = truth.copy(), np.array([row["kind"] for row in table], dtype="<U20")
    kinds[inside] = "right"
    for i in rows:
        if not inside[i]:
            found = FOUND_AS.get(table[i]["label"])
            given[i] = classes.index(found) if found else rng.integers(len(classes))
        elif rng.uniform() < FLIPPED:
            given[i] = (truth[i] + rng.integers(1, len(classes))) % len(classes)
            kinds[i] = "wrong label"
    return Crawl(
        features=features,
        truth=truth,
        given=given,
        kinds=kinds,
        senders=senders,
        unseen=np.array([zlib.crc32(name.encode()) % 2 == 1 for name in names]),
        verified=verified,
        validation=np.flatnonzero(inside & (kept == "validation")),
        rows=rows,
    )


def digits(seed: int) -> Crawl:
    """Scikit-learn's digits: 0 to 7 are the classes, 20 of each are verified, 20 validation."""
    from sklearn.datasets import load_digits

    rng = np.random.default_rng(seed)
    pixels, digit = load_digits(return_X_y=True)
    truth = np.where(digit < 8, digit, -1)
    places = [rng.permutation(np.flatnonzero(digit == c)) for c in range(8)]
    verified, validation = (np.concatenate([p[a : a + 20] for p in places]) for a in (0, 20))
    rows = np.setdiff1d(np.arange(len(digit)), np.concatenate([verified, validation]))
    wrong = (truth >= 0) & (rng.uniform(size=len(digit)) < FLIPPED)
    wrong[[*verified, *validation]] = False
    given = np.where(wrong, (truth + rng.integers(1, 8, len(digit))) % 8, truth)
    given[truth < 0] = rng.integers(0, 8, (truth < 0).sum())
    return Crawl(
        features=pixels.astype(np.float32),
        truth=truth,
        given=given,
        kinds=np.where(truth < 0, "8 and 9", np.where(wrong, "wrong label", "right")),
        senders=np.arange(len(digit)),  # who wrote what is not known
        unseen=np.ones(len(digit), dtype=bool),
        verified=verified,
        validation=validation,
        rows=rows,
    )


# ---- scores --------------------------------------------------------------------------------------


def members(crawl: Crawl, verified: NDArray[np.int64], seed: int) -> list[NDArray[np.float32]]:
    """Softmax of all images by each of the members."""
    made = []
    for member in range(MEMBERS):
        rng = np.random.default_rng([seed, member])
        drawn = rng.choice(verified, len(verified))
        x = crawl.features[drawn]
        mean, deviation = x.mean(axis=0), x.std(axis=0) + 1e-6
        head = LogisticRegression(C=INVERSE_PENALTY, max_iter=200, tol=1e-3)
        head.fit((x - mean) / deviation, crawl.truth[drawn])
        q = np.zeros((len(crawl.features), crawl.classes), dtype=np.float32)
        q[:, head.classes_] = head.predict_proba((crawl.features - mean) / deviation)
        made.append(q)
    return made


def score(
    crawl: Crawl, seed: int, verified: NDArray[np.int64], asked: NDArray[np.bool_] | None = None
) -> Scores:
    """Scores of the crawled images by every identifier.

    Args:
        verified: the verified images that may be used.
        asked: (N,) of the crawled images, of which nothing may be learned but what their own
            features say; the scores of the others are of no use then.
    """
    rows, features, labels = crawl.rows, crawl.features, crawl.truth[verified]
    apart = None if asked is None else features[rows[~asked]]
    q = [member[rows] for member in members(crawl, verified, seed)]
    k = crawl.classes
    rule = gk.GenKL(num_classes=k, alpha=1.0, beta=0.3 / k, sigma=0.5 / k)
    near = {"reference": features[verified], "reference_labels": labels}
    # The distances do better in standardised features.
    x = (features - features[verified].mean(axis=0)) / (features[verified].std(axis=0) + 1e-6)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    scores: dict[str, Any] = {
        "entropy": identifiers.entropy(q),
        "density ratio": density_ratio(features[rows], **near, crawl=apart),
        "critical alpha": identifiers.genkl(q, rule=rule),
        "max softmax": identifiers.max_softmax(q),
        "mutual information": identifiers.mutual_information(q),
        "distance to neighbours": identifiers.knn_distance(x[rows], reference=x[verified]),
        "Mahalanobis distance": identifiers.mahalanobis(
            x[rows], reference=x[verified], reference_labels=labels
        ),
        "given label": identifiers.self_confidence(q, crawl.given[rows]),
    }
    for variant in VARIANTS[:3]:
        shrinkage = float(variant.rpartition(" ")[2])
        scores[variant] = density_ratio(features[rows], **near, crawl=apart, shrinkage=shrinkage)
    scores[VARIANTS[3]] = density_ratio(
        x[rows],
        reference=x[verified],
        reference_labels=labels,
        crawl=None if asked is None else x[rows[~asked]],
    )
    first = together(scores[name] for name in PARTS)
    scores["second iteration"] = second(crawl, verified, np.mean(q, axis=0), first, asked)
    if asked is None:
        scores["combined"] = combined(q, features[rows], **near)
    return {name: np.asarray(values, dtype=np.float64) for name, values in scores.items()}


def second(
    crawl: Crawl,
    verified: NDArray[np.int64],
    q: NDArray[np.float32],
    scores: NDArray[np.float64],
    asked: NDArray[np.bool_] | None,
) -> NDArray[np.float64]:
    """Probability of one more class, "none", learned beside the others.

    Its examples are the least conforming rows of the crawl by ``scores``; the others have their
    most probable class. A row is scored by a head that has not seen it.
    """
    k, rows = crawl.classes, crawl.rows
    target = q.argmax(axis=1)
    target[scores >= np.quantile(scores, 1 - SECOND)] = k
    unit = crawl.features / np.linalg.norm(crawl.features, axis=1, keepdims=True)
    mean = unit[rows].mean(axis=0)
    x = (unit - mean) / (unit[rows].std(axis=0) + 1e-6) / np.sqrt(unit.shape[1])

    def learned(seen: NDArray[np.bool_]) -> Any:
        head = LogisticRegression(C=10.0, max_iter=100, tol=1e-3)
        return head.fit(
            np.concatenate([x[verified], x[rows[seen]]]),
            np.concatenate([crawl.truth[verified], target[seen]]),
        )

    out = np.full(len(rows), np.nan)
    parts = [asked] if asked is not None else [np.arange(len(rows)) % FOLDS == f for f in range(5)]
    for part in parts:
        out[part] = learned(~part).predict_proba(x[rows[part]])[:, -1]
    return out


def scores_apart(crawl: Crawl, seed: int) -> Scores:
    """Scores of every crawled image without anything of its sender."""
    sizes = np.bincount(crawl.senders)
    folds, loads = np.zeros(len(sizes), dtype=int), np.zeros(FOLDS)
    order = np.random.default_rng(seed).permutation(len(sizes))
    for sender in order[np.argsort(-sizes[order], kind="stable")]:
        folds[sender] = loads.argmin()
        loads[folds[sender]] += sizes[sender]
    fold = folds[crawl.senders]
    out: Scores = {}
    for f in range(FOLDS):
        asked = fold[crawl.rows] == f
        some = score(crawl, seed, crawl.verified[fold[crawl.verified] != f], asked)
        for name, values in some.items():
            out.setdefault(name, np.empty(len(crawl.rows)))[asked] = values[asked]
    return out


def told(crawl: Crawl, seed: int) -> NDArray[np.float64]:
    """A linear classifier that is told which images of the other senders conform: out of reach."""
    from sklearn.model_selection import GroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import Normalizer, StandardScaler

    rows, out = crawl.rows, np.empty(len(crawl.rows))
    x = crawl.features
    folds = GroupKFold(FOLDS, shuffle=True, random_state=seed)
    for seen, asked in folds.split(rows, groups=crawl.senders[rows]):
        head = make_pipeline(
            Normalizer(), StandardScaler(), LogisticRegression(C=1e-4, max_iter=200)
        )
        head.fit(
            np.concatenate([x[crawl.verified], x[rows[seen]]]),
            np.concatenate([np.zeros(len(crawl.verified), dtype=bool), crawl.nc[seen]]),
        )
        out[asked] = head.decision_function(x[rows[asked]])
    return out


def together(scores: Iterable[NDArray[Any]]) -> NDArray[np.float64]:
    """Mean of the ranks."""
    return np.mean([rankdata(values) / len(values) for values in scores], axis=0)


def with_combinations(crawl: Crawl, scores: Scores, seed: int) -> Scores:
    """The single scores, the combination, and what it is with less, more and other parts."""
    both = [scores[name] for name in PARTS]
    out = {name: values for name, values in scores.items() if name not in VARIANTS}
    out.setdefault("combined", together(both))
    for name in VARIANTS:
        out[f"combined, {name}"] = together([scores["entropy"], scores[name]])
    for name in ("critical alpha", "mutual information"):
        out[f"{name} for entropy"] = together([scores[name], scores["density ratio"]])
    for name in ("distance to neighbours", "Mahalanobis distance"):
        out[f"{name} for the ratio"] = together([scores["entropy"], scores[name]])
    for name in MORE:
        out[f"combined + {name}"] = together([*both, scores[name]])
    out["told the truth + entropy"] = together([scores["entropy"], told(crawl, seed)])
    return out


# ---- judging -------------------------------------------------------------------------------------


def judge(data: str, view: str, crawls: list[Crawl], scored: list[Scores]) -> list[dict[str, Any]]:
    """A cell for each identifier: its figures for each seed, and what it gains over entropy."""
    gains = gain_over(scored, crawls, "entropy")
    cells = []
    for name in scored[0]:
        figures = [figures_of(c, s[name]) for c, s in zip(crawls, scored, strict=True)]
        cells.append({
            "data": data,
            "view": view,
            "identifier": name,
            "gain": gains[name],
            **{key: [f[key] for f in figures] for key in figures[0]},
        })  # fmt: skip
        mean = np.mean(cells[-1]["auroc"])
        print(f"{data:10} {view:10} {name:40} AUROC {mean:.3f}  {gains[name][0]:+.3f}", flush=True)
    return cells


def figures_of(crawl: Crawl, scores: NDArray[np.float64]) -> dict[str, float]:
    """Measures of one seed; NC rows against conforming ones, rightly or wrongly labelled."""
    kinds, nc = crawl.kinds[crawl.rows], crawl.nc
    unseen = crawl.unseen[crawl.rows]

    def between(positive: NDArray[np.bool_], negative: NDArray[np.bool_]) -> float:
        some = positive | negative
        return evaluation.auroc(scores[some], positive[some])

    right, wrong = kinds == "right", kinds == "wrong label"
    return {
        "auroc": evaluation.auroc(scores, nc),
        "average_precision": evaluation.average_precision(scores, nc),
        "recall": evaluation.recall_at_false_positives(scores, nc, FALSE_POSITIVES),
        "unseen": between(nc & unseen, ~nc & unseen),
        "within": within(crawl, scores),
        "right": between(nc, right),
        "wrong": between(nc, wrong),
        "wrong_right": between(wrong, right),
        **{f"kind {kind}": between(kinds == kind, ~nc) for kind in sorted({*kinds[nc]} - {"skip"})},
    }


def within(crawl: Crawl, scores: NDArray[np.float64]) -> float:
    """AUROC over pairs of the same sender, a sender weighing as the rarer of its two sorts."""
    senders, nc = crawl.senders[crawl.rows], crawl.nc
    total = weight = 0.0
    for sender in np.unique(senders):
        some = senders == sender
        rarer = min(nc[some].sum(), (~nc[some]).sum())
        if rarer:
            total += rarer * evaluation.auroc(scores[some], nc[some])
            weight += rarer
    return total / weight if weight else float("nan")


def gain_over(
    scored: list[Scores], crawls: list[Crawl], baseline: str
) -> dict[str, tuple[float, float, float]]:
    """AUROC less that of the baseline, mean over the seeds, with its 95 % interval.

    The bootstrap draws senders, the same ones for every seed: images of a sender resemble each
    other, and the seeds share the images.
    """
    rng = np.random.default_rng(0)
    number = max(int(c.senders.max()) for c in crawls) + 1
    weights = rng.multinomial(number, np.full(number, 1 / number), size=DRAWS)
    means: dict[str, NDArray[np.float64]] = {}
    for name in scored[0]:
        drawn = [
            weighted_auroc(s[name], c.nc, weights[:, c.senders[c.rows]])
            for c, s in zip(crawls, scored, strict=True)
        ]
        whole = [evaluation.auroc(s[name], c.nc) for c, s in zip(crawls, scored, strict=True)]
        means[name] = np.concatenate([[np.mean(whole)], np.mean(drawn, axis=0)])
    gains = {}
    for name, values in means.items():
        gain = values - means[baseline]
        low, high = np.nanquantile(gain[1:], [0.025, 0.975])
        gains[name] = (float(gain[0]), float(low), float(high))
    return gains


def weighted_auroc(
    scores: NDArray[np.float64], truth: NDArray[np.bool_], weights: NDArray[np.int64]
) -> NDArray[np.float64]:
    """(B,) AUROC with each of (B, N) weights; a tie counts as the order of the rows has it."""
    order = np.argsort(scores, kind="stable")
    w = weights[:, order].astype(np.float64)
    positive = w * truth[order]
    below = np.cumsum(w - positive, axis=1)
    with np.errstate(invalid="ignore"):
        return (positive * below).sum(axis=1) / (positive.sum(axis=1) * below[:, -1])


def thresholds(data: str, crawl: Crawl, seed: int) -> list[dict[str, Any]]:
    """What is flagged when 5 % of the validation images would be."""
    rows = np.concatenate([crawl.rows, crawl.validation])
    q = [member[rows] for member in members(crawl, crawl.verified, seed)]
    features, verified = crawl.features, crawl.verified
    both = combined(
        q, features[rows], reference=features[verified], reference_labels=crawl.truth[verified]
    )
    cells = []
    for name, scores in (("entropy", identifiers.entropy(q)), ("combined", both)):
        mine, theirs = np.split(np.asarray(scores, dtype=np.float64), [len(crawl.rows)])
        flagged = mine > np.quantile(theirs, 1 - FALSE_POSITIVES)
        cells.append({
            "data": data,
            "view": "threshold",
            "identifier": name,
            "flagged": float(flagged.mean()),
            "false_positives": float(flagged[~crawl.nc].mean()),
            "recall_flagged": float(flagged[crawl.nc].mean()),
            "precision_flagged": float(crawl.nc[flagged].mean()),
        })  # fmt: skip
        print(data, "threshold", name, {k: v for k, v in cells[-1].items() if k not in KEYS})
    return cells


def check(data: str, view: str, crawls: list[Crawl], seeds: Iterable[int]) -> dict[str, Any]:
    """The least share of NC images that the ratio leaves room for, beside the true one."""
    found = []
    for c, seed in zip(crawls, seeds, strict=True):
        near = {"reference": c.features[c.verified], "reference_labels": c.truth[c.verified]}
        found.append(least_nc_share(c.features[c.rows], **near, seed=seed))
    true = [float(c.nc.mean()) for c in crawls]
    print(f"{data:10} {view:10} least NC share {np.round(found, 3)}, true {np.round(true, 3)}")
    return {
        "data": data,
        "view": "check",
        "identifier": view,
        "least_nc_share": found,
        "nc_share": true,
    }


# ---- softmax files -------------------------------------------------------------------------------


def softmax_files(folder: Path, seeds: Iterable[int], rows: int) -> list[dict[str, Any]]:
    """CIFAR-10: wrong labels, and the last two classes as if they were none.

    For the latter their columns are left out and rows scaled to sum to 1, which takes nothing from
    the network's knowledge of these classes.
    """
    cells = []
    for path in sorted(folder.glob("*_probs.npy")):
        q = np.load(path).astype(np.float32)
        labels = np.load(path.with_name(path.name.replace("_probs", "_labels"))).astype(np.int64)
        less = q[:, :8] / q[:, :8].sum(axis=1, keepdims=True)
        for view, predictions, classes in (("wrong labels", q, 10), ("classes left out", less, 8)):
            figures: dict[str, list[float]] = {"entropy": [], "density ratio": [], "combined": []}
            for seed in seeds:
                drawn = np.random.default_rng(seed).permutation(len(q))[:rows]
                given, true = labels[drawn].T
                wanted = given != true if view == "wrong labels" else true >= classes
                known = np.flatnonzero(true < classes)[:1000]
                crawl = np.setdiff1d(np.arange(rows), known)
                p = predictions[drawn] / predictions[drawn].sum(axis=1, keepdims=True)
                x = np.log(np.maximum(p, np.float32(6e-8)))  # half of the smallest float16 above 0
                near = {"reference": x[known], "reference_labels": true[known]}
                found = {
                    "entropy": identifiers.entropy(p[crawl]),
                    "density ratio": density_ratio(x[crawl], **near),
                    "combined": combined(p[crawl], x[crawl], **near),
                }
                for name, values in found.items():
                    figures[name].append(evaluation.auroc(values, wanted[crawl]))
            for name, values in figures.items():
                cells.append({
                    "data": path.name.removesuffix("_probs.npy"),
                    "view": view,
                    "identifier": name,
                    "auroc": values,
                })  # fmt: skip
                print(f"{cells[-1]['data']:26} {view:18} {name:16} {np.mean(values):.3f}")
    return cells


def main() -> None:
    options = record.parser(__doc__)
    options.add_argument("--data", type=Path, help="folder with clothing/ and softmax/")
    asked = options.parse_args()
    seeds = (0,) if asked.quick else (0, 1, 2)
    cells: list[dict[str, Any]] = []
    checks: list[dict[str, Any]] = []
    images: Mapping[str, int] = {}

    def view(data: str, name: str, crawls: list[Crawl]) -> None:
        scoring = scores_apart if name == "apart" else lambda c, s: score(c, s, c.verified)
        scored = [
            with_combinations(c, scoring(c, s), s) for c, s in zip(crawls, seeds, strict=True)
        ]
        cells.extend(judge(data, name, crawls, scored))
        if name != "apart":  # whose verified images are those of "sampled"
            checks.append(check(data, name, crawls, seeds))

    if asked.data is None:
        print("beyond: without --data only the digits are looked at")
    else:
        folder = asked.data / "clothing"
        crawls = [clothing(folder, seed, elsewhere=False) for seed in seeds]
        kinds, counts = np.unique(crawls[0].kinds[crawls[0].rows], return_counts=True)
        images = dict(zip(kinds.tolist(), counts.tolist(), strict=True))
        print(images)
        view("clothing", "sampled", crawls)
        for crawl, seed in zip(crawls, seeds, strict=True):
            cells += thresholds("clothing", crawl, seed)
        if not asked.quick:
            view("clothing", "apart", crawls)
            view("clothing", "elsewhere", [clothing(folder, s, elsewhere=True) for s in seeds])
    view("digits", "sampled", [digits(seed) for seed in seeds])
    if asked.data is not None:
        cells += softmax_files(asked.data / "softmax", seeds, 2000 if asked.quick else 20000)
    cells += checks
    settings = {"quick": asked.quick, "seeds": list(seeds), "images": images, "draws": DRAWS}
    partial = asked.quick or asked.data is None
    record.write("beyond", settings, cells, asked.out or (None if partial else record.RESULTS))


if __name__ == "__main__":
    main()
