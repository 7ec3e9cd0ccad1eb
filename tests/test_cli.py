"""Arguments, messages and exit codes; nothing here trains."""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rllib_gtpo.cli import build_parser, main
from rllib_gtpo.command.stopping import StopCriteria, flatten, numbers
from rllib_gtpo.command.streams import take_any_text
from rllib_gtpo.command.yaml_text import parse_assignment, parse_yaml
from rllib_gtpo.errors import ConfigError
from rllib_gtpo.progress import Progress
from tests.test_convert import TestShareGPT as _ShareGPT

ROOT = Path(__file__).resolve().parent.parent
YAML = """\
tiny:
  run: PPO
  env: CartPole-v1
  stop: {training_iteration: 1}
  config:
    num_env_runners: 0
    lr: 1e-4
"""


def run_cli(*args: str, **kwargs) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "envs"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "rllib_gtpo.cli", *args],
        env={**os.environ, "PYTHONPATH": path},
        text=True,
        capture_output=True,
        timeout=120,
        **kwargs,
    )


def test_help_is_quick_and_names_the_exit_codes():
    start = time.perf_counter()
    done = run_cli("train", "file", "--help")
    assert done.returncode == 0
    assert time.perf_counter() - start < 5  # measured 0.1 s; importing Ray alone takes longer
    for option in ("--stop", "--override", "--resume", "--checkpoint-freq", "exit codes", "130"):
        assert option in done.stdout


def test_help_does_not_import_ray():
    code = "import sys, rllib_gtpo.cli as c; c.build_parser(); sys.exit('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60)
    assert done.returncode == 0


def test_no_command_prints_help(capsys):
    assert main([]) == 2
    assert "usage: rllib" in capsys.readouterr().out


def test_repeated_options_collect():
    options = ["--stop", "a=1", "--stop", "b/c=2", "--override", "lr=1e-4"]
    args = build_parser().parse_args(["train", "file", "x.py", *options, "--checkpoint-freq", "0"])
    assert args.stop == ["a=1", "b/c=2"]
    assert args.override == ["lr=1e-4"]
    assert args.checkpoint_freq == 0


def test_negative_frequency_is_refused(capsys):
    with pytest.raises(SystemExit) as error:
        main(["train", "file", "x.py", "--checkpoint-freq", "-1"])
    assert error.value.code == 2
    assert "-1 is negative" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["trian", "file", "x.py"],
            "rllib: error: argument COMMAND: unknown: 'trian'; did you mean 'train'?",
        ),
        (["train", "fil", "x.py"], "unknown: 'fil'; did you mean 'file'?"),
        (["train", "file", "x.py", "--overide", "lr=1"], "'--overide'; did you mean '--override'?"),
        (["train", "file", "x.py", "y.py"], "rllib train file: error: unexpected argument 'y.py'"),
        (["convert", "a", "b", "--from", "sharegtp"], "'sharegtp'; did you mean 'sharegpt'?"),
        (["train", "file"], "the following arguments are required: FILE"),
    ],
)
def test_mistyped_arguments_are_told_the_nearest(capsys, arguments, message):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    captured = capsys.readouterr().err
    assert message in captured
    assert captured.startswith("usage: rllib")


def test_example_list_shows_paths_and_descriptions(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["example", "list"]) == 0
    out = capsys.readouterr().out
    assert "tuned_examples/ppo_cartpole.yaml  " in out
    assert "balances a pole" in out


def test_missing_file_exits_2_without_traceback():
    done = run_cli("train", "file", "tuned_examples/ppo_cartpol.yaml", cwd=ROOT)
    assert done.returncode == 2
    assert "did you mean 'ppo_cartpole.yaml'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["--version"],
        ["example", "list"],
        ["example", "get", "ppo_cartpole"],
        ["train", "file", "task.yaml", "--dry-run"],
        ["plan", "calculator.yaml", "--tokens", "100"],
        ["convert", "traces.jsonl", "out.jsonl", "--from", "sharegpt"],
    ],
    ids=" ".join,
)
def test_a_closed_pipe_is_quiet(tmp_path, monkeypatch, capfd, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "task.yaml").write_text(YAML)
    text = (ROOT / "tuned_examples" / "gtpo_calculator.yaml").read_text()
    (tmp_path / "calculator.yaml").write_text(text)
    (tmp_path / "traces.jsonl").write_text(json.dumps(_ShareGPT.ROW))
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(command) == 141
        monkeypatch.undo()
    assert capfd.readouterr() == ("", "")


def test_a_full_device_is_told(monkeypatch, capsys):
    with open("/dev/full", "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["example", "list"]) == 1
        monkeypatch.undo()
    assert "No space left on device" in capsys.readouterr().err


def test_without_an_output_at_all():
    command = f"{sys.executable} -m rllib_gtpo.cli --version >&- 2>&-"
    assert subprocess.run(["bash", "-c", command], cwd=ROOT, timeout=60).returncode == 0


def test_names_that_are_no_text(capsys):
    assert main(["train", "file", "na\udcffme.yaml"]) == 2
    assert "there is no file na\\udcffme.yaml" in capsys.readouterr().err
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        take_any_text()
        print("\ud800\xe9", flush=True)
    assert stream.buffer.getvalue() == b"\\ud800\\xe9\n"


class TestProgress:
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def shown(self, monkeypatch, stream, **variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "stderr", stream)
        with Progress("rollouts", 3) as progress:
            progress.step(note="1/3 groups")
        return "" if stream is None else stream.getvalue()

    def test_a_terminal_has_a_bar_without_colour(self, monkeypatch):
        shown = self.shown(monkeypatch, self.Terminal(), TERM="xterm", NO_COLOR="1")
        assert "rollouts: " in shown and "\r" in shown and "\x1b[3" not in shown

    @pytest.mark.parametrize("stream", [io.StringIO, None], ids=["file", "closed"])
    def test_what_is_no_terminal_has_none(self, monkeypatch, stream):
        assert self.shown(monkeypatch, stream and stream(), TERM="xterm") == ""

    def test_nor_has_one_that_cannot_move_back(self, monkeypatch, capsys):
        monkeypatch.setattr("rllib_gtpo.progress._LINE_EVERY_S", -1.0)
        assert self.shown(monkeypatch, self.Terminal(), TERM="dumb") == ""
        assert capsys.readouterr().out == "rollouts: 1/3 1/3 groups\n"

    def test_a_closed_pipe_does_not_end_a_step(self, monkeypatch):
        monkeypatch.setattr("rllib_gtpo.progress._LINE_EVERY_S", -1.0)
        read, write = os.pipe()
        os.close(read)
        with pytest.raises(BrokenPipeError), os.fdopen(write, "w") as stream:  # when it is closed
            monkeypatch.setattr(sys, "stdout", stream)
            self.shown(monkeypatch, io.StringIO())


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("a=1", "a", 1),
        ("a.b=1e-4", "a.b", 1e-4),
        ("a=[1, 2]", "a", [1, 2]),
        ("a={b: no}", "a", {"b": False}),
        ("a=x=y", "a", "x=y"),
        ("a=", "a", None),
    ],
)
def test_assignments(text, key, value):
    assert parse_assignment(text, "--override") == (key, value)


def test_assignment_without_value():
    with pytest.raises(ConfigError, match="--stop takes KEY=VALUE, not 'abc'"):
        parse_assignment("abc", "--stop")


def test_yaml_numbers_lines_and_duplicates():
    tree, lines = parse_yaml("a:\n  lr: 3e-5\n  b: 1_000\n", "f")
    assert tree == {"a": {"lr": 3e-5, "b": 1000}}
    assert lines == {("a",): 1, ("a", "lr"): 2, ("a", "b"): 3}
    with pytest.raises(ConfigError, match=r"f:2: 'a' is also set on line 1"):
        parse_yaml("a: 1\na: 2\n", "f")
    with pytest.raises(ConfigError, match=r"f:\d: not valid YAML"):
        parse_yaml("a: [1\nb: 2\n", "f")


def test_flatten_and_numbers():
    assert flatten({"a": {"b": 1, "c": {}}, "d": 2}) == {"a/b": 1, "a/c": {}, "d": 2}
    assert numbers({"a": {"b": 1, "s": "x", "t": True}, "config": {"lr": 1}}) == {"a/b": 1.0}


class TestStopCriteria:
    def test_reached_at_or_above(self):
        criteria = StopCriteria({"evaluation": {"accuracy": 0.9}, "x.y": 5})
        assert criteria.reached({"evaluation/accuracy": 0.89, "x/y": 4}) is None
        assert criteria.reached({"evaluation/accuracy": 0.9}) == (
            "evaluation/accuracy = 0.9 reached 0.9"
        )
        assert criteria.reached({"x/y": 6}) == "x/y = 6 reached 5"
        assert criteria.reached({"x/y": float("nan")}) is None

    def test_unknown_key_names_the_near_ones(self):
        criteria = StopCriteria({"episode_return_mean": 5})
        with pytest.raises(ConfigError, match="did you mean 'env_runners/episode_return_mean'"):
            criteria.check_known({"env_runners/episode_return_mean": 1.0, "done": 0.0})

    def test_evaluation_key_waits_for_the_first_evaluation(self):
        criteria = StopCriteria({"evaluation/accuracy": 1}, evaluation_interval=3)
        criteria.check_known({})
        criteria.check_known({})
        with pytest.raises(ConfigError, match="no metric 'evaluation/accuracy'"):
            criteria.check_known({})
        with pytest.raises(ConfigError, match="set evaluation_interval"):
            StopCriteria({"evaluation/accuracy": 1}).check_known({})

    def test_episode_metrics_wait_for_the_first_episode(self):
        StopCriteria({"env_runners/episode_return_mean": 1}).check_known({"done": 0.0})

    def test_threshold_must_be_a_number(self):
        with pytest.raises(ConfigError, match="must be a number, not 'soon'"):
            StopCriteria({"a": "soon"})


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("lr: 1e-4", "lrr: 1e-4", "task.yaml:7: PPOConfig has no setting 'lrr'; did you mean 'lr'"),
        ("run: PPO", "run: PP0", "task.yaml:2: unknown algorithm 'PP0'; did you mean 'PPO'"),
        ("run: PPO", "run: ppo", "unknown algorithm 'ppo'; did you mean 'PPO'?"),
        ("env: Cart", "env: Kart", "unknown environment 'KartPole-v1'; did you mean 'CartPole-v1'"),
        ("  stop:", "  stopp:", "task.yaml:4: unknown key 'stopp'; did you mean 'stop'?"),
        ("  run: PPO\n", "", "task.yaml:1: 'tiny' needs `run: ALGORITHM`"),
        ("1}", "soon}", "the threshold of 'training_iteration' must be a number"),
        ("lr: 1e-4", "lr: [1", "task.yaml:8: not valid YAML"),
        ("lr: 1e-4", "minibatch_size: 999999", "minibatch_size"),
        (
            "lr: 1e-4",
            "model_config: {fcnet_hidden: [8]}",
            "task.yaml:7: the default model has no setting 'fcnet_hidden'; did you mean 'fcnet_",
        ),
        (
            "lr: 1e-4",
            "evaluation_config: {explor: true}",
            "task.yaml:7: PPOConfig has no setting 'explor'; did you mean 'explore'",
        ),
    ],
)
def test_bad_yaml(tmp_path, capsys, monkeypatch, old, new, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "task.yaml").write_text(YAML.replace(old, new, 1))
    assert main(["train", "file", "task.yaml"]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "defines no `config`"),
        ("config = {}", "has a dict as its `config`"),
        ("x = 1\nconfig = undefined\n", "task.py:2: NameError"),
        ("def f(:\n", "task.py:1: SyntaxError"),
        ("import sys\nsys.exit(3)\n", "task.py:2: SystemExit: 3"),
        (
            "from ray.rllib.algorithms.ppo import PPOConfig\nconfig = PPOConfig()\nstop = 3\n",
            "`stop` must be a dict, not int",
        ),
    ],
)
def test_bad_python_file(tmp_path, capsys, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "task.py").write_text(text)
    assert main(["train", "file", "task.py"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--override", "lrr=1"], "--override lrr=1: PPOConfig has no setting 'lrr'; did you mean"),
        (["--override", "lr.x=1"], "'lr' is 0.0001, not a mapping"),
        (["--override", "lr"], "--override takes KEY=VALUE, not 'lr'"),
        (["--stop", "a=b"], "the threshold of 'a' must be a number, not 'b'"),
        (["--resume", "nowhere"], "there is no directory nowhere"),
        (["--resume", "."], ". is not a run: it has no run.json"),
        (["--all"], "add --dry-run"),
        (["--ray-address", "auto", "--num-cpus", "1"], "leave out them or --ray-address"),
    ],
)
def test_bad_options(tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "task.yaml").write_text(YAML)
    assert main(["train", "file", "task.yaml", *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_debug_shows_the_traceback(tmp_path, capsys):
    assert main(["train", "file", str(tmp_path / "x.yaml"), "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
