"""The stages of a study that depend on no seed: texts, tokenizer, proxies, sequences to score."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flexolmo_jax.data.proxies import pick_proxies
from flexolmo_jax.data.tokenizer import Tokenizer
from flexolmo_jax.data.window_store import prepare
from flexolmo_jax.studies.baselines import datasets, methods
from flexolmo_jax.studies.baselines.config import StudyConfig
from flexolmo_jax.studies.baselines.datasets import TOKENIZER, read_sequences
from flexolmo_jax.studies.baselines.scores import save_scores
from flexolmo_jax.studies.engine.stages import Stage

SCORES = "scores.npz"
SEQUENCES = "sequences.npz"
EMBEDDING = "embedding.npy"
POOL = "pool.jsonl"
WINDOWS = "windows"
PROXY_EXAMPLES = 2000  # documents of each class that train the classifier of proxies


@dataclasses.dataclass
class Shared:
    """The stages that all seeds share; dicts are keyed by domain."""

    texts: dict[str, Stage]
    pool: Stage
    tokenizer: Stage
    windows: dict[str, Stage]
    embeddings: dict[str, Stage]
    proxies: dict[str, Stage]
    sequences: Stage
    prompts: Stage

    @property
    def stages(self) -> list[Stage]:
        """In order."""
        return [
            *self.texts.values(), self.pool, self.tokenizer, *self.windows.values(),
            *self.embeddings.values(), *self.proxies.values(), self.sequences, self.prompts,
        ]  # fmt: skip


def plan_shared(config: StudyConfig, root: Path) -> Shared:
    """The stages that depend on no seed; nothing is run."""
    plan = _Plan(config, root)
    texts = {domain: plan.text(domain) for domain in config.domains}
    public, everyone = texts["public"], tuple(texts.values())
    folders = {domain: stage.folder for domain, stage in texts.items()}
    pool = plan.stage(
        "pool", everyone,
        lambda folder: datasets.write_pool(folders, config.owner_bytes, folder / POOL),
    )  # fmt: skip
    vocab_size = config.model.vocab_size
    tokenizer = plan.stage(
        "tokenizer", [public],
        lambda folder: datasets.write_tokenizer(public.folder, vocab_size, folder),
        vocab_size=vocab_size,
    )  # fmt: skip
    sequences = plan.sequences(texts, tokenizer)
    return Shared(
        texts, pool, tokenizer,
        {owner: plan.windows(owner, texts[owner], tokenizer) for owner in config.owners},
        {domain: plan.embedding(domain, texts[domain], public) for domain in config.domains},
        {domain: plan.proxies(domain, texts[domain], public) for domain in config.domains},
        sequences, plan.prompts(texts, tokenizer, sequences),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Makes the stages of one study."""

    config: StudyConfig
    root: Path

    def stage(
        self, name: str, needs: Sequence[Stage], work: Callable[[Path], None], **made_from: Any
    ) -> Stage:
        return Stage(name, self.root, made_from, tuple(needs), work)

    def text(self, domain: str) -> Stage:
        """The documents of a domain, by split."""
        config = self.config
        max_bytes = None if domain == "public" else config.owner_bytes
        return self.stage(
            f"texts/{domain}", [], lambda folder: datasets.write_texts(config, domain, folder),
            digest=datasets.digest_of_texts(config, domain), most=max_bytes, heldout=config.heldout,
        )  # fmt: skip

    def embedding(self, domain: str, own: Stage, public: Stage) -> Stage:
        """The domain embedding of the paper's form."""

        def work(folder: Path) -> None:
            datasets.write_embedding(own.folder, public.folder, folder / EMBEDDING)

        return self.stage(f"embeddings/{domain}", (own, public), work)

    def proxies(self, domain: str, own: Stage, public: Stage) -> Stage:
        """What router tuning reads for a domain."""
        share = self.config.proxies

        def pick(folder: Path) -> None:
            file = folder / f"{domain}.jsonl"
            file.unlink(missing_ok=True)  # of an interrupted run
            if domain == "public":
                datasets.write_public_sample(public.folder, share, file)
            else:
                own_text, public_text = (str(s.folder / "train.jsonl") for s in (own, public))
                pick_proxies(own_text, public_text, file, share=share, most=PROXY_EXAMPLES)

        needs = (own, public)
        return self.stage(f"proxies/{domain}", needs, pick, share=share, most=PROXY_EXAMPLES)

    def windows(self, owner: str, text: Stage, tokenizer: Stage) -> Stage:
        """An owner's training windows, for all stages that read them."""
        data = self.config.expert.data

        def cut(folder: Path) -> None:
            source = str(text.folder / "train.jsonl")
            prepare(source, data, _read_tokenizer(tokenizer), folder / WINDOWS)

        values = dataclasses.asdict(data)
        return self.stage(f"windows/{owner}", (text, tokenizer), cut, data=values)

    def sequences(self, texts: Mapping[str, Stage], tokenizer: Stage) -> Stage:
        """All sequences to score."""
        config = self.config
        folders = {domain: stage.folder for domain, stage in texts.items()}

        def work(folder: Path) -> None:
            datasets.write_sequences(
                config, folders, _read_tokenizer(tokenizer), folder / SEQUENCES
            )

        return self.stage(
            "sequences", (*texts.values(), tokenizer), work,
            length=config.length, windows=config.document_windows,
            counts=(config.tune_sequences, config.test_sequences, config.mixed_sequences),
        )  # fmt: skip

    def prompts(self, texts: Mapping[str, Stage], tokenizer: Stage, sequences: Stage) -> Stage:
        """The predicted domain of each sequence's prompt, in place of scores."""
        prefix = self.config.prefix

        def classify(folder: Path) -> None:
            train = [datasets.training_texts(stage.folder) for stage in texts.values()]
            classifier, decoder = methods.domain_classifier(train), _read_tokenizer(tokenizer)
            domains = {
                name: classifier.predict([decoder.decode(row[:prefix]) for row in one.tokens])
                for name, one in read_sequences(sequences.folder / SEQUENCES).items()
            }
            save_scores(folder / SCORES, domains)

        needs = (*texts.values(), tokenizer, sequences)
        return self.stage("prompts", needs, classify, prefix=prefix)


def _read_tokenizer(stage: Stage) -> Tokenizer:
    return Tokenizer.load(stage.folder / TOKENIZER)
