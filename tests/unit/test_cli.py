"""The command line: what it prints, and how it ends."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import MILPRESS, failed, process, run

from milpress.mil.package import Package


def test_inspect_lists_weights_and_ops(crepe_tiny):
    shown = run("inspect", crepe_tiny).stdout
    assert "main (iOS16); 38 weights with 487,096 elements" in shown
    assert "model_classifier_weight_to_fp16" in shown
    assert "batch_norm 6" in shown
    data = json.loads(run("inspect", crepe_tiny, "--json").stdout)
    assert data["functions"] == [{"name": "main", "target": "iOS16"}]
    assert sum(weight["n_bytes"] for weight in data["weights"]) == 2 * 487_096


@pytest.mark.parametrize(
    "options",
    [
        ["--quantize", "int8"],
        ["--quantize", "uint8", "--per-tensor", "--offset"],
        ["--palettize", "4"],
        ["--prune", "0.5"],
        ["--palettize", "3", "--group-size", "16", "--upgrade-to", "iOS18"],
        ["--quantize", "int4", "--block-size", "32", "--upgrade-to", "iOS18"],
        ["--quantize", "int4", "--per-channel", "--upgrade-to", "iOS18"],
    ],
)
def test_compress_verify_and_decompress_in_a_row(crepe_tiny, tmp_path, options):
    small, dense = tmp_path / "small.mlpackage", tmp_path / "dense.mlpackage"
    shown = run("compress", crepe_tiny, small, *options, "--threads", 1).stdout
    assert shown.startswith("Compressed 7 of 7 selected weights: ")
    why = "at most 2,048 elements; see --weight-threshold"
    assert f"31 other tensors left as they are ({why})" in shown
    assert "verified and written to" in shown
    assert "verified: 7 weights decoded" in run("verify", crepe_tiny, small).stdout
    run("decompress", small, dense)
    assert "SNR exact" in run("verify", small, dense).stdout
    data = json.loads(run("compress", crepe_tiny, small, *options, "--force", "--json").stdout)
    assert (data["asked"], data["compressed"], data["left"]) == (7, 7, 0)
    assert data["verified"] is True


def test_a_recipe_file_is_followed(crepe_tiny, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        """
version: 1
target: iOS18
steps:
  - palettize: {bits: 4, group_size: 16}
    rules:
      - {op_types: [linear], quantize: {dtype: int8}}
      - {name: "glob:*conv1_*", keep: true}
"""
    )
    out = tmp_path / "out.mlpackage"
    data = json.loads(run("compress", crepe_tiny, out, "--recipe", recipe, "--json").stdout)
    treatments = {weight["name"]: weight["treatment"] for weight in data["weights"]}
    assert treatments["model_classifier_weight_to_fp16"] == "quantize int8, per channel"
    assert treatments["model_conv1_weight_to_fp16"] == ""
    assert treatments["model_conv6_weight_to_fp16"] == "palettize 4 bits, group size 16"


def test_a_dry_run_prints_the_plan_and_writes_nothing(crepe_tiny, tmp_path):
    out = tmp_path / "out.mlpackage"
    shown = run("compress", crepe_tiny, out, "--palettize", 4, "--dry-run").stdout
    assert "dry run: nothing was written" in shown
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            [],
            "nothing to do: give one of --palettize, --quantize, --prune, --recipe, --target-bits",
        ),
        (["--palettize", 4, "--prune", 0.5], "--palettize and --prune can't be combined"),
        (["--palettize", 5], "bits must be one of (1, 2, 3, 4, 6, 8), got 5"),
        (["--quantize", "int4"], "which suits the GPU"),
        (["--quantize", "int5"], "dtype must be one of"),
        (
            ["--quantize", "int8", "--group-size", 4],
            "--group-size has no effect without --palettize",
        ),
        (["--prune", 1.5], "sparsity must be from 0 to 1, got 1.5"),
        (["--palettize", 4, "--group-size", 0], "group_size must be at least 1, got 0"),
        (["--palettize", 4, "--group-size", 16], "raise it with --upgrade-to iOS18"),
        (["--quantize", "int8", "--upgrade-to", "iOS99"], "a target must be one of"),
        (["--recipe", "/nowhere.yaml"], "/nowhere.yaml: no such file"),
        (["--quantize", "int8", "--weight-threshold", 10**9], "no weight can be compressed"),
    ],
)
def test_a_wrong_setting_is_one_sentence_and_exit_code_2(crepe_tiny, tmp_path, options, message):
    assert message in failed("compress", crepe_tiny, tmp_path / "out.mlpackage", *options)
    assert not list(tmp_path.iterdir())


def test_int4_advice_names_gpu_and_neural_engine(crepe_tiny, tmp_path):
    line = failed("compress", crepe_tiny, tmp_path / "out.mlpackage", "--quantize", "int4")
    assert "GPU" in line
    assert "Neural Engine" in line


def test_a_missing_model_is_one_sentence_for_every_command(tmp_path):
    missing, out = tmp_path / "none.mlpackage", tmp_path / "out.mlpackage"
    for arguments in (
        ["inspect", missing],
        ["compress", missing, out, "--palettize", 4],
        ["decompress", missing, out],
        ["verify", missing, missing],
    ):
        assert failed(*arguments).startswith(f"error: {missing}: no such package")


def test_a_failed_verification_is_exit_code_1(crepe_tiny, tmp_path):
    out = tmp_path / "out.mlpackage"
    run("compress", crepe_tiny, out, "--quantize", "int8")
    weights = out / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    data = bytearray(weights.read_bytes())
    data[-4:] = bytes(byte ^ 0x7F for byte in data[-4:])
    weights.write_bytes(data)
    assert "changed, though the record says" in failed("verify", crepe_tiny, out, code=1)


def hostile(source: Path, out: Path) -> Path:
    """Rename a weight to what would colour, erase or break lines of a terminal."""
    shutil.copytree(source, out)
    package = Package(out)
    (block,) = package.model.mlProgram.functions["main"].block_specializations.values()
    name, evil = "model_conv6_weight_to_fp16", "[/red][bold]\x1b[2J\r\nevil\u202e"
    for op in block.operations:
        for output in op.outputs:
            output.name = evil if output.name == name else output.name
        for argument in op.inputs.values():
            for binding in argument.arguments:
                if binding.name == name:
                    binding.name = evil
    package.model_path.write_bytes(package.model.SerializeToString())
    return out


def test_names_from_a_package_do_not_steer_the_terminal(crepe_tiny, tmp_path):
    model = hostile(crepe_tiny, tmp_path / "hostile.mlpackage")
    out = tmp_path / "out.mlpackage"
    for arguments in (
        ["inspect", model],
        ["compress", model, out, "--quantize", "int8"],
        ["verify", model, out],
    ):
        shown = run(*arguments).stdout
        assert "\x1b" not in shown
        assert "\u202e" not in shown
        assert "[/red][bold]" in shown.replace("\n", "")
    line = failed("compress", model, out, "--palettize", 4, "--group-size", 4)
    assert "\x1b" not in line


def test_progress_is_shown_on_a_terminal_only(crepe_tiny, tmp_path):
    out = tmp_path / "out.mlpackage"
    leader, follower = pty.openpty()
    command = [*MILPRESS, "compress", str(crepe_tiny), str(out), "--palettize", "8"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=follower, check=True)
    os.close(follower)
    assert b"Compressed 7 of 7" in done.stdout
    assert os.read(leader, 1 << 16)
    os.close(leader)
    assert run("compress", crepe_tiny, out, "--palettize", 8, "--force").stderr == ""


def test_a_process_ends_with_the_code_of_the_command(crepe_tiny, tmp_path):
    out = tmp_path / "out.mlpackage"
    done = process("compress", crepe_tiny, out, "--palettize", 8)
    assert (done.returncode, done.stderr) == (0, "")
    assert "verified and written to" in done.stdout
    for code, arguments in (
        (1, ["verify", out, crepe_tiny]),
        (2, ["inspect", tmp_path / "none.mlpackage"]),
        (2, ["compress", crepe_tiny, out, "--palettize", 8]),
        (2, ["compress", crepe_tiny, out, "--nothing"]),
    ):
        done = process(*arguments)
        assert done.returncode == code, done.stderr
        assert done.stdout == ""
        assert "Traceback" not in done.stderr


def test_help_and_version():
    assert "compress" in run("--help").stdout
    assert "--group-size" in run("compress", "--help").stdout
    assert run("--version").stdout.startswith("milpress 0.")


@pytest.mark.parametrize(
    "command",
    [
        [],
        *([name] for name in ("inspect", "compress", "decompress", "verify", "plan", "lint")),
        *([name] for name in ("rescale", "tune", "run", "evaluate", "report", "bench")),
        *(["bench", name] for name in ("run", "suite", "compare", "validate")),
    ],
    ids=" ".join,
)
def test_help_has_a_heading_for_each_task_and_cuts_no_sentence(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = run(*command, "--help").stdout
    assert not re.search(r"\w\.\.\.$", shown, re.MULTILINE)
    assert max(map(len, shown.splitlines())) <= 80
    if command not in ([], ["bench"]):
        assert "\nHelp:\n  --help" in shown
        assert "\nOptions:" not in shown
    if command == ["compress"]:
        headings = [line for line in shown.splitlines() if line.endswith(":") and line[0] != " "]
        assert headings[:4] == ["Arguments:", "Palettization:", "Quantization:", "Pruning:"]


HEAVY = ("coremltools", "torch", "sklearn", "scipy", "yaml", "jinja2")


def test_import_and_inspect_load_nothing_heavy(crepe_tiny):
    code = f"""
import sys, milpress
assert not set({HEAVY}) & set(sys.modules), "import milpress"
sys.argv = ["milpress", "inspect", {str(crepe_tiny)!r}]
from milpress.cli import root
assert root.run() == 0
assert not set({HEAVY}) & set(sys.modules), "milpress inspect"
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
