"""The config of a study: its texts, its owners, their trainings, and the options it compares."""

import dataclasses
from typing import Literal

from flexolmo_jax.config import (
    AnchorTraining,
    ExpertTraining,
    ModelConfig,
    OptimizerConfig,
    RouterTraining,
)

Router = Literal["logistic", "lda"]  # methods by which an owner fits its router rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """The values of a study; presets are in `configs/study/`.

    The trainings are templates for all owners and seeds: names, texts and seeds are filled in.
    Every expert is trained on the same number of tokens, `expert.steps` batches.
    """

    texts: str  # "corpus", or the folder that `flexolmo data flexmix` wrote
    owners: tuple[str, ...]  # domains beside "public"; the curve over owners adds them in order
    anchor: AnchorTraining
    expert: ExpertTraining  # gating="fixed"
    router: RouterTraining  # router tuning on proxies
    dense_learning_rate: float  # of whole models fine-tuned on an owner's text
    unrestricted_learning_rate: float  # of the mixture whose weights are all trained on all text
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
    soup_temperatures: tuple[float, ...] = (0.02, 0.1, 0.3, 1.0)  # of weighted soups, compared

    def __post_init__(self):
        def require(ok: bool, message: str) -> None:
            if not ok:
                raise ValueError(message)

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

    def anchor_training(self, tokenizer: str, seed: int) -> AnchorTraining:
        """The training of the public model."""
        return dataclasses.replace(self.anchor, tokenizer=tokenizer, seed=seed)

    def expert_training(self, seed: int) -> ExpertTraining:
        """The training of an owner's expert in our default form."""
        return dataclasses.replace(self.expert, seed=seed)

    def paper_training(self, embedding: str | None, seed: int) -> ExpertTraining:
        """The training of an owner's expert in the paper's form."""
        return dataclasses.replace(
            self.expert, gating="softmax", domain_embedding=embedding, router_z_loss=1e-3, seed=seed
        )

    def dense_training(self, tokenizer: str, seed: int) -> AnchorTraining:
        """The fine-tuning of the whole anchor on an owner's text."""
        return self._of_whole(
            self.dense_learning_rate, tokenizer, seed, steps=self.expert.steps, model=self.model
        )

    def unrestricted_training(self, tokenizer: str, steps: int, seed: int) -> AnchorTraining:
        """The training of the mixture whose weights are all trained on all text."""
        model = self.model.replace(
            num_experts=len(self.domains),
            active_experts=self.unrestricted_active,
            expert_compute="grouped",
        )
        return self._of_whole(
            self.unrestricted_learning_rate, tokenizer, seed, steps=steps, model=model
        )

    def _of_whole(self, learning_rate: float, tokenizer: str, seed: int, **more) -> AnchorTraining:
        like = self.expert
        optimizer: OptimizerConfig = dataclasses.replace(
            like.optimizer, learning_rate=learning_rate
        )
        return dataclasses.replace(
            self.anchor,
            tokenizer=tokenizer,
            data=like.data,
            optimizer=optimizer,
            checkpoint_every=like.checkpoint_every,
            public_tokens=0,  # no owner's text goes into a package
            domain_embedding=None,
            seed=seed,
            **more,
        )
