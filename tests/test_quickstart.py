"""docs/quickstart.ipynb: it runs, and what is committed with it is what a run shows.

Its outputs are made anew, at its own number of steps, by

    jupyter execute --inplace docs/quickstart.ipynb
"""

import base64
import io
import re

import nbclient
import nbformat
import numpy as np
import pytest
from PIL import Image

from tests.tiny import ROOT

# As a user has it, one device; compiled in a hurry, as conftest.py lets all tests do.
HURRIED = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
STEPS, IMAGES = 30, 40


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook):
    """All that the cells print to standard output."""
    return "".join(
        output.text
        for cell in code_cells(notebook)
        for output in cell.outputs
        if output.output_type == "stream" and output.name == "stdout"
    )


def losses(notebook):
    """First and last loss, as the notebook tells them."""
    found = re.search(r"loss ([\d.]+) at step \d+, ([\d.]+) at step (\d+)", printed(notebook))
    assert found, printed(notebook)
    return float(found[1]), float(found[2]), int(found[3])


def pictures(notebook):
    """Its pictures, (H, W, C) uint8."""
    encoded = [
        output.data["image/png"]
        for cell in code_cells(notebook)
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(each)))) for each in encoded]


@pytest.fixture(scope="module")
def executed():
    """The notebook after a short run in a kernel of its own; a cell that raises is an error."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("QUICKSTART_STEPS", str(STEPS))
        environment.setenv("QUICKSTART_IMAGES", str(IMAGES))
        environment.setenv("XLA_FLAGS", HURRIED)
        nbclient.NotebookClient(
            notebook,
            timeout=600,
            kernel_name="python3",
            coalesce_streams=True,
            resources={"metadata": {"path": str(NOTEBOOK.parent)}},
        ).execute()
    return notebook


def test_the_notebook_trains_draws_and_plots(executed):
    first, last, steps = losses(executed)
    assert steps == STEPS
    assert np.isfinite([first, last]).all()
    assert last < 0.8 * first
    assert re.search(r"label_agreement: [01]\.\d+", printed(executed))
    real, curve, routers, drawn = pictures(executed)
    assert real.shape[1] == drawn.shape[1]  # ten columns each
    assert drawn.shape[0] > 4 * 64
    for picture in (real, curve, routers, drawn):
        assert len(np.unique(picture)) > 10


def test_the_committed_outputs_are_those_of_one_run():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [o for cell in cells for o in cell.outputs if o.output_type == "error"]
    first, last, steps = losses(notebook)
    assert str(steps) in cells[0].source  # its own number of steps, not a test's
    assert last < 0.5 * first
    assert len(pictures(notebook)) == 4
    assert NOTEBOOK.stat().st_size < 400_000
