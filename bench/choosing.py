"""Does a calibrated rule find non-conforming images better than the published constants do?

Clothing photographs, given as features: in each seed three logistic regressions are trained on
1,000 verified photographs (bootstraps of them), 300 others calibrate the rule, and it is judged on
the rest, among which are pictures of other clothes or of nothing clear. Nobody known to have taken
a photograph that is judged took one that was trained or calibrated on. Two kinds of heads, weakly
and strongly regularised: the published constants fit one sharpness of predictions at most.

CIFAR-10 with synthetic label noise, given as cross-validated softmax outputs: 1,000 rows with the
right label calibrate. Every picture there fits a class, so nothing in it is non-conforming; what
can be found is the wrong label, which the rule is not made for. It shows whether the share of false
positives keeps on 49,000 rows what it promised on 1,000.

Needs the folder with clothing/ and softmax/ (--data); a few minutes.
"""

from __future__ import annotations

import csv
import dataclasses
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import record
from numpy.typing import NDArray

import genkl_ext as gk
from genkl_ext.evaluation import auroc

CLASSES = 10
TRAINED, CALIBRATED = 1000, 300  # photographs
SMALL = 60  # photographs of one sender, at most, to be trained or calibrated on
HEADS = {"smooth": 0.001, "sharp": 1.0}  # inverse strength of the regularisation
PUBLISHED = gk.GenKL.preset("clothing1m", num_classes=CLASSES)
SCALE = 14 / CLASSES
SCALED = dataclasses.replace(PUBLISHED, beta=PUBLISHED.beta * SCALE, sigma=PUBLISHED.sigma * SCALE)
BETAS = tuple(round(part / CLASSES, 3) for part in (0.0, 0.2, 0.42, 0.6, 0.8, 0.95))
SHARES = (0.05, 0.1, 0.2)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Rows to calibrate on, and rows to judge by."""

    name: str
    clean: list[NDArray[Any]]  # M of (V, k), verified
    judged: list[NDArray[Any]]  # M of (N, k)
    truth: NDArray[np.bool_]  # (N,) what is to be found
    head: dict[str, Any]  # what "accuracy" needs; empty without features


def photographs(folder: Path, name: str, seed: int) -> Problem:
    """Predictions of three heads for the photographs of one split."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    with (folder / "images.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    features = np.load(folder / "features_efficientnet_lite0.npy").astype(np.float32)
    known = np.array([row["kind"] == "in_vocabulary" for row in rows])
    classes = sorted({row["label"] for row, is_known in zip(rows, known, strict=True) if is_known})
    labels = np.array([classes.index(row["label"]) if row["label"] in classes else -1
                       for row in rows])  # fmt: skip
    sender = np.array([row["sender"] or f"unknown {i}" for i, row in enumerate(rows)])
    rng = np.random.default_rng(seed)
    names, counts = np.unique(sender[known], return_counts=True)
    taken: list[list[int]] = [[], []]
    for one in rng.permutation(names[counts <= SMALL]):
        part = 0 if len(taken[0]) < TRAINED else 1
        if len(taken[part]) < (TRAINED, CALIBRATED)[part]:
            taken[part] += np.flatnonzero(known & (sender == one)).tolist()
    train, clean = (np.array(part[:most]) for part, most in
                    zip(taken, (TRAINED, CALIBRATED), strict=True))  # fmt: skip
    seen = np.isin(sender, sender[np.concatenate(taken).astype(int)])
    judged = np.flatnonzero(~seen)
    made: list[NDArray[np.float32]] = []
    for member in range(3):
        drawn = rng.choice(train, len(train))
        head = make_pipeline(StandardScaler(), LogisticRegression(C=HEADS[name], max_iter=500))
        head.fit(features[drawn], labels[drawn])
        q = np.zeros((len(rows), CLASSES), np.float32)
        q[:, head.classes_] = head.predict_proba(features)
        made.append(q)
        right = np.mean(q.argmax(1)[clean] == labels[clean])
        print(f"  seed {seed}, {name} head {member}: accuracy {right:.3f}", flush=True)
    # Noisy labels for the head of by="accuracy": 30 % flipped, extra ones at random.
    given = rng.integers(0, CLASSES, len(rows))
    given = np.where(known & (rng.random(len(rows)) >= 0.3), labels, given)
    return Problem(
        name=f"clothing, {name} heads",
        clean=[q[clean] for q in made],
        judged=[q[judged] for q in made],
        truth=~known[judged],
        head={
            "features": features[judged],
            "labels": given[judged],
            "clean_features": features[clean],
            "clean_labels": labels[clean],
        },
    )


def cifar(folder: Path, noise: str, seed: int) -> Problem:
    """Softmax outputs with given and true labels: verified rows are those with the right label."""
    q = np.load(folder / f"{noise}_probs.npy")
    given, true = np.load(folder / f"{noise}_labels.npy").T
    right = np.flatnonzero(given == true)
    clean = np.random.default_rng(seed).choice(right, 1000, replace=False)
    judged = np.delete(np.arange(len(q)), clean)
    return Problem(
        name=noise.replace("_", " "),
        clean=[q[clean]],
        judged=[q[judged]],
        truth=(given != true)[judged],
        head={},
    )


def judge(rule: gk.GenKL, problem: Problem) -> dict[str, float]:
    """What a rule finds among the judged rows."""
    scores = rule.score(problem.judged)
    nc, truth = scores.nc, problem.truth
    hits = int(np.count_nonzero(nc & truth))
    return {
        "alpha": rule.alpha,
        "beta": rule.beta,
        "clean": float(rule.score(problem.clean).nc.mean()),
        "false_positives": float(nc[~truth].mean()),
        "recall": float(nc[truth].mean()),
        "precision": hits / max(1, int(nc.sum())),
        "f1": 2 * hits / (int(nc.sum()) + int(truth.sum())),
        "auroc": auroc(scores.critical_alpha, truth),
    }


def choices(problem: Problem, seed: int, shares: tuple[float, ...]) -> dict[str, gk.GenKL]:
    """The rules that are compared, by name; "by accuracy" for the first share only: it is slow."""
    published, scaled = (dataclasses.replace(rule, seed=seed) for rule in (PUBLISHED, SCALED))
    rules = {"published": published, "published, scaled to k": scaled}
    noisy: dict[str, Any] = {"betas": BETAS, "noisy": problem.judged}
    own = float(scaled.score(problem.clean).nc.mean())
    found = scaled.calibrate(problem.clean, false_positives=own, **noisy)
    rules["alpha and beta for that of published, scaled"] = found.rule
    for share in shares:
        name, asked = f"{100 * share:g} %", {"false_positives": share}
        rules[f"alpha for {name}"] = scaled.calibrate(problem.clean, **asked).rule
        found = scaled.calibrate(problem.clean, **asked, **noisy)
        rules[f"alpha and beta for {name}"] = found.rule
        if problem.head and share == shares[0]:
            best = scaled.calibrate(problem.clean, **asked, **noisy, by="accuracy", **problem.head)
            rules[f"alpha and beta for {name}, by accuracy"] = best.rule
    return rules


def main() -> None:
    options = record.parser(__doc__)
    options.add_argument("--data", type=Path, help="folder with clothing/ and softmax/")
    options.add_argument("--seeds", type=int, default=3, help="splits, heads and vectors")
    asked = options.parse_args()
    if asked.data is None:
        print("choosing: --data must name the folder with clothing/ and softmax/; nothing is done")
        return
    softmax = asked.data / "softmax"
    noises = sorted(p.name.removesuffix("_probs.npy") for p in softmax.glob("*_probs.npy"))
    heads = list(HEADS)
    seeds, shares = list(range(asked.seeds)), SHARES
    if asked.quick:
        noises, heads, seeds, shares = noises[:1], heads[:1], seeds[:1], SHARES[:1]
    problems = [(photographs, asked.data / "clothing", head) for head in heads]
    problems += [(cifar, softmax, noise) for noise in noises]
    cells: list[dict[str, Any]] = []
    for make, folder, which in problems:
        found: dict[str, list[dict[str, float]]] = {}
        for seed in seeds:
            problem = make(folder, which, seed)
            if asked.quick:
                problem = dataclasses.replace(problem, head={})
            for name, rule in choices(problem, seed, shares).items():
                found.setdefault(name, []).append(judge(rule, problem))
        for name, judged in found.items():
            figures = {key: [one[key] for one in judged] for key in judged[0]}
            rows = {"rows": len(problem.truth), "positives": int(problem.truth.sum())}
            cells.append({"data": problem.name, "rule": name, **rows, **figures})
            means = {key: statistics.mean(values) for key, values in figures.items()}
            text = ", ".join(f"{key} {value:.3f}" for key, value in means.items())
            print(f"{problem.name:30} {name:50} {text}", flush=True)
    settings = {"quick": asked.quick, "seeds": seeds, "betas": BETAS}
    full = not asked.quick and asked.seeds == 3
    record.write("choosing", settings, cells, asked.out or (record.RESULTS if full else None))


if __name__ == "__main__":
    main()
