"""The command itself: help, wrong calls, interruptions, what a person sees when something is wrong."""
import signal
import subprocess
import sys
import threading
import time
import types

import pytest

from convnn_timm import __version__, cli
from convnn_timm.cli import terminal
from convnn_timm.cli.parser import build_parser


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(['--version'])
    assert (stop.value.code, capsys.readouterr().out) == (0, f'convnn-timm {__version__}\n')


def test_help_shows_every_command(capsys):
    with pytest.raises(SystemExit):
        cli.main([])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    shown = [line.split()[0] for line in lines if line.startswith('  ')]
    assert sorted(shown[:-2]) == sorted(build_parser().commands)  # the last two are options


@pytest.mark.parametrize('command', [None, '', 'list', 'info', 'run', 'predict', 'quickstart', 'export-onnx', 'stats'])
def test_help(capsys, command):
    with pytest.raises(SystemExit) as stop:
        cli.main([] if command is None else [*command.split(), '--help'])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert 'train' in out if not command else f'examples:\n  convnn-timm {command}' in out


def test_module_helps_without_torch():
    """`python -m convnn_timm` is the same command, and its help does not wait for PyTorch."""
    code = 'import sys, runpy; sys.argv = ["convnn-timm", "--help"]\n' \
           'try: runpy.run_module("convnn_timm", run_name="__main__")\n' \
           'finally: assert not {"torch", "timm"} & set(sys.modules)'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0 and 'quickstart' in done.stdout, done.stderr


def test_wrong_calls(error_of):
    assert 'required: SCRIPT (see' in error_of('run', status=2)
    assert "unknown command 'prdict'; did you mean predict?" in error_of('prdict', status=2)
    assert 'there are quickstart, list, ' in error_of('zzz', status=2)
    assert "'csw'" in error_of('predict', 'a.png', '--model', 'resnet18', '--format', 'csw', status=2)
    assert '. is a folder: name one image in it' in error_of(
        'neighbors', '.', '--model', 'resnet18', '-o', 'a.png', status=2)
    assert 'convnn-timm predict --help' in error_of('predict', 'a.png', status=2)
    assert '--topk' in error_of('predict', 'a.png', '--model', 'resnet18', '--topk', '0', status=2)


def test_what_is_not_the_systems_fault_keeps_its_traceback(monkeypatch):
    def fail(args):
        raise ConnectionError('of our own making')

    monkeypatch.setattr('convnn_timm.cli.start.list_models', fail)
    with pytest.raises(ConnectionError):
        cli.main(['list'])


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize('command, inside', [
    ('list', 'timm.list_models'), ('run conftest.py', 'convnn_timm.autoload.run_script'),
])
def test_interrupted(run, monkeypatch, command, inside):
    monkeypatch.setattr(inside, interrupt)
    assert run(*command.split()) == (130, '', 'convnn-timm: interrupted\n')


@pytest.mark.parametrize('command, lines', [
    ('predict a.png --model resnet18_convnn', 1), ('train --data-dir data', 1), ('list', 3)])
def test_ctrl_c(command, lines):
    """While the process imports, and while it works: after its first lines."""
    code = f'import sys; from convnn_timm.cli import main; print(flush=True); sys.exit(main({command.split()}))'
    process = subprocess.Popen(
        [sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(lines):
        process.stdout.readline()
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and err.endswith('convnn-timm: interrupted\n') and 'Traceback' not in err, err


def test_long_silence_is_explained(capsys, monkeypatch):
    with terminal.announced('loading a model'):
        pass
    assert capsys.readouterr().err == ''
    monkeypatch.setattr(terminal, 'PATIENCE', 0.)
    with terminal.announced('loading a model'):
        threading.Event().wait(0.2)
    assert capsys.readouterr().err == 'convnn-timm: loading a model ...\n'


def test_control_characters_do_not_reach_the_terminal(capsys):
    terminal.report('\x1b[31mred\udcff\nséparé')
    assert capsys.readouterr().err == 'convnn-timm: error: \\x1b[31mred\\udcff\nséparé\n'


def test_train_and_run_hand_their_arguments_over(error_of, monkeypatch):
    seen = []
    monkeypatch.setitem(sys.modules, 'convnn_timm.train.engine', types.SimpleNamespace(main=seen.append))
    assert cli.main(['train', '--model', 'resnet18', '--help']) == 0
    assert seen == [['--model', 'resnet18', '--help']]

    def refuse(argv):
        raise SystemExit('error: no such recipe')

    monkeypatch.setitem(sys.modules, 'convnn_timm.train.engine', types.SimpleNamespace(main=refuse))
    assert error_of('train') == 'convnn-timm: error: no such recipe\n'

    monkeypatch.setattr('convnn_timm.autoload.run_script', lambda *args: seen.append(args), raising=False)
    assert cli.main(['run', 'train.py', '--lr', '0.1', '--help', 'data']) == 0
    assert seen[1:] == [('train.py', ['--lr', '0.1', '--help', 'data'])]


def test_errors_of_a_script_are_its_own(tmp_path):
    script = tmp_path / 'script.py'
    script.write_text('open("missing.txt")')
    with pytest.raises(FileNotFoundError, match='missing.txt'):
        cli.main(['run', str(script)])


def test_quickstart_failure_is_one_line(run, tmp_path):
    (tmp_path / 'thesis.txt').write_text('mine')
    status, _, err = run('quickstart', '--output', tmp_path)
    assert status == 1 and err.count('\n') == 1 and 'choose another folder with --output' in err
    status, _, err = run('quickstart', '--output', tmp_path / 'thesis.txt' / 'digits')
    assert (status, err) == (1, f'convnn-timm: error: {tmp_path}/thesis.txt/digits: Not a directory\n')
    assert [p.name for p in tmp_path.iterdir()] == ['thesis.txt']
