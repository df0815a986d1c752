"""Every identifier by its name, behind one call."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from .combined import combined, density_ratio
from .confidence import (
    collision_entropy,
    energy,
    entropy,
    genkl,
    kl_uniform,
    margin,
    max_logit,
    max_softmax,
)
from .confident_learning import confident_learning
from .disagreement import mutual_information, vote_entropy
from .features import knn_distance, mahalanobis, neighbour_disagreement
from .given_label import dsos, jo_src, normalised_margin, self_confidence

if TYPE_CHECKING:
    from ..rule import Array

# What an identifier may need, in the order in which its function takes it.
INPUTS = ("predictions", "logits", "members", "features", "labels")


@dataclasses.dataclass(frozen=True)
class Identifier:
    """A way to find non-conforming images or wrong labels.

    Called with whatever is at hand, it takes what it needs and returns (N,) float32, larger for
    more non-conforming (``finds`` "nc") or more likely mislabelled (``finds`` "wrong label").
    """

    name: str  #: of the function in genkl_ext.identifiers
    title: str  #: for tables
    finds: Literal["nc", "wrong label"]
    needs: frozenset[str]  #: some of INPUTS, and "reference" where that option must be given
    source: str  #: the paper
    function: Callable[..., Any]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def __call__(
        self,
        predictions: Any = None,
        *,
        logits: Any = None,
        members: Any = None,
        features: Any = None,
        labels: Any = None,
        **options: Any,
    ) -> Array:
        """Score N rows.

        Args:
            predictions: (N, k) probabilities, or a sequence of M of them, averaged in float32.
            logits: (N, k), or a sequence of M of them, averaged in float32.
            members: the M predictions one by one; by default ``predictions``, where these are a
                sequence.
            features: (N, d) embeddings.
            labels: (N,) integers, -1 for none.
            options: of the function, beside those given to :func:`get`: ``validate=False``,
                ``rule=...`` (genkl), ``reference=...`` (of features).

        Raises:
            TypeError, ValueError: naming the identifier, the argument and the first bad row.
        """
        if members is None and isinstance(predictions, (list, tuple)):
            members = predictions
        given = dict(zip(INPUTS, (predictions, logits, members, features, labels), strict=True))
        inputs = [given[name] for name in INPUTS if name in self.needs]
        return self.function(*inputs, **{**self.options, **options})


def get(name: str, **options: Any) -> Identifier:
    """The identifier of that name, with options for its function: ``get("genkl", rule=rule)``.

    Raises:
        ValueError: there is none; the message names one that is written alike, or all.
    """
    if name not in _BY_NAME:
        near = difflib.get_close_matches(str(name), _BY_NAME, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(_BY_NAME)}"
        raise ValueError(f"identifiers.get: no identifier {name!r}; {hint}")
    found = _BY_NAME[name]
    return dataclasses.replace(found, options=MappingProxyType(options)) if options else found


def names() -> tuple[str, ...]:
    """The names of all identifiers."""
    return tuple(_BY_NAME)


def _of(
    function: Callable[..., Any],
    title: str,
    finds: Literal["nc", "wrong label"],
    needs: str,
    source: str,
) -> Identifier:
    return Identifier(
        name=function.__name__,
        title=title,
        finds=finds,
        needs=frozenset(needs.split()),
        source=source,
        function=function,
    )


_ALL = (
    _of(genkl, "GenKL critical alpha", "nc", "predictions", "Huang and Chong 2023"),
    _of(entropy, "normalised entropy", "nc", "predictions", "Shannon 1948"),
    _of(max_softmax, "1 - max softmax", "nc", "predictions", "Hendrycks and Gimpel 2017"),
    _of(margin, "margin of the top two", "nc", "predictions", "Scheffer et al. 2001"),
    _of(collision_entropy, "collision entropy", "nc", "predictions", "Renyi 1961"),
    _of(kl_uniform, "-KL(uniform || q)", "nc", "predictions", "Kullback and Leibler 1951"),
    _of(energy, "energy", "nc", "logits", "Liu et al. 2020"),
    _of(max_logit, "-max logit", "nc", "logits", "Hendrycks et al. 2022"),
    _of(mutual_information, "mutual information", "nc", "members", "Houlsby et al. 2011"),
    _of(vote_entropy, "vote entropy", "nc", "members", "Dagan and Engelson 1995"),
    _of(dsos, "DSOS", "nc", "predictions labels", "Albert et al. 2022"),
    _of(knn_distance, "distance to neighbours", "nc", "features", "Sun et al. 2022"),
    _of(mahalanobis, "Mahalanobis distance", "nc", "features labels", "Lee et al. 2018"),
    _of(density_ratio, "density ratio", "nc", "features reference", "Hido et al. 2011"),
    _of(
        combined,
        "entropy and density ratio",
        "nc",
        "predictions features reference",
        "Hido et al. 2011",
    ),
    _of(jo_src, "Jo-SRC", "wrong label", "predictions labels", "Yao et al. 2021"),
    _of(
        self_confidence,
        "1 - self-confidence",
        "wrong label",
        "predictions labels",
        "Northcutt et al. 2021",
    ),
    _of(
        normalised_margin,
        "normalised margin",
        "wrong label",
        "predictions labels",
        "Northcutt et al. 2021",
    ),
    _of(
        confident_learning,
        "confident learning",
        "wrong label",
        "predictions labels",
        "Northcutt et al. 2021",
    ),
    _of(
        neighbour_disagreement,
        "neighbours' labels",
        "wrong label",
        "features labels",
        "Bahri et al. 2020",
    ),
)
_BY_NAME: Mapping[str, Identifier] = MappingProxyType({i.name: i for i in _ALL})
