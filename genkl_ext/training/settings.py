"""What a run can be told, part by part: the fields of a recipe, their meaning, their defaults.

``recipe.py`` reads them from YAML. A part is passed to whoever does its work, and nothing else is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from ..data import Transforms
from ..rule import GenKL


@dataclass(frozen=True)
class Data:
    """Where the images are, and how they are read."""

    root: str = ""  #: folder, table or saved manifest of the data set; must be given
    layout: Literal["auto", "clothing1m", "food101n", "webvision", "folder", "table"] = "auto"
    num_classes: int | None = None  #: webvision: keep the labels below it; else must be the data's
    train: Transforms = field(default_factory=lambda: Transforms(crop="random", flip=0.5))
    eval: Transforms = field(default_factory=Transforms)
    scan: bool = True  #: look for broken images before anything else; False: meet them on the way
    on_error: Literal["skip", "raise"] = "skip"  #: an image that turns out to be broken later
    threads: int | None = None  #: of each process, that read and decode; None: its processors
    fast: bool = False  #: trade exact pixels for speed (make_loader)


@dataclass(frozen=True)
class Network:
    """What is trained. Its last layer is replaced so that it gives k logits."""

    name: str = "resnet50"  #: of torchvision; "timm/NAME"; or "package.module:function"
    pretrained: str | None = None  #: torchvision's name of weights, or a file; None: random
    options: dict[str, Any] = field(default_factory=dict)  #: keyword arguments of the constructor
    channels_last: bool = True
    compile: bool = False  #: torch.compile


@dataclass(frozen=True)
class Engine:
    """How the machine is used."""

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    accumulate: int = 1  #: batches per step of the optimiser
    clip: float | None = None  #: largest norm of the gradient
    ema: float | None = None  #: decay of an exponential moving average of the weights, which then
    #: is what is validated and kept
    save_every: int | None = None  #: steps between two writings of last.ckpt; None: every epoch
    log_every: int = 50  #: steps
    loggers: list[Literal["csv", "tensorboard", "wandb"]] = field(default_factory=lambda: ["csv"])
    predict_batch_size: int = 128  #: of predictions; part of what they are, to the last bit


@dataclass(frozen=True)
class Optimizer:
    """torch.optim, by the names of its arguments."""

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = 0.001
    momentum: float = 0.9  #: sgd
    nesterov: bool = True  #: sgd
    weight_decay: float = 1e-3


@dataclass(frozen=True)
class Schedule:
    """How the learning rate changes, after each epoch."""

    name: Literal["constant", "cosine", "plateau"] = "constant"  #: cosine: to 0 at the last epoch
    patience: int = 3  #: plateau: epochs without a lower validation loss
    factor: float = 0.1  #: plateau


@dataclass(frozen=True)
class Fit:
    """One training."""

    epochs: int = 20
    batch_size: int = 32  #: of all processes together
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    validate_every: int = 1  #: epochs


@dataclass(frozen=True)
class Members(Fit):
    """The models whose predictions are averaged in iteration 0: trained, or given."""

    source: Literal["clean", "noisy", "folds"] = "clean"
    #: clean: trained on the verified split; noisy: on all given labels (warm-up); folds: on the
    #: given labels of all folds but one, which it then predicts
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    folds: int = 4
    pick: dict[int, list[int]] = field(default_factory=dict)
    #: trial seed -> the members it uses: their seeds, or of given files the numbers, from 0; an
    #: absent trial uses all. Repeats weigh more
    weights: list[str] = field(default_factory=list)  #: files of trained members
    predictions: list[str] = field(default_factory=list)  #: their (N, k) files
    average: str | None = None  #: an (N, k) file of averages
    nc_list: str | None = None  #: rows that do not conform, found elsewhere; instead of the rule


@dataclass(frozen=True)
class Rule:
    """The (alpha, beta)-generalized KL divergence; see genkl_ext.GenKL."""

    alpha: float | None = 1.05  #: None: what ``flag_validation`` of the validation images reach
    beta: float | None = 0.03  #: None: Clothing1M's for k classes, 0.42 / k
    sigma: float | None = 0.05  #: None: Clothing1M's for k classes, 0.7 / k
    num_vectors: int = 20
    seed: int | None = 0  #: None: the seed of the trial, so that each trial has its own NC set
    flag_validation: float = 0.05

    def of(self, num_classes: int, seed: int) -> GenKL:
        """The rule for k classes; with alpha 1 where that is still to be found.

        Args:
            num_classes: k.
            seed: of the trial, for where the rule has none of its own.
        """
        clothing1m = GenKL.preset("clothing1m")
        scale = clothing1m.num_classes / num_classes
        return GenKL(
            num_classes=num_classes,
            alpha=1.0 if self.alpha is None else self.alpha,
            beta=clothing1m.beta * scale if self.beta is None else self.beta,
            sigma=clothing1m.sigma * scale if self.sigma is None else self.sigma,
            num_vectors=self.num_vectors,
            seed=seed if self.seed is None else self.seed,
        )


@dataclass(frozen=True)
class Relabel:
    """Targets."""

    ratio_splits: list[str] = field(default_factory=list)  #: none: as published (class_ratio)
    ratio_file: str | None = None  #: a published ratio file instead
    uniform: bool = True  #: False: NC rows are treated like the others (ablation)
    double_hot: bool = True  #: False: the given label alone (ablation)


@dataclass(frozen=True)
class Training(Fit):
    """The three-term objective."""

    omega_clean: float = 1.0
    omega_nnc: float = 32.0
    omega_nc: float = 1.0
    loss_scale: float | None = None  #: the losses are multiplied by it; None: 1 / batch_size
    group_weight: Literal["equal", "size"] = "equal"  #: size: a group counts by its images
    mixup_alpha: float = 0.5  #: 0 or less: no mixup
    clean: Literal["loader", "joint", "dynamic"] = "loader"
    #: loader: a clean batch of batch_size beside every noisy one; joint: clean and noisy images
    #: shuffled together; dynamic: those the network itself believes
    clean_threshold: float = 0.5  #: dynamic: least softmax at the given label
    clean_test: Literal["mixed", "unmixed"] = "mixed"  #: dynamic: the image it is taken of
    start: Literal["pretrained", "member"] = "pretrained"  #: member: the first one's weights


@dataclass(frozen=True)
class Finetune(Fit):
    """Cross-entropy on clean images, from the best weights of the training."""

    epochs: int = 25  #: 0: no fine-tuning
    optimizer: Optimizer = field(default_factory=lambda: Optimizer("adam", 5e-7))
    loss_scale: float | None = 1.0  #: None: 1 / images of the batch, as published
    clean: Literal["split", "dynamic"] = "split"
    clean_threshold: float = 0.5  #: dynamic
    without_nc: bool = True  #: dynamic: NC images are no clean ones
    beat_training: bool = True  #: keep the weights of the training where none are better


@dataclass(frozen=True)
class Loop:
    """How often, and until when."""

    iterations: int = 2  #: at most
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])  #: one trial each
    stop_accuracy: float | None = None
    #: stop after an iteration whose mean validation accuracy is not better by more than this
    stop_jaccard: float | None = None
    #: stop before training when the NC set has at least this Jaccard index with the last one
    baselines: list[Literal["noisy", "both"]] = field(default_factory=list)
    #: plain cross-entropy on given labels, for comparison


@dataclass(frozen=True)
class Compatibility:
    """What the published programs do otherwise than they mean to (genkl.md, section 12)."""

    nc_target: Literal["uniform", "averaged"] = "uniform"  #: T1
    ratio_broadcast: bool = False  #: T2: the prior is added to every class
    unpermuted_prior: bool = False  #: T3: a mixup partner gets the prior of the first image
    finetune_lr_zero: bool = False  #: T4: fine-tuning changes batch-norm statistics only
    members_eval_mode: bool = False  #: T5: members train with frozen batch norm after one epoch
    separate_passes: bool = False  #: T6: a forward pass for each group
    last_batch_validation_loss: bool = False  #: N3: steers the plateau schedule
    float16_predictions: bool = False  #: N5


@dataclass(frozen=True)
class Recipe:
    """A whole run."""

    data: Data = field(default_factory=Data)
    network: Network = field(default_factory=Network)
    members: Members = field(default_factory=Members)
    rule: Rule = field(default_factory=Rule)
    relabel: Relabel = field(default_factory=Relabel)
    training: Training = field(default_factory=Training)
    finetune: Finetune = field(default_factory=Finetune)
    loop: Loop = field(default_factory=Loop)
    engine: Engine = field(default_factory=Engine)
    compatibility: Compatibility = field(default_factory=Compatibility)
