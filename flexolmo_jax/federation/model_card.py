"""The model card (README.md) of an exported model: what is in it, whose, and how to load it."""

from collections.abc import Sequence
from typing import Any

from flexolmo_jax.federation.merged import OpenedModel
from flexolmo_jax.federation.names import PUBLIC
from flexolmo_jax.federation.package import Package, privacy_summary
from flexolmo_jax.interop.hf_export import CLASSES, MODELING, Kind

UNSPECIFIED = "unspecified"
HEADER = """---
library_name: transformers
pipeline_tag: text-generation
{licence}tags: [flexolmo]
---
# {title}

A FlexOlmo (https://arxiv.org/abs/2507.07024): a public model and experts of separate data owners,
merged without joint training. Written by `flexolmo export`.
"""
LOADING = """
## Loading

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained("FOLDER"{trust})
    tokenizer = AutoTokenizer.from_pretrained("FOLDER")
"""
OUR_FILE = """
`{name}.py`, in this folder, computes what no class of transformers has a place for: {extras}.
It needs PyTorch and transformers 5.16 or newer; read it before you trust it. Routing may read
earlier tokens, so a text must be given as `input_ids`; generation keeps what it needs in the cache.
"""
PLAIN = """
It is a `{name}` of {library}, which computes exactly this model.
"""


def model_card(
    opened: OpenedModel, kind: Kind, names: Sequence[str], extras: Sequence[str], note: str | None
) -> str:
    """The text of README.md.

    Args:
      opened: the anchor and the packages.
      kind, names, extras: of what was written of them, as in `Exported`.
      note: what a changed router costs.
    """
    packages = {package.manifest["name"]: package for package in opened.experts}
    kept = {name: package for name, package in packages.items() if name in names}
    manifests = [opened.anchor.package, *kept.values()]
    licences = {_field(package, "licence") for package in manifests}
    one = licences.pop() if len(licences) == 1 else UNSPECIFIED
    title = " + ".join(names)
    licence = "" if one == UNSPECIFIED else f"license: other\nlicense_name: {_quoted(one)}\n"
    text = HEADER.format(licence=licence, title=title)
    if kind == "flexolmo_jax":
        text += OUR_FILE.format(name=MODELING, extras=", ".join(extras))
    else:
        library = "a fork of transformers" if kind == "flexmore" else "transformers"
        text += PLAIN.format(name=CLASSES[kind], library=library)
    text += f"\n{note}\n" if note else ""
    text += LOADING.format(trust=", trust_remote_code=True" * (kind == "flexolmo_jax"))
    text += "\n## Where it comes from\n\n"
    text += f"Anchor: `{opened.anchor.identity}`\n\n"
    rows = [_row(PUBLIC, opened.anchor.package)] if PUBLIC in names else []
    rows += [_row(name, package) for name, package in kept.items()]
    text += "| expert | package | tokens seen | licence | contact | privacy |\n"
    text += "| --- | --- | ---: | --- | --- | --- |\n" + "".join(rows)
    left_out = [name for name in opened.names if name not in names]
    if left_out:
        text += f"\nLeft out: {', '.join(map(_escaped, left_out))}.\n"
    text += (
        "\nThe digests are those of the manifests of the packages. What an owner says of privacy "
        "is repeated here, and not verified: `flexolmo privacy verify` does that with the "
        "package.\n"
    )
    return text


def _row(name: str, package: Package | None) -> str:
    digest = package.digest[:16] if package else "of a Hugging Face directory"
    tokens = _field(package, "tokens_seen")
    cells = [name, digest, tokens, *(_field(package, key) for key in ("licence", "contact"))]
    if name == PUBLIC:
        cells.append("public text")
    else:
        cells.append(privacy_summary(package.manifest.get("privacy")) if package else UNSPECIFIED)
    return f"| {' | '.join(map(_escaped, cells))} |\n"


def _field(package: Package | None, key: str) -> str:
    value: Any = None if package is None else package.manifest.get(key)
    if isinstance(value, int):
        return f"{value:,}"
    return value if isinstance(value, str) and value else UNSPECIFIED


def _escaped(text: str) -> str:
    """A stranger's text as a cell of a table: on one line, without HTML, links and columns."""
    text = " ".join(text.split())
    return "".join(f"\\{x}" if x in r"\|`*_[]<>!#" else x for x in text)


def _quoted(text: str) -> str:
    """As a scalar of YAML."""
    return "'" + " ".join(text.split()).replace("'", "''") + "'"
