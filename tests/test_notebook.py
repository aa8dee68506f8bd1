"""Every notebook runs from top to bottom, as a newcomer would run it."""

import re
from pathlib import Path

import nbclient
import nbformat
import pytest

pytestmark = pytest.mark.usefixtures("optimized")  # they train more than they compile

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
PRINTED = {
    "coordinator": ("wrote ours: public + 2 experts", "logits are equal, bit for bit"),
    "owner": ("The certificate is coherent", "data@owner.example", "| verdict | not refuted |"),
    "quickstart": ("| without math |",),
}


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs(file, tmp_path):
    notebook = nbformat.read(file, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    shown = [output.get("data", {}) for output in outputs]
    printed = "".join(output.get("text", "") for output in outputs)
    printed += "".join(data.get("text/markdown", "") for data in shown)
    for words in PRINTED[file.stem]:
        assert words in printed
    assert any("image/png" in data for data in shown)


def test_every_notebook_can_be_opened_in_colab():
    """The badge leads to the notebook, and its first cell installs from the same repository."""
    places = set()
    for file in NOTEBOOKS:
        text = "\n".join(cell.source for cell in nbformat.read(file, as_version=4).cells)
        badge = r"colab\.research\.google\.com/github/([\w-]+/[\w-]+)/blob/main/notebooks/(\w+)\."
        (opened,) = re.findall(badge, text)
        (installed,) = re.findall(r'SOURCE = "git\+https://github\.com/([\w/-]+)"', text)
        assert opened == (installed, file.stem)
        places.add(installed)
    assert len(places) == 1
