"""Run notebooks/walkthrough.ipynb from top to bottom and keep what it shows: python tools/build_notebook.py

Edit the notebook, in Jupyter or as text, then give this command before a commit. A cell that fails stops it,
and the file stays as it was.
"""

import hashlib
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "walkthrough.ipynb"


def fingerprint(notebook):
    """A hash of the code of all cells: outputs are of this code and of no other."""
    code = "\0".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return hashlib.sha256(code.encode()).hexdigest()


def run(notebook):
    """Run all cells in a fresh kernel that starts in the notebook's folder; outputs go into `notebook`."""
    options = {"timeout": 1800, "record_timing": False, "coalesce_streams": True}
    NotebookClient(notebook, **options, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()


def tidy(notebook):
    """Leave out what differs from machine to machine: progress bars and the version of Python."""
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "outputs_of": fingerprint(notebook),
    }


def main():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    try:
        run(notebook)
    except CellExecutionError as error:
        sys.exit(f"{error}\nerror: a cell failed, see above; {NOTEBOOK.name} stays as it was")
    tidy(notebook)
    unfinished = NOTEBOOK.with_suffix(".tmp")
    nbformat.write(notebook, unfinished)
    unfinished.replace(NOTEBOOK)
    print(f"{NOTEBOOK.name}: {NOTEBOOK.stat().st_size / 1000:,.0f} kB")


if __name__ == "__main__":
    main()
