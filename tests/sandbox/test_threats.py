"""Hostile code against every rung, as root and as an ordinary user, and the negative control."""

import json
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest

from rllib_gtpo.sandbox import Limits, PythonSandbox, SandboxUnavailable, confine, probe, seccomp
from rllib_gtpo.sandbox.arena import Arena
from rllib_gtpo.sandbox.landlock import version
from rllib_gtpo.sandbox.threats import THREATS

ROOT = Path(__file__).parents[2]
USER = 54321  # no right to anything
CONTROLS = [threat for threat in THREATS if threat.control]
RUNGS = ("auto", "landlock", "sealed")
as_root = pytest.mark.skipif(os.getuid() != 0, reason="needs root")


def name_of(threat) -> str:
    return threat.name


@pytest.fixture(scope="module")
def arenas():
    """One arena per rung, made when it is first asked for."""
    made = {}

    def arena(layers):
        if layers == "landlock" and not version():
            pytest.skip("this kernel has no Landlock")
        if layers not in made:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                made[layers] = Arena(layers)
        return made[layers]

    yield arena
    for each in made.values():
        each.__exit__()


@pytest.mark.parametrize("layers", RUNGS)
@pytest.mark.parametrize("threat", THREATS, ids=name_of)
def test_threat_is_stopped(arenas, layers, threat):
    outcome = arenas(layers).run(threat)
    assert not outcome.breaches, outcome.result
    assert not outcome.damage, outcome.result


@as_root
@pytest.mark.parametrize("threat", CONTROLS, ids=name_of)
def test_without_kernel_layers_the_attack_succeeds(arenas, threat):
    """So that the test above cannot pass because of a snippet that does not work."""
    outcome = arenas("rlimits-only").run(threat)
    assert outcome.breaches, outcome.result


def test_every_threat_to_a_kernel_layer_has_a_negative_control():
    bombs = {threat.name for threat in THREATS if threat.layer in ("seccomp", "landlock")} - {
        threat.name for threat in CONTROLS
    }
    # Not to be run where nothing stops them, or nothing to be seen without a network.
    assert bombs == {
        *("vfork", "clone into a user namespace", "fork bomb", "killing for real", "DNS"),
    }


def test_what_is_enforced_on_each_rung(arenas):
    enforced = {layers: arenas(layers).sandbox.guarantees for layers in RUNGS}
    optional = {"own user", "own namespaces"}
    for layers, guarantees in enforced.items():
        missing = {name for name in guarantees if not guarantees[name]}
        assert missing <= optional | ({"disk limit"} if layers == "landlock" else set()), layers
        assert guarantees["own user"] is (os.getuid() == 0)
    assert not enforced["landlock"]["own namespaces"]
    assert arenas("sealed").sandbox.rung == "sealed"


EXPOSE = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def check(result):
    if result != 0: raise OSError(ctypes.get_errno(), "mount")
check(libc.unshare(0x20000))
check(libc.mount(b"none", b"/", None, 16384 | 1 << 18, None))
def closed(path):
    ways = [path[:i] for i in range(1, len(path) + 1) if path[i:i + 1] in ("/", "")]
    return next((way for way in ways if not os.stat(way).st_mode & 1), None)
needed = [os.path.realpath(path) for path in (sys.base_prefix, sys.prefix, os.getcwd())]
opened = {path: os.open(path, os.O_PATH) for path in needed}
for path in needed:
    if closed(path):
        try: os.stat(path).st_mode
        except FileNotFoundError: pass
        directory = closed(path)
        check(libc.mount(b"tmpfs", directory.encode(), b"tmpfs", 0, b"mode=0755"))
        os.makedirs(path, exist_ok=True)
        check(libc.mount(f"/proc/self/fd/{opened[path]}".encode(), path.encode(), None, 4096, None))
for fd in opened.values(): os.close(fd)
user, home = int(sys.argv[1]), sys.argv[2]
os.makedirs(home + "/.ssh"); os.chown(home, user, user); os.chown(home + "/.ssh", user, user)
os.setgroups([]); os.setresgid(user, user, user); os.setresuid(user, user, user)
os.environ["HOME"] = home
os.execv(sys.executable, [sys.executable, "-B", *sys.argv[3:]])
"""


def run_as_ordinary_user(tmp_path, *arguments: str) -> subprocess.CompletedProcess:
    """Run Python without rights, in a mount namespace where it may read the interpreter.

    An interpreter below a closed directory such as /root is shown in an otherwise empty one.
    """
    prefix = [sys.executable]
    if os.getuid() == 0:
        for directory in (tmp_path, *tmp_path.parents):
            if not directory.stat().st_mode & 1:
                directory.chmod(0o711)
        prefix += ["-c", EXPOSE, str(USER), str(tmp_path / "home")]
    done = subprocess.run([*prefix, *arguments], capture_output=True, text=True, cwd=ROOT)
    if "OSError" in done.stderr and "mount" in done.stderr:
        pytest.skip("an ordinary user cannot read this interpreter, nor may we mount")
    return done


@pytest.mark.slow
@pytest.mark.parametrize("layers", RUNGS)
def test_threats_as_an_ordinary_user(tmp_path, layers):
    done = run_as_ordinary_user(
        tmp_path, "-m", "rllib_gtpo.sandbox", "check", "--json", "--layers", layers
    )
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    bad = [threat for threat in report["threats"] if threat["breaches"] or threat["damage"]]
    assert not bad and done.returncode == 0
    assert len(report["threats"]) == len(THREATS)
    assert not report["guarantees"]["own user"] and report["guarantees"]["file reads"]


def test_an_ordinary_user_gets_a_sandbox(tmp_path):
    code = """
        import os
        from rllib_gtpo.sandbox import PythonSandbox
        with PythonSandbox() as sandbox:
            result = sandbox.run("import os; print(os.getuid()); open('/etc/passwd')")
            print(os.getuid(), result.output, sandbox.rung)
    """
    done = run_as_ordinary_user(tmp_path, "-c", textwrap.dedent(code))
    assert done.returncode == 0, done.stderr
    user, inside, *_ = done.stdout.split()
    assert user == inside != "0" and "Error: [Errno" in done.stdout


def test_check_command(tmp_path):
    command = [sys.executable, "-m", "rllib_gtpo.sandbox", "check", "--only", "fork"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "yes  system call filter" in done.stdout and "threats stopped" in done.stdout
    command += ["--layers", "rlimits-only"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "GOT THROUGH: fork" in done.stdout
    assert "NO   system call filter" in done.stdout


# The ladder and the probe.


def test_no_seccomp_is_refused_and_names_the_way_out():
    config = {"layers": "rlimits-only", "degraded": False, "scratch": "", "limits": {}, "path": []}
    with pytest.raises(confine.Refused, match=r"remote backend .*allow_degraded=True"):
        confine.Confinement(config)
    with pytest.raises(SandboxUnavailable, match=r"rllib_gtpo\.sandbox\.remote"):
        PythonSandbox(layers="rlimits-only")


def test_other_machines_have_no_filter(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert not seccomp.supported()


def test_the_probe_names_what_succeeds():
    """A sandbox that claims to be confined, but is not, is refused."""
    with pytest.warns(RuntimeWarning, match="DEGRADED"):
        sandbox = PythonSandbox(layers="rlimits-only", allow_degraded=True)
    with sandbox:
        facts = {"rung": "landlock", "own user": False, "namespaces": False}
        with pytest.raises(SandboxUnavailable, match=r"reading /etc/passwd.*fork.*kill"):
            probe.prove(sandbox.run, Limits(), facts, False)


def test_sealed_warns_and_runs_what_is_preloaded():
    with pytest.warns(RuntimeWarning, match="sealed"):
        sandbox = PythonSandbox(layers="sealed", preload=("json",))
    with sandbox:
        assert sandbox.run("import json, fractions; print(json.dumps([1]))").output == "[1]\n"
        assert (
            sandbox.run("import wave")
            .output.splitlines()[-1]
            .startswith(("ModuleNotFoundError", "PermissionError"))
        )


@pytest.mark.parametrize("layers", ["auto", "landlock"])
def test_what_may_be_read(layers, tmp_path):
    """The library and installed packages, but nothing that merely is on `sys.path`."""
    secret = tmp_path / "dataset.py"
    secret.write_text("answer = 42")
    with PythonSandbox(layers=layers) as sandbox:
        imports = "import sqlite3, ssl, hashlib, lzma, bz2, uuid, decimal, numpy, xml.dom.minidom"
        result = sandbox.run(f"{imports}; print(numpy.arange(3).sum())")
        assert result.output == "3\n"
        for path in (secret, ROOT / "pyproject.toml", ROOT / "envs" / "rllib_gtpo_envs"):
            code = f"import os; print(os.path.isdir({str(path)!r}) or open({str(path)!r}))"
            assert sandbox.run(code).status == "error" or layers == "landlock"
            listing = f"import os; os.listdir({str(path.parent)!r})"
            assert sandbox.run(listing).status == "error"


def test_filter_programs_fit():
    for sealed in (False, True):
        program = seccomp.build(sealed)
        assert len(program) < 4096 and all(j < 256 for i in program for j in i[1:3])
    assert seccomp.rules(False).keys() > seccomp.rules(True).keys()
    assert not {2, 82, 87, 257} & seccomp.rules(True).keys()
