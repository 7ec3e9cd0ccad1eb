"""Programs as models write them give in the sandbox what plain CPython gives."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from rllib_gtpo.sandbox import Limits, PythonSandbox, Status
from rllib_gtpo.sandbox.spawn import environment
from tests.sandbox.snippets import DIFFERENT, SNIPPETS

LIMITS = Limits(cpu_seconds=60, memory_mb=2048, output_chars=1 << 20)
pytestmark = pytest.mark.timeout(600)
HEAVY = re.compile(r"^(?:import|from) (?:matplotlib|pandas|scipy|sympy)", re.MULTILINE)
COMPARED = [
    pytest.param(name, marks=pytest.mark.slow if HEAVY.search(code) else ())
    for name, code in SNIPPETS.items()
    if name not in DIFFERENT
]


@pytest.fixture(scope="module")
def sandbox():
    with PythonSandbox(LIMITS, preload=("numpy", "sympy")) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def plain(request, tmp_path_factory):
    """{name: (exit code, output)} of `python FILE`, in the sandbox's environment, as `<cell>`.

    Of the programs that are compared now.
    """

    def run(name):
        directory = tmp_path_factory.mktemp(name)
        path = directory / "snippet.py"
        path.write_text(SNIPPETS[name])
        done = subprocess.run(
            [sys.executable, "-B", "-X", "utf8", str(path)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=directory,
            env=environment(str(directory)) | {"PYTHONUNBUFFERED": "1"},
            timeout=300,
        )
        return done.returncode, done.stdout.decode().replace(str(path), "<cell>")

    tests = [t for t in request.session.items if t.name.startswith("test_as_plain_python")]
    names = [test.callspec.params["name"] for test in tests]
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(run, names), strict=True))


@pytest.mark.parametrize("name", COMPARED)
def test_as_plain_python(sandbox, plain, name):
    code, expected = plain[name]
    result = sandbox.run(SNIPPETS[name])
    assert result.output == expected
    assert (result.status is Status.OK) == (code == 0)


@pytest.mark.parametrize("name", DIFFERENT)
def test_documented_difference(sandbox, name):
    reason, expected = DIFFERENT[name]
    assert reason and expected in sandbox.run(SNIPPETS[name]).output


def test_there_are_enough():
    assert len(SNIPPETS) >= 150 and DIFFERENT.keys() <= SNIPPETS.keys()
