"""The config of a study: its texts, its owners, their trainings, and the options it compares."""

import dataclasses
from typing import Any, Literal

from flexolmo_jax.config import (
    AnchorTraining,
    EvidenceTraining,
    ExpertTraining,
    ModelConfig,
    OptimizerConfig,
    RouterTraining,
    check_evidence,
    check_rank,
)
from flexolmo_jax.config.model import require

Router = Literal["logistic", "lda"]  # methods by which an owner fits its router rows
# Pairs of learning rates: of matrices, and of all else. AdamW has one rate, so both are the same.
Rates = tuple[tuple[float, float], ...]
KINDS = ("anchor", "dense", "expert", "headed", "unrestricted")  # of trainings with own rates


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """The values of a study; presets are in `configs/study/`.

    The trainings are templates for all owners and seeds: names, texts and seeds are filled in.
    Every expert is trained on the same number of tokens, `expert.steps` batches.

    All methods have the same optimizer, `expert.optimizer` (the anchor its own). Of several
    learning rates, `rates.py` chooses one for each kind of training; without any, the optimizer's
    holds.
    """

    texts: str  # "corpus", or the folder that `flexolmo data flexmix` wrote
    owners: tuple[str, ...]  # domains beside "public"; the curve over owners adds them in order
    anchor: AnchorTraining
    expert: ExpertTraining  # gating="fixed"
    router: RouterTraining  # router tuning on proxies
    anchor_rates: Rates = ()
    expert_rates: Rates = ()  # of experts without heads, in our form and the paper's
    headed_rates: Rates = ()  # of experts with heads
    dense_rates: Rates = ()  # of whole models fine-tuned on an owner's text
    unrestricted_rates: Rates = ()  # of the mixture whose weights are all trained on all text
    rate_owners: tuple[str, ...] = ()  # whose tuning text decides on rates; none: all owners'
    head_rank: int = 0  # of an expert's own output head; 0: no experts with heads
    evidence_rank: int = 0  # of the heads that experts with heads are routed by
    unrestricted_active: int = 2  # experts a token uses in it
    unrestricted_flops: tuple[float, ...] = (1.0, 2.0)  # times those of all experts' trainings
    owner_bytes: int = 1_500_000  # of each owner's training text; the rest is not used
    heldout: float = 0.15  # of "corpus": a third of it for tuning, the rest for the test
    tune_sequences: int = 48  # a domain
    test_sequences: int = 200  # a domain
    mixed_sequences: int = 200  # that change their domain in the middle; half as many for tuning
    document_windows: int = 3  # maximum sequences of one document
    prefix: int = 32  # tokens from which BTM and prompt routing decide
    proxies: float = 0.03  # share of the public documents that each owner picks as proxies
    routers: tuple[Router, ...] = ("logistic", "lda")  # compared
    memories: tuple[tuple[float, float], ...] = ((0.8, 0.3), (0.9, 0.2), (0.95, 0.2))  # compared
    active: tuple[int, ...] = (1, 2, 4)  # experts a token may use; compared, with all
    decays: tuple[float, ...] = (0.8, 0.9, 0.95, 0.98)  # of BTM's evidence, compared
    evidence_decays: tuple[float, ...] = (0.8, 0.9, 0.95)  # of evidence routing, compared
    evidence_strengths: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)  # compared
    evidence_shifts: tuple[float, ...] = (0.75, 1.5, 2.5)  # compared
    soup_temperatures: tuple[float, ...] = (0.02, 0.1, 0.3, 1.0)  # of weighted soups, compared

    def __post_init__(self):
        names = self.owners
        require(len(names) >= 2, f"owners must be at least two, found {list(names)}")
        require(len(set(names)) == len(names), f"owners must differ, found {list(names)}")
        require("public" not in names, "owners must not contain 'public', which every study has")
        require(
            self.expert.gating == "fixed",
            f"expert.gating must be 'fixed', found {self.expert.gating!r}: the study trains the "
            "paper's form too, with the same values",
        )
        length = self.anchor.data.length
        require(
            self.expert.data.length == length and self.router.data.length == length,
            f"data.length must be the same in all trainings, found anchor {length}, expert "
            f"{self.expert.data.length}, router {self.router.data.length}",
        )
        self._check_rates()
        self._check_heads()
        self._check_options()

    def _check_rates(self) -> None:
        for kind in KINDS:
            for rates in getattr(self, f"{kind}_rates"):
                optimizer = self._template(kind)
                require(
                    optimizer.name == "muon" or rates[0] == rates[1],
                    f"{kind}_rates: AdamW has one rate for all weights, found {rates}; give it "
                    "twice, or set optimizer.name to 'muon'",
                )
                _at_rates(optimizer, rates)  # raises if a rate is out of range
        unknown = sorted(set(self.rate_owners) - set(self.owners))
        require(not unknown, f"rate_owners must be some of the owners, found {unknown}")

    def _check_heads(self) -> None:
        for name in ("head_rank", "evidence_rank"):
            check_rank(name, getattr(self, name), self.model)
            require(
                not getattr(self.expert, name),
                f"expert.{name} must be 0, found {getattr(self.expert, name)}: experts are trained "
                f"without and with heads; set {name} of the study",
            )
        require(
            bool(self.head_rank) == bool(self.evidence_rank),
            "head_rank and evidence_rank must both be 0 or both above 0, found "
            f"{self.head_rank} and {self.evidence_rank}",
        )
        for name in ("decays", "strengths", "shifts"):
            require(bool(getattr(self, f"evidence_{name}")), f"evidence_{name} must not be empty")
        for decay in self.evidence_decays:
            for strength in self.evidence_strengths:
                for shift in self.evidence_shifts:
                    check_evidence(decay, strength, shift)

    def _check_options(self) -> None:
        length = self.length
        require(0 < self.prefix < length, f"prefix must be in (0, {length}), found {self.prefix}")
        require(0 < self.heldout < 1, f"heldout must be in (0, 1), found {self.heldout}")
        require(0 < self.proxies <= 1, f"proxies must be in (0, 1], found {self.proxies}")
        for name in (
            "owner_bytes", "tune_sequences", "test_sequences", "mixed_sequences",
            "document_windows", "unrestricted_active",
        ):  # fmt: skip
            value = getattr(self, name)
            require(value > 0, f"{name} must be positive, found {value}")
        require(bool(self.routers), "routers must name at least one method to fit rows")
        for count in self.active:
            require(count >= 1, f"active must be numbers of experts, at least 1, found {count}")
        for decay in self.decays:
            require(0 < decay < 1, f"decays must be in (0, 1), found {decay}")
        for value in self.soup_temperatures:
            require(value > 0, f"soup_temperatures must be positive, found {value}")

    @property
    def domains(self) -> tuple[str, ...]:
        """The public one, then the owners'."""
        return ("public", *self.owners)

    @property
    def model(self) -> ModelConfig:
        """The sizes of the anchor."""
        return self.anchor.model

    @property
    def length(self) -> int:
        """S, tokens of a sequence."""
        return self.anchor.data.length

    @property
    def has_heads(self) -> bool:
        """Whether experts with heads are among the methods."""
        return self.head_rank > 0

    def with_rates(self, kind: str, rates: Rates) -> "StudyConfig":
        """A copy with other rates of one of KINDS."""
        changes: dict[str, Any] = {f"{kind}_rates": rates}
        return dataclasses.replace(self, **changes)

    def optimizer(self, kind: str) -> OptimizerConfig:
        """The optimizer of one of KINDS, whose rates were given or chosen (`rates.py`)."""
        rates = getattr(self, f"{kind}_rates")
        if not rates:
            return self._template(kind)
        (chosen,) = rates
        return _at_rates(self._template(kind), chosen)

    def _template(self, kind: str) -> OptimizerConfig:
        return (self.anchor if kind == "anchor" else self.expert).optimizer

    def anchor_training(self, tokenizer: str, seed: int) -> AnchorTraining:
        """The training of the public model; with an evidence head, which changes nothing else."""
        return dataclasses.replace(
            self.anchor, tokenizer=tokenizer, seed=seed, optimizer=self.optimizer("anchor"),
            evidence_rank=self.evidence_rank,
        )  # fmt: skip

    def expert_training(self, seed: int) -> ExpertTraining:
        """The training of an owner's expert without heads, routed by rows."""
        return dataclasses.replace(self.expert, seed=seed, optimizer=self.optimizer("expert"))

    def headed_training(self, seed: int) -> ExpertTraining:
        """The training of an owner's expert with heads."""
        return dataclasses.replace(
            self.expert, seed=seed, optimizer=self.optimizer("headed"),
            head_rank=self.head_rank, evidence_rank=self.evidence_rank,
        )  # fmt: skip

    def evidence_training(self, seed: int, steps: int) -> EvidenceTraining:
        """The training of an evidence head alone, for BTX."""
        like = self.headed_training(seed)
        return EvidenceTraining(
            data=like.data, optimizer=like.optimizer, steps=steps, seed=seed,
            checkpoint_every=like.checkpoint_every, evidence_rank=self.evidence_rank,
        )  # fmt: skip

    def paper_training(self, embedding: str | None, seed: int) -> ExpertTraining:
        """The training of an owner's expert in the paper's form."""
        return dataclasses.replace(
            self.expert_training(seed),
            gating="softmax", domain_embedding=embedding, router_z_loss=1e-3,
        )  # fmt: skip

    def dense_training(self, tokenizer: str, seed: int) -> AnchorTraining:
        """The fine-tuning of the whole anchor on an owner's text."""
        return self._of_whole("dense", tokenizer, seed, steps=self.expert.steps, model=self.model)

    def unrestricted_training(self, tokenizer: str, steps: int, seed: int) -> AnchorTraining:
        """The training of the mixture whose weights are all trained on all text."""
        model = self.model.replace(
            num_experts=len(self.domains),
            active_experts=self.unrestricted_active,
            expert_compute="grouped",
        )
        return self._of_whole("unrestricted", tokenizer, seed, steps=steps, model=model)

    def _of_whole(self, kind: str, tokenizer: str, seed: int, **more) -> AnchorTraining:
        like = self.expert
        return dataclasses.replace(
            self.anchor,
            tokenizer=tokenizer,
            data=like.data,
            optimizer=self.optimizer(kind),
            checkpoint_every=like.checkpoint_every,
            public_tokens=0,  # no owner's text goes into a package
            evidence_rank=0,
            domain_embedding=None,
            seed=seed,
            **more,
        )


def _at_rates(optimizer: OptimizerConfig, rates: tuple[float, float]) -> OptimizerConfig:
    matrices, others = rates
    other = others if optimizer.name == "muon" else None
    return dataclasses.replace(optimizer, learning_rate=matrices, adamw_learning_rate=other)
