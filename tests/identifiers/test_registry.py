"""The registry, the one call, and what is said of wrong input."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from awkward_rows import awkward, some_labels

from genkl_ext import GenKL, identifiers
from genkl_ext.identifiers.registry import INPUTS

ROOT = Path(__file__).resolve().parents[2]
RULE = GenKL(5, alpha=1.05, beta=0.05, sigma=0.05)
VERIFIED = {
    "reference": np.random.default_rng(7).standard_normal((30, 7)),
    "reference_labels": np.arange(30) % 3,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "genkl": {"rule": RULE},
    "density_ratio": VERIFIED,
    "combined": VERIFIED,
}
OF_ROWS = [
    name
    for name in identifiers.names()
    if identifiers.get(name).needs & {"predictions", "logits", "members"}
]


ROWS_OF_PROBABILITIES = [
    n for n in OF_ROWS if n not in ("energy", "max_logit", "genkl", "combined")
]


def everything() -> dict[str, Any]:
    """All that any identifier may need."""
    q = awkward(5)
    rng = np.random.default_rng(0)
    return {
        "predictions": [q, awkward(5, seed=1)],
        "logits": rng.standard_normal(q.shape).astype(np.float32),
        "features": rng.standard_normal((len(q), 7)),
        "labels": some_labels(q),
    }


def with_row(name: str, row: int, value: float) -> dict[str, Any]:
    """All input, valid but for one entry of the rows that ``name`` takes."""
    given = everything()
    given["predictions"] = [given["predictions"][0].copy(), given["predictions"][1]]
    given["labels"] = np.zeros(len(given["labels"]), dtype=np.int64)
    given["predictions"][0][row, 2] = value
    given["logits"][row, 2] = value
    return given


@pytest.mark.parametrize("name", identifiers.names())
def test_each_takes_what_it_needs(name: str) -> None:
    identifier = identifiers.get(name, **OPTIONS.get(name, {}))
    given = everything()
    scores = identifier(**given)
    assert isinstance(scores, np.ndarray)
    assert scores.dtype == np.float32
    assert scores.shape == given["labels"].shape
    unlabelled = given["labels"] < 0
    counts = "labels" in identifier.needs and name != "mahalanobis"
    np.testing.assert_array_equal(np.isnan(scores), unlabelled & counts)
    tensors = {
        key: [torch.as_tensor(a) for a in value] if key == "predictions" else torch.as_tensor(value)
        for key, value in given.items()
    }
    same = identifier(**tensors)
    assert same.dtype == torch.float32
    np.testing.assert_allclose(same.numpy(), scores, rtol=2e-7, atol=1e-15)


@pytest.mark.parametrize("name", identifiers.names())
def test_facts(name: str) -> None:
    identifier = identifiers.get(name)
    assert identifier.name == name == identifier.function.__name__
    assert getattr(identifiers, name) is identifier.function
    assert identifier.finds in ("nc", "wrong label")
    assert identifier.needs <= {*INPUTS, "reference"}
    assert identifier.title
    assert re.fullmatch(r".* \d{4}", identifier.source)
    if name not in ("confident_learning", "combined"):  # of modules with one source
        assert "Source:" in (identifier.function.__doc__ or "")
    assert hash(identifier) == hash(identifiers.get(name))


def test_titles_differ() -> None:
    titles = [identifiers.get(name).title for name in identifiers.names()]
    assert len(set(titles)) == len(titles)


def test_options_are_kept() -> None:
    loose = identifiers.get("energy", temperature=2.0)
    logits = everything()["logits"]
    expected = identifiers.energy(logits, temperature=2.0)
    np.testing.assert_array_equal(loose(logits=logits), expected)
    at_the_call = identifiers.get("energy")(logits=logits, temperature=2.0)
    np.testing.assert_array_equal(at_the_call, expected)


def test_members_are_the_predictions_one_by_one() -> None:
    given = everything()
    of_predictions = identifiers.get("vote_entropy")(given["predictions"])
    of_members = identifiers.get("vote_entropy")(members=given["predictions"])
    np.testing.assert_array_equal(of_predictions, of_members)


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="^identifiers.get: no identifier 'entrpy'; did you mean"):
        identifiers.get("entrpy")
    with pytest.raises(ValueError, match="no identifier 'xxxx'; there are genkl, entropy, max_s"):
        identifiers.get("xxxx")


@pytest.mark.parametrize("name", OF_ROWS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -0.5])
def test_a_bad_row_is_named(name: str, value: float, small_pieces: None) -> None:
    given = with_row(name, 77, value)
    identifier = identifiers.get(name, **OPTIONS.get(name, {}))
    if identifier.needs == {"logits"} and value == -0.5:
        identifier(**given)  # a logit may be negative
        return
    argument = r"(predictions|members)\[0\]" if identifier.needs != {"logits"} else "logits"
    where = {"genkl": "score", "combined": "entropy"}.get(name, name)
    message = rf"^{where}: {argument} must be finite.*, got {value} at row 77, class 2$"
    with pytest.raises(ValueError, match=message):
        identifier(**given)


@pytest.mark.parametrize("name", OF_ROWS)
def test_without_validation_nan_stays_nan(name: str, small_pieces: None) -> None:
    identifier = identifiers.get(name, **OPTIONS.get(name, {}), validate=False)
    given = with_row(name, 77, np.nan)
    scores = identifier(**given)
    assert np.isnan(scores[77])
    others = np.delete(np.arange(len(scores)), 77)
    if name == "confident_learning":  # thresholds are those of the other rows
        rest = {
            "predictions": [q[others] for q in given["predictions"]],
            "labels": given["labels"][others],
        }
        np.testing.assert_array_equal(scores[others], identifier(**rest))
    elif name != "combined":  # which ranks the rows among each other
        sound = with_row(name, 77, 0.0)
        np.testing.assert_array_equal(scores[others], identifier(**sound)[others])


@pytest.mark.parametrize("name", ROWS_OF_PROBABILITIES)
def test_rows_that_do_not_sum_to_1(name: str) -> None:
    given = everything()
    given["labels"] = given["labels"].clip(0)
    given["predictions"][0][9] *= 3
    # 3 and 1 make 2, by float32
    with pytest.raises(ValueError, match=rf"^{name}: rows of .* must sum to 1 .* got 2.* row 9$"):
        identifiers.get(name)(**given)


def test_wrong_input() -> None:
    q = awkward(5)
    with pytest.raises(TypeError, match=r"^entropy: predictions\[0\] must be a NumPy .* got list$"):
        identifiers.entropy(q.tolist())
    with pytest.raises(TypeError, match="^entropy: predictions must be .* got NoneType$"):
        identifiers.get("entropy")()
    with pytest.raises(TypeError, match="^entropy: predictions must be floating-point, got int64"):
        identifiers.entropy(np.ones((3, 2), dtype=int))
    with pytest.raises(ValueError, match=r"^margin: predictions must have shape \(N, k\) .* \(3,"):
        identifiers.margin(np.ones(3))
    with pytest.raises(ValueError, match=r"^margin: predictions must have shape \(N, k\) with k"):
        identifiers.margin(np.ones((3, 1)))
    with pytest.raises(ValueError, match=r"^entropy: predictions\[1\] must be like predictions\[0"):
        identifiers.entropy([q, q[:-1]])
    with pytest.raises(TypeError, match=r"^entropy: predictions\[1\] must be like .* got Tensor"):
        identifiers.entropy([q, torch.as_tensor(q)])
    with pytest.raises(ValueError, match="^vote_entropy: members must be at least 2 .* got 1$"):
        identifiers.vote_entropy([q])
    with pytest.raises(TypeError, match="^genkl: rule must be a GenKL, such as"):
        identifiers.get("genkl")(q)
    with pytest.raises(ValueError, match="^energy: temperature must be from 1e-06 to 1e.06, got 0"):
        identifiers.energy(q, temperature=0)
    with pytest.raises(TypeError, match="^kl_uniform: floor must be a number, got None"):
        identifiers.kl_uniform(q, floor=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^kl_uniform: floor must be from"):
        identifiers.kl_uniform(q, floor=0)


@pytest.mark.parametrize("of", [np.asarray, torch.as_tensor])
def test_wrong_labels(of: Any) -> None:
    q = of(awkward(5)[:4])
    with pytest.raises(
        ValueError, match=r"labels must be from -1 \(no label\) to 4, got 5 at row 2"
    ):
        identifiers.self_confidence(q, of([0, 1, 5, -2]))
    with pytest.raises(ValueError, match=r"labels must have shape \(4,\), got \(3,\)"):
        identifiers.self_confidence(q, of([0, 1, 2]))
    with pytest.raises(TypeError, match=r"labels must be \(N,\) integers, got .*float"):
        identifiers.self_confidence(q, of([0.0, 1.0, 2.0, 3.0]))
    with pytest.raises(TypeError, match=r"labels must be .*integers, got None"):
        identifiers.self_confidence(q, None)
    if of is np.asarray:
        with pytest.raises(TypeError, match="labels must be a NumPy array, got a torch tensor"):
            identifiers.self_confidence(q, torch.zeros(4, dtype=torch.int64))


def test_every_identifier_is_in_the_table_of_the_documentation() -> None:
    text = (ROOT / "docs" / "identifiers.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| `")
    ]
    table = {name.strip("`"): rest for name, *rest in rows}
    assert len(table) == len(rows)
    assert table.keys() == set(identifiers.names())
    for name, (formula, needs, finds, source) in table.items():
        identifier = identifiers.get(name)
        assert formula
        assert {need.strip() for need in needs.split(",")} == identifier.needs
        assert finds == identifier.finds
        assert identifier.source in source


def test_loading_them_loads_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from genkl_ext import identifiers\n"
        "import numpy as np\n"
        "identifiers.entropy(np.full((3, 4), 0.25))\n"
        "print([m for m in ('torch', 'sklearn', 'scipy', 'pandas', 'matplotlib')"
        " if m in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == "[]\n"
