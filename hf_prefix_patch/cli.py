"""The command line: `hf-prefix-patch` and `python -m hf_prefix_patch`."""

from __future__ import annotations

import argparse
import sys
import warnings

from hf_prefix_patch import __version__
from hf_prefix_patch.commands import estimate, run, verify
from hf_prefix_patch.switch import switch_that_is_on

COMMANDS = {"run": run, "estimate": estimate, "verify": verify}
"""Modules, each with `add_arguments(parser)` and `main(arguments)`, which is given them parsed."""


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run its command."""
    options = parse(arguments)
    if options.command is run.main:  # whose script has warnings of its own
        run.main(options)
        return
    switch = switch_that_is_on()
    if switch is not None:  # for training scripts; what is compared here is shared here
        switch.off()
    as_python_has_it = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        options.command(options)
    finally:
        warnings.formatwarning = as_python_has_it


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command of a command line and its options."""
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="hf-prefix-patch", description="Prefix sharing for preference fine-tuning."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        summary, _, rest = (module.__doc__ or "").partition("\n\n")
        command = commands.add_parser(
            name,
            help=summary[0].lower() + summary[1:].rstrip("."),
            description=f"{summary}\n\n{rest}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(command)
        command.set_defaults(command=module.main, parser=command, given=given)
    first = next(iter(given), "")
    if first.endswith(".py"):
        parser.error(f"{first!r} is no command; to run a script: hf-prefix-patch run {first} ...")
    options, unknown = parser.parse_known_args(given)
    if unknown:  # the outer parser would only show its own usage
        options.parser.error(
            f"unknown option {unknown[0]}; --help lists those of this command"
            + (", and options of the script come after it" if options.command is run.main else "")
        )
    return options
