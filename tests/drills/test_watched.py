"""The watch itself: without these, a silent audit would prove nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.drills import watched

GUILTY = {
    "a class": "import pickle, collections\npickle.loads(pickle.dumps(collections.OrderedDict(a=1)))",
    "plain numbers": "import pickle\npickle.loads(pickle.dumps([1, 2.5, 'three']))",
    "an unpickler": "import io, pickle\npickle.Unpickler(io.BytesIO(pickle.dumps([1]))).load()",
    "Python's own unpickler": "import io, pickle\npickle._Unpickler(io.BytesIO(pickle.dumps([1]))).load()",
    "numpy": "import numpy\nnumpy.save(PATH, numpy.array([[1], 'two'], object), allow_pickle=True)\n"
    "numpy.load(PATH + '.npy', allow_pickle = True)",
    "pandas": "import pandas\npandas.to_pickle([1], PATH)\npandas.read_pickle(PATH)",
    "a pipe": "import multiprocessing\nhere, there = multiprocessing.Pipe()\nthere.send([1])\nhere.recv()",
    "joblib": "import joblib\njoblib.dump([1], PATH)\njoblib.load(PATH)",
}
INNOCENT = {
    "a library alone": "import library\nlibrary.thread.join()",
    "numbers without objects": "import numpy\nnumpy.save(PATH, numpy.arange(3))\nnumpy.load(PATH + '.npy')",
}
LIBRARY = """
import pickle, threading
thread = threading.Thread(target=lambda: pickle.loads(pickle.dumps([1])))
thread.start()
"""


def audited(folder: Path, code: str) -> list[watched.Call]:
    """What is written down of a program that stands where the product would."""
    product = folder / "product"
    product.mkdir()
    (folder / "library.py").write_text(LIBRARY)
    program = product / "program.py"
    program.write_text(f"import sys\nsys.path.append({str(folder)!r})\nPATH = {str(folder / 'x')!r}\n{code}\n")
    subprocess.run([sys.executable, str(program)], env=os.environ | watched.audited(folder, product), check=True)
    return watched.unpickled(folder)


@pytest.mark.parametrize("code", GUILTY.values(), ids=GUILTY)
def test_product_code_that_unpickles_is_seen_by_whichever_door(tmp_path: Path, code: str) -> None:
    found = watched.ours(audited(tmp_path, code))
    assert found
    assert {call.by for call in found} == {f"{tmp_path}/product/program.py:<module>"}


@pytest.mark.parametrize("code", INNOCENT.values(), ids=INNOCENT)
def test_what_libraries_do_alone_is_no_finding(tmp_path: Path, code: str) -> None:
    assert watched.ours(audited(tmp_path, code)) == []


def test_an_entrance_lets_pass_what_goes_through_it_and_not_what_it_calls(tmp_path: Path) -> None:
    """Ray reads its workers' results for the product; a task of the product that Ray runs may unpickle no more."""
    entry = tmp_path / "ray" / "_private" / "serialization.py"
    entry.parent.mkdir(parents=True)
    entry.write_text("import pickle\ndef get(): pickle.loads(pickle.dumps([1]))\ndef run(task): task()\n")
    load = f"import runpy, pickle\nray = runpy.run_path({str(entry)!r})\ndef task(): pickle.loads(pickle.dumps([1]))\n"
    calls = audited(tmp_path, load + "ray['get']()\nray['run'](task)")
    assert [call.by.rpartition(":")[2] for call in watched.ours(calls)] == ["task"]
    counts = "2 kinds of unpickling: 1 by product code, 1 through /ray/_private/serialization.py"
    assert watched.summary(calls) == f"{counts}, the rest by libraries alone"
