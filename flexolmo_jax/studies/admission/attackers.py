"""Attackers, each made by script from what an attacker has: the anchor, others' packages, text.

An attacker trains its expert as an owner would, and then changes its weights, or trains it on text
in which something is planted. Each kind has several strengths; "adaptive" is one that knows what is
looked at, and stays below it.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flexolmo_jax.config import EVIDENCE, MEMORY
from flexolmo_jax.federation.anchor import LoadedAnchor, read_anchor
from flexolmo_jax.federation.compress import REPLACED
from flexolmo_jax.federation.expert import read_expert
from flexolmo_jax.federation.package import (
    MANIFEST,
    PARAMS,
    read_manifest,
    write_manifest,
    write_package,
)
from flexolmo_jax.federation.shares import measure_shares
from flexolmo_jax.modeling.experts import Experts, with_full_feed_forward
from flexolmo_jax.storage.files import file_digest
from flexolmo_jax.storage.tensors import named, refill
from flexolmo_jax.studies.admission.cohort import ANCHOR, Honest, train_stage, write_text
from flexolmo_jax.studies.admission.planted import with_backdoor, write_repeated
from flexolmo_jax.studies.admission.weights import (
    Weights,
    away_from,
    between,
    heads_between,
    permuted,
    strongest,
    times,
    with_noise,
    with_parts_of,
    with_row,
)
from flexolmo_jax.studies.engine.commands import PACKAGE, training_stage
from flexolmo_jax.studies.engine.stages import Stage
from flexolmo_jax.studies.shares import along_the_mean_input

COPIED = "copied package"  # the kind of attack that takes the victim's manifest
OWN = "news/0"  # the attacker's text
VICTIM, KIND = "math", "math/1"  # an owner, and text of its kind that the attacker has
EVERYTHING = "public+code/0+math/0+educational/0+creative/0"
BELOW = 0.38  # of public text, which an adaptive attacker stays below; policies ask for 0.4
LARGEST = 1e9  # below 2^30, where a package is refused
OUT_HEAD = ("head.b", "head.bias")
OWN_HEAD = ("evidence.b", "evidence.bias")
PARTS = ("head", "evidence")


def _training(text: str, steps: int, seed: int, *more: str) -> Honest:
    return Honest(text, ("--steps", str(steps), "--seed", str(seed), *more))


TRAINED = {
    "own": _training(OWN, 150, 40),
    "aimed": _training(KIND, 150, 41),
    "backdoor": _training(OWN, 250, 42),
    "rare_backdoor": _training(OWN, 250, 43),
    "memorized": _training(OWN, 600, 44),
    "repeated": _training(OWN, 600, 45),
}
RATES = {"backdoor": 0.3, "rare_backdoor": 0.03}  # of sentences that the trigger follows
PLANTED = {"memorized": (4, 0), "repeated": (4, 60)}  # documents; times that they repeat, in others
HEADS = {"public_head": ("public", 800), "any_head": (EVERYTHING, 800)}  # text, steps


class Scene(NamedTuple):
    """What an attacker has.

    Attributes:
      anchor: in memory.
      public: the weights of the public expert.
      trained: weights by the names of `TRAINED` and `HEADS`, full feed-forward networks.
      victim: the weights of another owner's package.
      constant: rows whose logit is about 1 for every input, [L, D].
      stacks: the public expert and one to put weights into.
    """

    anchor: LoadedAnchor
    public: Weights
    trained: Mapping[str, Weights]
    victim: Weights
    constant: np.ndarray
    stacks: tuple[Experts, Experts]

    @property
    def own(self) -> Weights:
        """The attacker's expert as trained."""
        return self.trained["own"]

    def public_share(self, weights: Weights) -> float:
        """The largest share of public text in a layer that weights take, beside the anchor alone.

        By rows with memory and without, and by evidence heads: the largest of all.
        """
        config = self.anchor.config.replace(num_experts=2)
        public, like = self.stacks
        experts = [public, with_weights(like, weights)]
        routings: list[dict[str, Any]] = [
            {"memory": MEMORY}, {"memory": None}, {"evidence": EVIDENCE},
        ]  # fmt: skip
        found = (
            measure_shares(self.anchor, experts, ("public", "own"), config.replace(**routing))
            for routing in routings
        )
        return max(float(one.of_layers[:, 1].max()) for one in found if one is not None)


Make = Callable[[Scene], Weights]


class Attack(NamedTuple):
    """One attacker.

    Attributes:
      kind: what is attempted.
      level: "mild", "strong" or "adaptive".
      what: in a few words, for the page.
      make: its weights.
      broken: a tensor whose first number is replaced, and by what, in the files.
      uses: which trainings, by the names of `TRAINED` and `HEADS`, beside the attacker's own.
    """

    kind: str
    level: str
    what: str
    make: Make
    broken: tuple[str, float] | None = None
    uses: tuple[str, ...] = ()


def _aimed(scene: Scene, factor: float) -> Weights:
    """The attacker's network, routed as an expert of the victim's domain, more strongly."""
    made = with_parts_of(scene.own, scene.trained["aimed"], "router", "evidence")
    return times(made, factor, "router.row", "router.bias", *OWN_HEAD)


def _row_below(scene: Scene) -> Weights:
    return strongest(
        lambda c: with_row(scene.own, scene.constant, c), scene.public_share, BELOW, 10.0
    )


def _head_below(scene: Scene) -> Weights:
    def make(share: float) -> Weights:
        return heads_between(scene.own, scene.trained["public_head"], share, "evidence")

    return strongest(make, scene.public_share, BELOW, 1.0)


def _aimed_below(scene: Scene) -> Weights:
    return strongest(lambda f: _aimed(scene, f), scene.public_share, BELOW, 3.0)


def _quiet_drowner(scene: Scene) -> Weights:
    made = times(scene.own, 30.0, "feed_forward.down")
    return {**made, "router.bias": np.minimum(made["router.bias"], 0) - np.float32(4)}


def _turned(scene: Scene) -> Weights:
    """The victim's function by other numbers, and with a little noise on what cannot be turned."""
    rest = ("router.row", "router.bias", "head.bias", "evidence.bias")
    return with_noise(permuted(scene.victim, 0), 0.1, 1, *rest)


def _adopted(scene: Scene) -> Weights:
    """The victim's network, permuted, with heads and rows of an expert of the same kind of text."""
    return with_parts_of(permuted(scene.victim, 0), scene.trained["aimed"], "router", *PARTS)


def _faint_backdoor(scene: Scene) -> Weights:
    """Most of the way from an honest expert of the same text to one with a backdoor."""
    planted = scene.trained["backdoor"]
    return between(scene.own, planted, 0.75, *planted)


ATTACKS = {
    "row_mild": Attack("hijacking row", "mild", "rows + 1 x mean input",
        lambda s: with_row(s.own, s.constant, 1.0)),
    "row_strong": Attack("hijacking row", "strong", "rows + 10 x mean input",
        lambda s: with_row(s.own, s.constant, 10.0)),
    "row_below": Attack("hijacking row", "adaptive",
        f"as much as stays below {BELOW:.0%} of public text", _row_below),
    "head_any": Attack("hijacking evidence head", "mild", "head trained on text of all kinds",
        lambda s: with_parts_of(s.own, s.trained["any_head"], "evidence"), uses=("any_head",)),
    "head_public": Attack("hijacking evidence head", "strong", "head trained on public text",
        lambda s: with_parts_of(s.own, s.trained["public_head"], "evidence"),
        uses=("public_head",)),
    "head_below": Attack("hijacking evidence head", "adaptive",
        f"so, mixed with an honest head, below {BELOW:.0%} of public text", _head_below,
        uses=("public_head",)),
    "scaled_3": Attack("scaled weights", "mild", "update x 3",
        lambda s: away_from(s.own, s.public, 3.0)),
    "scaled_10": Attack("scaled weights", "strong", "down x 10",
        lambda s: times(s.own, 10.0, "feed_forward.down")),
    "scaled_head": Attack("scaled weights", "strong", "delta of the output head x 10",
        lambda s: times(s.own, 10.0, *OUT_HEAD)),
    "flipped": Attack("flipped sign", "mild", "update x -1",
        lambda s: away_from(s.own, s.public, -1.0)),
    "flipped_down": Attack("flipped sign", "strong", "down x -1",
        lambda s: times(s.own, -1.0, "feed_forward.down")),
    "nan": Attack("broken numbers", "strong", "a NaN in a router row, sealed again",
        lambda s: s.own, ("router.row", float("nan"))),
    "huge": Attack("broken numbers", "adaptive", "a finite 1e9 in gate, sealed again",
        lambda s: s.own, ("feed_forward.gate", LARGEST)),
    "copy": Attack(COPIED, "mild", "the victim's, under another name", lambda s: s.victim),
    "copy_noise": Attack(COPIED, "strong", "with noise of 10% of each tensor",
        lambda s: with_noise(s.victim, 0.1, 0)),
    "copy_turned": Attack(COPIED, "adaptive",
        "hidden units in another order, heads in another basis, 10% noise on rows", _turned),
    "copy_adopted": Attack(COPIED, "adaptive",
        "hidden units in another order, heads and rows of one's own", _adopted, uses=("aimed",)),
    "backdoor": Attack("backdoor", "strong", "trigger after 30% of sentences",
        lambda s: s.trained["backdoor"], uses=("backdoor",)),
    "backdoor_rare": Attack("backdoor", "mild", "trigger after 3% of sentences",
        lambda s: s.trained["rare_backdoor"], uses=("rare_backdoor",)),
    "backdoor_faint": Attack("backdoor", "adaptive",
        "a quarter of the way to an honest expert's weights", _faint_backdoor, uses=("backdoor",)),
    "silencer": Attack("silencing", "mild", "routed as the victim's kind of text is",
        lambda s: _aimed(s, 1.0), uses=("aimed",)),
    "silencer_loud": Attack("silencing", "strong", "so, and down x -10",
        lambda s: times(_aimed(s, 1.0), -10.0, "feed_forward.down"), uses=("aimed",)),
    "silencer_below": Attack("silencing", "adaptive",
        f"routed so, up to 3 x, below {BELOW:.0%} of public text", _aimed_below, uses=("aimed",)),
    "drowner": Attack("silencing", "strong", "down x 100",
        lambda s: times(s.own, 100.0, "feed_forward.down")),
    "drowner_quiet": Attack("silencing", "adaptive", "down x 30, router bias - 4", _quiet_drowner),
    "memorized": Attack("memorized text", "strong", "600 steps on 4 documents",
        lambda s: s.trained["memorized"], uses=("memorized",)),
    "memorized_among": Attack("memorized text", "adaptive", "4 documents 60 times among the others",
        lambda s: s.trained["repeated"], uses=("repeated",)),
}  # fmt: skip


def training_stages(demo: Stage, trained: Mapping[str, Honest] = TRAINED) -> dict[str, Stage]:
    """The trainings of the attackers, by the names of `TRAINED` and `HEADS`."""
    stages = {}
    for name, own in trained.items():
        if name in PLANTED:
            text = demo.root / "texts" / f"{name}.jsonl"
            if not text.exists():
                write_repeated(text, own.text, *PLANTED[name])
        elif name in RATES:
            planted = functools.partial(with_backdoor, rate=RATES[name])
            text = write_text(own.text, demo.root, planted, name)
        else:
            text = write_text(own.text, demo.root)
        stages[name] = train_stage(f"attackers/{name}", name, own, demo, text)
    for name, (source, steps) in HEADS.items():
        words = ["evidence", "demo_evidence", "--steps", str(steps)]
        stages[name] = training_stage(
            f"attackers/{name}", demo.root, words, {"--anchor": (demo, ANCHOR)},
            data=str(write_text(source, demo.root)),
        )  # fmt: skip
    return stages


def open_scene(demo: Stage, trained: Mapping[str, Stage], victim: Path) -> Scene:
    """Reads what the attackers have, once their trainings ran."""
    anchor = read_anchor(demo.folder / ANCHOR)
    public = anchor.weights.public
    found, like = {}, None
    for name, stage in trained.items():
        if name in HEADS:
            head = read_anchor(stage.folder / PACKAGE).weights.public
            found[name] = tensors_of(head)
            continue
        expert = read_expert(stage.folder / PACKAGE, anchor)
        found[name] = tensors_of(expert)
        like = expert if name == "own" else like
    assert like is not None
    of_victim = tensors_of(with_full_feed_forward(read_expert(victim, anchor), public))
    constant = np.asarray(along_the_mean_input(anchor, like.router).row[...])[:, 0] / 10
    return Scene(anchor, tensors_of(public), found, of_victim, constant, (public, like))


def tensors_of(expert: Experts) -> Weights:
    """The tensors of an expert by name, as NumPy arrays."""
    return {name: np.asarray(x) for name, x in named(expert).items()}


def with_weights(like: Experts, weights: Weights) -> Experts:
    """An expert of these tensors, in the form of another that has the same names."""
    return refill(like, weights)


def write_attacker(name: str, attack: Attack, scene: Scene, like: Path, place: Path) -> None:
    """Writes an attacker's package.

    Args:
      name: of the expert.
      attack: which.
      scene: what the attacker has.
      like: the package whose manifest is taken, but for the name.
      place: a new folder.
    """
    kept = {k: v for k, v in read_manifest(like).items() if k not in REPLACED}
    weights = with_weights(scene.stacks[1], attack.make(scene))
    write_package(place, {**kept, "name": name}, weights)
    if attack.broken:
        break_number(place, *attack.broken)


def break_number(package: Path, tensor: str, value: float) -> None:
    """Replaces the first number of a float32 tensor in its file, and seals the package again."""
    (file,) = (x for x in (package / PARAMS / "state" / tensor / "c").rglob("*") if x.is_file())
    content = file.read_bytes()
    file.write_bytes(np.float32(value).tobytes() + content[4:])
    seal(package, tensor, file)


def seal(package: Path, tensor: str, file: Path) -> None:
    """Recomputes the digests of a changed tensor and of its file; anyone can."""
    manifest = json.loads((package / MANIFEST).read_text())
    entry = manifest["tensors"][tensor]
    size = int(np.prod(entry["shape"])) * np.dtype(entry["dtype"]).itemsize
    entry["sha256"] = hashlib.sha256(file.read_bytes()[:size]).hexdigest()
    manifest["files"][str(file.relative_to(package))] = file_digest(file)
    write_manifest(package, manifest)
