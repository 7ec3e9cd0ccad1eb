"""How long a large report takes, and how much memory."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest

from rllib_gtpo.record import record_files
from rllib_gtpo.record.location import Location
from rllib_gtpo.record.schema import FILE_NAME, METADATA
from tests.record.samples import ABOUT, write_record

FILES = 79
BUILD = """
import re, sys, time
from rllib_gtpo.report import build_report
began = time.process_time()
print(build_report(sys.argv[1]))
print(time.process_time() - began)
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 2**20)
"""


@pytest.mark.slow
def test_ten_thousand_trajectories(tmp_path):
    """Of 10 turns and 2,000 tokens each: under a minute of CPU time and 1 GiB."""
    words = ["alpha", "print(", "x = 3", "for i in range(10):", "\n", "because"]
    text = " ".join(random.Random(0).choices(words, k=80))
    write_record(tmp_path, groups=16, members=8, turns=10, tokens=140, text=text, output=text)
    (first,) = record_files(tmp_path)
    table = first.read()
    for iteration in range(2, FILES + 1):
        about = {**ABOUT, "iteration": iteration, "sampled_groups": 16}
        renamed = table.replace_schema_metadata({METADATA: json.dumps(about).encode()})
        Location.of(tmp_path / "record").write(renamed, FILE_NAME.format(iteration))
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(tmp_path)], capture_output=True, text=True, check=True
    )
    line, seconds, gib = done.stdout.splitlines()
    assert "10,112 trajectories in 1,264 groups" in line
    assert float(seconds) < 60.0 and float(gib) < 1.0, done.stdout
    print(line, seconds, gib)
