"""Protocols: everything besides the samples that a figure depends on, under a name.

Figures of one protocol can be compared with each other; those of two cannot.
"""

import dataclasses
from typing import Any

from maskgil_jax.evals.metrics import MANIFOLD_METRICS, METRICS
from maskgil_jax.masking import check_choice

# What a protocol of digits measures besides: by an SVM and on pixels, see `evals.digits`.
SVM = "svm"
INCEPTION, DIGIT_NET = "inception-fid", "digit-net"
LABELS = ("balanced", "random")
# What is needed of the net for each metric, and whether of single images of the reference.
_FEATURES = {"is": ("logits",), "sfid": ("spatial",), SVM: ("pixels",)}
NEED_REAL_IMAGES = (*MANIFOLD_METRICS, "kid")
# Figures by which samples can be ranked.
HIGHER_IS_BETTER = {"is", "precision", "recall", "density", "coverage", "agreement"}
HIGHER_IS_BETTER |= {"pixel_precision", "pixel_recall"}
LOWER_IS_BETTER = {"fid", "sfid", "kid"}
# Columns of a report that are no metrics, and with which one they come.
COLUMNS = {"is_std": "is", "kid_std": "kid"} | dict.fromkeys(
    ("agreement", "pixel_precision", "pixel_recall", "novelty", "svm_accuracy"), SVM
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
    """How figures are made.

    Attributes:
        name: what they are called.
        reference: what samples are compared with, in words.
        split: part of the embedded digits that is the reference; `None` if it is given as a file.
        net: family of the net whose features are compared.
        num_images: samples.
        labels: how classes are drawn: `balanced`, image i of class i mod C, or `random`, uniformly
            from the seed.
        metrics: what is measured unless others are asked for.
        neighbours: k of precision and recall.
        density_neighbours: k of density and coverage.
        split_size: images of a split of the inception score.
        kid_subsets: subsets that KID averages over.
        kid_subset_size: images of each.
    """

    name: str
    reference: str
    net: str
    split: str | None = None
    num_images: int = 50_000
    labels: str = "balanced"
    metrics: tuple[str, ...] = ("fid", "sfid", "is", "precision", "recall")
    neighbours: int = 3
    density_neighbours: int = 5
    split_size: int = 5000
    kid_subsets: int = 100
    kid_subset_size: int = 1000

    def __post_init__(self) -> None:
        check_choice("labels", self.labels, LABELS)
        check_choice("net", self.net, (INCEPTION, DIGIT_NET))
        for name in self.metrics:
            _check_metric(name, self)
        if len(set(self.metrics)) < len(self.metrics) or not self.metrics:
            raise ValueError(f"metrics {', '.join(self.metrics)!r}: name one or more, each once")
        if self.num_images < 2:
            raise ValueError(
                f"num_images {self.num_images} is too few: a distribution needs at least 2"
            )

    @property
    def allowed_metrics(self) -> tuple[str, ...]:
        """Metrics that its net has features for."""
        if self.net == DIGIT_NET:
            return (*(name for name in METRICS if name != "sfid"), SVM)
        return METRICS

    @property
    def num_classes(self) -> int | None:
        """Classes of the images, 0 to C - 1; `None` where the reference decides."""
        # Known by the name: a field would make finished reports those of other settings.
        return {DIGIT_NET: 10}.get(self.net, 1000 if self.name == "adm" else None)

    @property
    def features(self) -> tuple[str, ...]:
        """What the net is asked for."""
        pooled = {"fid", *NEED_REAL_IMAGES} & set(self.metrics)
        wanted = [name for metric in self.metrics for name in _FEATURES.get(metric, ())]
        return (*(("pool",) if pooled else ()), *dict.fromkeys(wanted))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        return dataclasses.asdict(self) | {"metrics": list(self.metrics)}


def _check_metric(name: str, protocol: Protocol) -> None:
    """Refuse a metric that is none or not of the protocol, and say how a column is asked for."""
    allowed = protocol.allowed_metrics
    if name in allowed:
        return
    if (source := COLUMNS.get(name)) in allowed:
        raise ValueError(f"metric {name!r} comes with {source!r}: give that one")
    if name in (*METRICS, SVM):
        raise ValueError(
            f"metric {name!r} is none of protocol {protocol.name}; allowed: {', '.join(allowed)}"
        )
    if name.lower() in allowed:  # as papers write it
        raise ValueError(f"metric {name!r} is unknown; did you mean {name.lower()!r}?")
    check_choice("metric", name, allowed)


_DIGITS: dict[str, Any] = {
    "net": DIGIT_NET,
    "num_images": 2000,
    "metrics": ("fid", "is", "precision", "recall", SVM),
    "split_size": 500,
    "kid_subset_size": 250,
}
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="adm",
            net=INCEPTION,
            reference="the reference file of the ADM evaluator for ImageNet of the same resolution",
        ),
        Protocol(
            name="val",
            net=INCEPTION,
            reference="validation images, statistics by tools/make_fid_stats.py --protocol val",
        ),
        Protocol(
            name="train",
            net=INCEPTION,
            reference="training images, statistics by tools/make_fid_stats.py --protocol train",
        ),
        Protocol(
            name="digits",
            split="test",
            reference="the 297 held-out digits of scikit-learn",
            **_DIGITS,
        ),
        Protocol(
            name="digits_train",
            split="train",
            reference="the 1,500 training digits of scikit-learn",
            **_DIGITS,
        ),
    )
}


def find_protocol(name: str, **changes: Any) -> Protocol:
    """Return a protocol, with other metrics, counts or labels where they are not `None`.

    Raises:
        ValueError: if there is no such protocol, with the nearest name, or a value is not allowed.
    """
    check_choice("protocol", name, PROTOCOLS)
    given = {field: value for field, value in changes.items() if value is not None}
    return dataclasses.replace(PROTOCOLS[name], **given)


def describe_changes(protocol: Protocol) -> list[str]:
    """Return a note for each setting in which figures are not comparable with others of the name.

    Other metrics are none: they do not change those that both measure.
    """
    standard = PROTOCOLS[protocol.name]
    return [
        f"{field} is {getattr(protocol, field)}, not the {getattr(standard, field)} of protocol "
        f"{protocol.name}: figures are comparable only with others made so"
        for field in ("num_images", "labels")
        if getattr(protocol, field) != getattr(standard, field)
    ]
