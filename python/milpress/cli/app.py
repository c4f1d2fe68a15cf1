"""The commands, in the order that `--help` lists them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from milpress._version import __version__
from milpress.cli import measuring, packages, planning, running, tuning


class Command(typer.core.TyperCommand):
    """A command whose help groups options by task.

    Typer groups them only where it formats with rich, which reads brackets as markup.
    """

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write a section for each group."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            is_argument = parameter.param_type_name == "argument"
            default = "Arguments" if is_argument else "Help"
            heading = getattr(parameter, "rich_help_panel", None) or default
            if record is not None:
                sections.setdefault(heading, []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def _typer(**settings: Any) -> typer.Typer:
    return typer.Typer(no_args_is_help=True, rich_markup_mode=None, **settings)


app = _typer(
    help="Make Core ML models smaller, and prove that they still work.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
_bench = _typer(name="bench", help="Measure packages on a Mac, an iPhone or the CPU.")

_COMMANDS: dict[str, Callable[..., None]] = {
    "inspect": packages.inspect,
    "compress": packages.compress,
    "decompress": packages.decompress,
    "verify": packages.verify,
    "plan": planning.plan,
    "lint": planning.lint,
    "rescale": planning.rescale,
    "tune": tuning.tune,
    "run": running.run,
    "evaluate": running.evaluate,
    "report": measuring.report,
}
_BENCH: dict[str, Callable[..., None]] = {
    "run": measuring.run_packages,
    "suite": measuring.run_suite,
    "compare": measuring.compare_results,
    "validate": measuring.validate_results,
}
for _group, _commands in ((app, _COMMANDS), (_bench, _BENCH)):
    for _name, _command in _commands.items():
        _group.command(_name, cls=Command)(_command)
app.add_typer(_bench)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"milpress {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def call() -> int:
    """Call the command that this process was given; what goes wrong is raised.

    Returns
    -------
    int
        The exit code that a command asks for.
    """
    code = typer.main.get_command(app).main(standalone_mode=False)
    return code if isinstance(code, int) else 0
