"""Every command, one line each. Whatever is heavy is imported inside the command that needs it."""

from __future__ import annotations

import typer

from tropism.cli.label import label
from tropism.cli.models import evaluate, sample
from tropism.cli.plan import plan
from tropism.cli.play import play
from tropism.cli.runs import doctor, train, view
from tropism.cli.show import diff, envs, methods

app = typer.Typer(
    help="Reward-based learning for language models.",
    epilog="With --debug, or TROPISM_DEBUG=1, any command shows the traceback of an error.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("train")(train)
app.command("eval")(evaluate)
app.command("sample")(sample)
app.command("play")(play)
app.command("label")(label)
app.command("methods")(methods)
app.command("envs")(envs)
app.command("diff")(diff)
app.command("doctor")(doctor)
app.command("plan")(plan)
app.command("view")(view)
