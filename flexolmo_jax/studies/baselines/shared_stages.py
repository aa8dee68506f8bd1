"""The stages of a study that depend on no seed: texts, tokenizer, proxies, sequences to score."""

import dataclasses
from collections.abc import Callable, Sequence
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
    """The stages that depend on no seed."""

    def stage(name: str, needs: Sequence[Stage], work: Callable[[Path], None], **made_from: Any):
        return Stage(name, root, made_from, tuple(needs), work)

    def text(domain: str) -> Stage:
        max_bytes = None if domain == "public" else config.owner_bytes
        return stage(
            f"texts/{domain}", [],
            lambda folder: datasets.write_texts(config, domain, folder),
            digest=datasets.digest_of_texts(config, domain), most=max_bytes, heldout=config.heldout,
        )  # fmt: skip

    texts = {domain: text(domain) for domain in config.domains}
    folders = {domain: one.folder for domain, one in texts.items()}
    public, everyone = texts["public"], tuple(texts.values())

    def embedding(domain: str) -> Stage:
        own = texts[domain]
        return stage(
            f"embeddings/{domain}", (own, public),
            lambda folder: datasets.write_embedding(
                own.folder, public.folder, folder / EMBEDDING
            ),
        )  # fmt: skip

    def proxies(domain: str) -> Stage:
        own = folders[domain] / "train.jsonl"

        def pick(folder: Path) -> None:
            share, file = config.proxies, folder / f"{domain}.jsonl"
            file.unlink(missing_ok=True)  # of an interrupted run
            if domain == "public":
                datasets.write_public_sample(public.folder, share, file)
            else:
                everything = str(folders["public"] / "train.jsonl")
                pick_proxies(str(own), everything, file, share=share, most=PROXY_EXAMPLES)

        return stage(
            f"proxies/{domain}", (texts[domain], public), pick,
            share=config.proxies, most=PROXY_EXAMPLES,
        )  # fmt: skip

    pool = stage(
        "pool", everyone,
        lambda folder: datasets.write_pool(folders, config.owner_bytes, folder / POOL),
    )  # fmt: skip
    tokenizer = stage(
        "tokenizer", [public],
        lambda folder: datasets.write_tokenizer(
            public.folder, config.model.vocab_size, folder
        ),
        vocab_size=config.model.vocab_size,
    )  # fmt: skip

    def read_tokenizer() -> Tokenizer:
        return Tokenizer.load(tokenizer.folder / TOKENIZER)

    def windows(owner: str) -> Stage:
        """An owner's training windows, for all stages that read them."""
        source, data = str(folders[owner] / "train.jsonl"), config.expert.data

        def cut(folder: Path) -> None:
            prepare(source, data, read_tokenizer(), folder / WINDOWS)

        values = dataclasses.asdict(data)
        return stage(f"windows/{owner}", (texts[owner], tokenizer), cut, data=values)

    sequences = stage(
        "sequences", (*everyone, tokenizer),
        lambda folder: datasets.write_sequences(
            config, folders, read_tokenizer(), folder / SEQUENCES
        ),
        length=config.length, windows=config.document_windows,
        counts=(config.tune_sequences, config.test_sequences, config.mixed_sequences),
    )  # fmt: skip

    def classify(folder: Path) -> None:
        """Stores the predicted domain of each prompt, in place of scores."""
        train = [datasets.training_texts(one) for one in folders.values()]
        classifier, read = methods.domain_classifier(train), read_tokenizer()
        chosen = {
            name: classifier.predict([read.decode(row[: config.prefix]) for row in one.tokens])
            for name, one in read_sequences(sequences.folder / SEQUENCES).items()
        }
        save_scores(folder / SCORES, chosen)

    prompts = stage("prompts", (*everyone, tokenizer, sequences), classify, prefix=config.prefix)
    return Shared(
        texts, pool, tokenizer,
        {owner: windows(owner) for owner in config.owners},
        {domain: embedding(domain) for domain in config.domains},
        {domain: proxies(domain) for domain in config.domains},
        sequences, prompts,
    )  # fmt: skip
