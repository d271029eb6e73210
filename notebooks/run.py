"""Executes every notebook of this folder, each in a fresh kernel, and every script at a tiny size; the first error ends
the run.

python notebooks/run.py           check
python notebooks/run.py --save    also write the outputs into the notebooks
"""

import pathlib
import subprocess
import sys
import time

import nbformat
from nbclient import NotebookClient

for path in sorted(pathlib.Path(__file__).parent.glob("*.ipynb")):
    start = time.perf_counter()
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": path.parent}}
    NotebookClient(notebook, timeout=600, startup_timeout=300, resources=where).execute()
    if "--save" in sys.argv[1:]:
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # timestamps
        nbformat.write(notebook, path)
    print(f"{path.name}: {len(notebook.cells)} cells, {time.perf_counter() - start:.0f} s")

for path in sorted(pathlib.Path(__file__).parent.glob("scripts/*.py")):
    start = time.perf_counter()
    subprocess.run([sys.executable, str(path), "--quick"], check=True, timeout=600)
    print(f"{path.name}: {time.perf_counter() - start:.0f} s")
