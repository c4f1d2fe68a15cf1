"""However a command ends, it is a sentence and an exit code, and nothing half done is left."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from command_line import failed, run

import milpress
from milpress import formats as f
from milpress import inspection
from milpress.errors import ConfigError
from milpress.mil.package import Package
from milpress.plain import files

SEED = Path(__file__).parents[1] / "fuzz" / "corpus" / "packages" / "branches-iOS17.mlpackage"
PALETTE = ("--palettize", "4", "--weight-threshold", "10")
PROCESS = [sys.executable, "-m", "milpress"]
PRINTS = [
    ("--help",),
    ("--version",),
    ("inspect", SEED),
    ("inspect", SEED, "--json"),
    ("lint", SEED),
]


def started(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [*PROCESS, *map(str, arguments)]
    return subprocess.run(command, text=True, check=False, stderr=subprocess.PIPE, **options)  # type: ignore[call-overload]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("arguments", PRINTS, ids=lambda each: " ".join(map(str, each))[-14:])
def test_a_full_output_is_a_sentence(arguments):
    with Path("/dev/full").open("w") as full:
        done = started(*arguments, stdout=full)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert line.startswith(f"error: [Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}")


def test_a_closed_output_is_a_sentence_before_anything_is_done(tmp_path):
    out = tmp_path / "out.mlpackage"
    done = started("compress", SEED, out, *PALETTE, preexec_fn=lambda: os.close(1))
    assert done.returncode == 2
    assert done.stderr == "error: standard output is closed\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", PRINTS, ids=lambda each: " ".join(map(str, each))[-14:])
def test_a_reader_that_goes_away_ends_it_without_a_word(arguments):
    reading, writing = os.pipe()
    os.close(reading)
    done = started(*arguments, stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_without_an_error_stream_the_exit_code_is_left():
    command = [*PROCESS, "inspect", "nothing.mlpackage"]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, check=False, preexec_fn=lambda: os.close(2)
    )
    assert (done.returncode, done.stdout) == (2, b"")


def test_names_that_the_output_can_not_hold_are_escaped(tmp_path):
    path = tmp_path / "\u6a21.mlpackage"
    path.symlink_to(SEED)
    done = started(
        "inspect", path, stdout=subprocess.PIPE, env={**os.environ, "PYTHONIOENCODING": "latin-1"}
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{tmp_path}/\\u6a21.mlpackage\n")


INTERRUPTED_IMPORT = """
import os, signal, sys
class Interrupts:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            os.kill(os.getpid(), signal.{number})
sys.meta_path.insert(0, Interrupts())
sys.argv = ["milpress", "inspect", {model!r}]
from milpress.cli.root import main
main()
"""


@pytest.mark.parametrize(
    "name", ["milpress.cli.app", "typer", "numpy", "google.protobuf", "rich.table"]
)
@pytest.mark.parametrize(
    ("number", "ended"), [("SIGINT", (130, "interrupted\n")), ("SIGTERM", (143, "terminated\n"))]
)
def test_a_signal_while_python_imports_is_a_word(name, number, ended):
    code = INTERRUPTED_IMPORT.format(name=name, number=number, model=str(SEED))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == ended


SIGNALLED_AT_EACH_LINE = """
import contextlib, io, os, shutil, signal, sys
from pathlib import Path
from milpress.cli import root
from milpress.mil import staging
from milpress.plain import files
from milpress.mil.package import Package

model, folder, kept = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
number, stride = getattr(signal, sys.argv[4]), int(sys.argv[5])
out = folder / "out.mlpackage"
MODEL = "Data/com.apple.CoreML/model.mlmodel"
NAMES = set("__enter__ __exit__ commit copy_rest finish _create_stage _restore draft_of end_draft "
            "end_all_drafts remove take_back".split())
FILES = {staging.__file__, files.__file__}

class Moment:
    def __init__(self, at):
        self.at, self.n = at, 0
    def __call__(self, frame, event, _):
        if frame.f_code.co_filename not in FILES or frame.f_code.co_name not in NAMES:
            return None
        if event in ("line", "return"):
            if self.n == self.at:
                self.n += 1
                os.kill(os.getpid(), number)
            self.n += 1
        return self

class Ended(BaseException):
    pass  # in place of os._exit, which no loop survives

def end(code):
    raise Ended(code)

os._exit = end

def compressed(at, *options):
    sys.argv = ["milpress", "compress", model, str(out), "--weight-threshold", "10",
                "--threads", "1", "--no-verify", *options]
    moment = Moment(at)
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        sys.settrace(moment)
        try:
            code = root.run()
        except Ended as ended:
            (code,) = ended.args
            said.write(root._SIGNALS[number] + "\\n")
        finally:
            sys.settrace(None)
    return code, said.getvalue(), moment.n

compressed(None, "--palettize", "4")
shutil.copytree(out, kept)
code, said, n = compressed(None, "--palettize", "2", "--force")
old, new = ((path / MODEL).read_bytes() for path in (kept, out))
assert (code, said) == (0, "") and old != new and n > 60, (code, said, n)
for at in range(0, n, stride):
    shutil.rmtree(out)
    shutil.copytree(kept, out)
    code, said, _ = compressed(at, "--palettize", "2", "--force")
    assert [path.name for path in folder.iterdir()] == [out.name], (at, list(folder.iterdir()))
    assert (code, said) == (128 + number, root._SIGNALS[number] + "\\n"), (at, code, said)
    assert (out / MODEL).read_bytes() in (old, new), at
    Package(out)
    assert not files._drafts
"""


@pytest.mark.parametrize(("number", "stride"), [("SIGINT", 3), ("SIGTERM", 17)])
def test_a_signal_at_any_moment_leaves_the_old_package_or_the_new_and_nothing_else(
    number, stride, tmp_path
):
    folder = tmp_path / "folder"
    folder.mkdir()
    command = [sys.executable, "-c", SIGNALLED_AT_EACH_LINE, SEED, folder, tmp_path / "kept"]
    done = subprocess.run(
        [*map(str, command), number, str(stride)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_second_signal_ends_it_at_once_and_leaves_nothing(tmp_path):
    code = """
import os, signal, sys
from milpress.compression import packages
from milpress.cli.root import main
def stubborn(*_, **__):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    finally:  # as a kernel that takes its time
        os.kill(os.getpid(), signal.SIGINT)
        print("not reached", flush=True)
packages.compare_packages = stubborn
sys.argv[0] = "milpress"
main()
"""
    out = tmp_path / "out.mlpackage"
    command = [sys.executable, "-c", code, "compress", str(SEED), str(out), *PALETTE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (130, "")
    assert list(tmp_path.iterdir()) == []


def test_a_signal_that_is_ignored_stays_so():
    code = INTERRUPTED_IMPORT.format(name="numpy", number="SIGHUP", model=str(SEED))
    code = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "error: out of memory"),
        (
            MemoryError("Unable to allocate 1.00 TiB"),
            "error: out of memory: Unable to allocate 1.00 TiB",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
            "error: out of memory: DefaultCPUAllocator: can't allocate memory: you tried",
        ),
        (
            OSError(errno.EMFILE, "Too many open files", "a\nb"),
            f"error: [Errno {errno.EMFILE}] Too many open files: 'a\\nb'",
        ),
        (
            ValueError("what\x1b[2J\nelse"),
            "error: this is a bug of milpress: ValueError in packages.py, line ",
        ),
        (RecursionError("too deep"), "error: this is a bug of milpress: Rec"),
        (ImportError("no module"), "error: this is a bug of milpress: ImportErr"),
        (AssertionError(), "error: this is a bug of milpress: AssertionErr"),
        (KeyboardInterrupt(), "interrupted"),
    ],
    ids=lambda each: type(each).__name__ if isinstance(each, BaseException) else "",
)
def test_whatever_is_raised_is_one_line_and_never_exit_code_1(error, line, monkeypatch):
    monkeypatch.delenv("MILPRESS_TRACEBACK", raising=False)
    with mock.patch.object(inspection, "inspect", side_effect=error):
        said = failed("inspect", SEED, code=130 if line == "interrupted" else 2)
    assert said.startswith(line)
    assert said.isprintable()


def test_a_fault_says_where_and_how_to_report_it(monkeypatch):
    with mock.patch.object(inspection, "n_package_bytes", side_effect=KeyError("weight")):
        said = failed("inspect", SEED)
        assert "KeyError in inspection.py, line " in said
        assert said.endswith("please report it, with what MILPRESS_TRACEBACK=1 shows")
        monkeypatch.setenv("MILPRESS_TRACEBACK", "1")
        shown = run("inspect", SEED, code=2).stderr
    assert shown.startswith("Traceback (most recent call last):\n")
    assert shown.splitlines()[-1] == said


def test_wrong_usage_and_no_arguments_are_exit_code_2():
    assert "No such option" in run("inspect", SEED, "--nothing", code=2).stderr
    assert "Missing argument" in run("inspect", code=2).stderr
    assert "for '--palettize'" in run("compress", SEED, "x", "--palettize", "x", code=2).stderr


def test_so_many_threads_as_no_machine_has_are_refused(tmp_path):
    out = tmp_path / "out.mlpackage"
    line = failed("compress", SEED, out, *PALETTE, "--threads", 10**30)
    assert line == f"error: threads must be at most 4096, got {10**30}"
    recipe = milpress.Recipe.of(f.QuantizeConfig(), min_size=10)
    milpress.compress(SEED, out, recipe, threads=4096)


def test_numbers_beyond_all_bounds_are_refused():
    assert "a size must be one that" in failed("plan", SEED, "--target-size", "9" * 400)
    for value in ("nan", "inf", "1e400"):
        assert "must be a positive number" in failed("plan", SEED, "--target-bits", value)
    with pytest.raises(ConfigError, match="at most 1000000000 random samples, got 1000000000000"):
        milpress.RandomSamples(10**12)


@pytest.mark.parametrize("path", ["com.apple.CoreML/\\ud800", "\\udfff", "a\\u0000b"])
def test_a_path_in_the_manifest_that_no_file_can_have_is_refused(path, tmp_path):
    model = tmp_path / "model.mlpackage"
    model.mkdir()
    entries = f'"itemInfoEntries": {{"a": {{"path": "{path}"}}}}'
    (model / "Manifest.json").write_text(f'{{"rootModelIdentifier": "a", {entries}}}')
    assert "the name of a file must" in failed("inspect", model)


def test_a_file_is_written_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("old")
    files.write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    with (
        mock.patch.object(Path, "write_bytes", side_effect=OSError(errno.ENOSPC, "full")),
        pytest.raises(OSError, match="full"),
    ):
        files.write_whole(path, b"newer")
    link = tmp_path / "link"
    link.symlink_to(path)
    files.write_whole(link, b"newest")
    assert path.read_bytes() == b"newest"
    assert link.is_symlink()
    assert sorted(tmp_path.iterdir()) == [link, path]
    files.write_whole(Path(os.devnull), b"nothing")


def test_a_file_whose_writing_fails_is_as_it_was_and_nothing_lies_beside_it(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(draft: Path) -> None:
        draft.write_bytes(b"new")
        raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"), files.draft_in_place_of(path) as draft:
        write(draft)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    assert not files._drafts


def test_the_command_line_can_be_called_from_python_and_leaves_signals_as_they_were():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert run("--version").stdout == f"milpress {milpress.__version__}\n"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert Package(SEED).programs
    assert isinstance(sys.stdout, io.TextIOBase)
