"""Ways to find non-conforming images and wrong labels, behind one call.

    confidence.py          how undecided a prediction is: entropy, margin, energy ...
    disagreement.py        how much the members of an ensemble disagree
    given_label.py         prediction against given label; the splits of DSOS and Jo-SRC
    confident_learning.py  confident learning's wrong labels
    features.py            distances between embeddings
    combined.py            entropy and features together
    inputs.py              what all of them are given, checked
    row_statistics.py      what is computed from a row in one read
    registry.py            all of them by name

    identifiers.entropy(predictions)            # a function takes what it needs
    identifiers.get("entropy")(predictions)     # an identifier takes what there is

Arrays in, (N,) float32 out, of the same kind and on the same device. Larger means more
non-conforming, or more likely mislabelled. The arithmetic is in float64. Only what is about
features loads scikit-learn. docs/identifiers.md has all formulas in one table.
"""

from .combined import combined, density_ratio, least_nc_share
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
from .confident_learning import ConfidentLearning, confident_learning, find_wrong_labels
from .disagreement import mutual_information, vote_entropy
from .features import knn_distance, mahalanobis, neighbour_disagreement
from .given_label import (
    NoiseSplit,
    dsos,
    dsos_split,
    jo_src,
    jo_src_split,
    normalised_margin,
    self_confidence,
)
from .registry import Identifier, get, names

__all__ = [
    "ConfidentLearning",
    "Identifier",
    "NoiseSplit",
    "collision_entropy",
    "combined",
    "confident_learning",
    "density_ratio",
    "dsos",
    "dsos_split",
    "energy",
    "entropy",
    "find_wrong_labels",
    "genkl",
    "get",
    "jo_src",
    "jo_src_split",
    "kl_uniform",
    "knn_distance",
    "least_nc_share",
    "mahalanobis",
    "margin",
    "max_logit",
    "max_softmax",
    "mutual_information",
    "names",
    "neighbour_disagreement",
    "normalised_margin",
    "self_confidence",
    "vote_entropy",
]
