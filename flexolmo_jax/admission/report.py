"""The report of an examination, as JSON and as one HTML page that needs no network."""

import json
from pathlib import Path

import jinja2

from flexolmo_jax.admission.plots import plots
from flexolmo_jax.admission.results import Report
from flexolmo_jax.runtime.console import visible
from flexolmo_jax.storage.files import new_directory

JSON, HTML = "report.json", "report.html"
_HEADLINES = {
    "admitted": "{} may be admitted",
    "review": "{} needs a person's review",
    "rejected": "{} is rejected",
}


def headline(report: Report) -> str:
    """The verdict in a sentence."""
    name = report.facts.get("name") or report.package
    return _HEADLINES[report.verdict].format(name)


def summary(report: Report) -> list[str]:
    """What failed and what could not be judged, in sentences; or that nothing did."""
    failed = [x for x in report.results if x.verdict in ("reject", "review", "note")]
    unjudged = [x for x in report.results if x.verdict == "not judged"]
    sentences = [f"{x.check} ({x.verdict}): {x.explanation}" for x in failed]
    if not failed:
        sentences.append("Every check that was made passed.")
    if unjudged:
        names = ", ".join(f"{x.check}: {x.measured}" for x in unjudged)
        sentences.append(f"Not judged: {names}.")
    return sentences


def html_of(report: Report) -> str:
    """The page; all that a stranger wrote is text in it."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["join"] = lambda parts, by: by.join(parts)
    source = (Path(__file__).parent / "report.html").read_text(encoding="utf-8")
    page = environment.from_string(source).render(
        report=report, title=headline(report), summary=summary(report), plots=plots(report)
    )
    return visible(page)


def write_report(report: Report, folder: Path) -> None:
    """Writes report.json and report.html into a new folder, all at once.

    Raises:
      ValueError: the folder exists and is not empty.
    """
    with new_directory(folder) as partial:
        text = json.dumps(report.to_json(), indent=1, allow_nan=False) + "\n"
        (partial / JSON).write_text(text, encoding="utf-8")
        (partial / HTML).write_text(html_of(report), encoding="utf-8")
