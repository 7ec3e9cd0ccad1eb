"""Checks a line of a shell block: options, files, targets, extras, tests; runs what is cheap."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

from rllib_gtpo.cli import build_parser, main
from rllib_gtpo.command.files import load_experiment
from rllib_gtpo.command.settings import apply_overrides
from rllib_gtpo.command.yaml_text import parse_assignment

ROOT = Path(__file__).parents[2]
NOT_OURS = {
    "mlflow": "starts a server that stays",
    "pre-commit": "changes the checkout's git hooks",
    "ray": "starts or asks a cluster",
    "tensorboard": "starts a server that stays",
}
"""Programs whose arguments nobody checks here, and why they are not run."""

OURS = re.compile(r"^(tuned_examples|release|tests|docs|envs|rllib_gtpo)/[\w./-]+$")


CHEAP = re.compile(
    r"rllib (example (list|get)\b|train .* --dry-run\b|--version|report runs/calculator"
    r"|evaluate \S+\.parquet\b)"
)
"""Commands that are run, where the page's directory is the current one."""

PLACEHOLDERS = {"X", "FILE", "RUN", "CHECKPOINT", "DIR", "NAME", "IN", "OUT"}


def check_command(line: str, where: str, *, excused: bool = False) -> None:
    """Raises AssertionError, with the place, for what would not run.

    excused: The page says why the block cannot be run; what is ours in it must be right even so.
    """
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"\w+=\S*", words[0]):
        words.pop(0)  # variables for the command
    if not words:
        return
    for word in words:
        assert not OURS.match(word) or (ROOT / word).exists(), f"{where}: there is no {word}"
    program, rest = Path(words[0]).name, words[1:]
    checks = {
        "rllib": _check_rllib,
        "rllib-gtpo": _check_rllib,
        "make": _check_make,
        "python": _check_python,
        "pytest": _check_python,
        "pip": _check_pip,
    }
    if CHEAP.match(" ".join(words)) and PLACEHOLDERS.isdisjoint(words):
        assert main(rest) == 0, f"{where}: {' '.join(words)} fails"
    elif program in checks:
        checks[program](rest, where)
    else:
        assert excused or program in NOT_OURS, (
            f"{where}: nobody checks {program!r}; say in a comment in front why it is not run"
        )


def _check_rllib(words: list[str], where: str) -> None:
    """The options are known; an experiment that exists is loaded, and takes the overrides."""
    try:
        args = build_parser().parse_args(words)
    except SystemExit as refused:
        assert not refused.code, f"{where}: rllib {' '.join(words)} is not understood"
        return
    file = ROOT / getattr(args, "file", "")
    if file.suffix in (".py", ".yaml") and file.is_file():
        experiment = load_experiment(file)
        apply_overrides(experiment.config, getattr(args, "override", []))
        for stop in getattr(args, "stop", []):
            parse_assignment(stop, "--stop")


def _check_make(words: list[str], where: str) -> None:
    rules = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    for word in words:
        assert word in rules or "=" in word, f"{where}: make has no {word}"


def _check_python(words: list[str], where: str) -> None:
    """A script's options occur in its source, or in what it shares with the others."""
    if words[:1] == ["-m"]:
        module = ROOT / words[1].replace(".", "/")
        ours = words[1].split(".")[0] == "rllib_gtpo"
        found = module.with_suffix(".py").is_file() or (module / "__main__.py").is_file()
        assert found or not ours, f"{where}: no module {words[1]}"
        return
    if not words or not words[0].endswith(".py") or not (ROOT / words[0]).is_file():
        return
    script = ROOT / words[0]
    sources = [script, *script.parent.glob("*.py"), ROOT / "release" / "results.py"]
    text = "".join(path.read_text() for path in sources) + (ROOT / "rllib_gtpo/cli.py").read_text()
    for word in words[1:]:
        option = word.partition("=")[0]
        assert not word.startswith("--") or f'"{option}"' in text, f"{where}: no option {option}"


def _check_pip(words: list[str], where: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for word in words:
        for names in re.findall(r"\[([\w,-]+)\]", word):
            for name in names.split(","):
                assert name in extras, f"{where}: there is no extra {name!r}"
