"""Run a training script with prefix sharing.

Models that it loads by transformers' from_pretrained and trainers that it builds are enabled as
they come; the script itself stays as it is.

  hf-prefix-patch run train.py --learning_rate 5e-7
  hf-prefix-patch run --backend sdpa -m package.train --config dpo.yaml
  accelerate launch -m hf_prefix_patch run train.py
  torchrun --nproc-per-node 8 -m hf_prefix_patch run train.py

Processes that the script starts share too, through the variable HF_PREFIX_PATCH, which does the
same without this command: HF_PREFIX_PATCH=1 trl dpo ... Options here go before those that are set
there.
"""

from __future__ import annotations

import argparse
import atexit
import os
import shutil
import sys
from dataclasses import fields, replace

from hf_prefix_patch.options import count, json_object
from hf_prefix_patch.program import run_file, run_module
from hf_prefix_patch.switch import CHOICES, VARIABLE, LaunchOptions, switch_on


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "hf-prefix-patch run [options] (SCRIPT | -m MODULE) [ARGUMENTS ...]"
    parser.add_argument("-m", "--module", action="store_true", help="SCRIPT names a module")
    # Left out where they are not given: the variable may have them.
    options = parser.add_argument_group("sharing", argument_default=argparse.SUPPRESS)
    options.add_argument(
        "--backend",
        choices=CHOICES["backend"],
        metavar="NAME",
        help="attention backend: auto (default), torch_varlen, flash, sdpa or flex",
    )
    options.add_argument(
        "--no-verify",
        dest="verify",
        action="store_false",
        help="do not compare shared with unshared results",
    )
    options.add_argument(
        "--on-bypass",
        choices=CHOICES["on_bypass"],
        help="what a training call that cannot be shared does beside running unshared",
    )
    options.add_argument(
        "--on-refusal",
        choices=CHOICES["on_refusal"],
        help="what a trainer whose model cannot be shared does: raise (default), or warn and train "
        "unshared; models that no trainer takes always warn",
    )
    options.add_argument(
        "--log-metrics", action="store_true", help="add the sharing ratio to what trainers log"
    )
    options.add_argument(
        "--max-tokens-per-batch",
        type=count,
        metavar="N",
        help="training batches of at most so many unique tokens on each device",
    )
    options.add_argument(
        "--sampler-options",
        type=json_object,
        metavar="JSON",
        help="""how those are made: arguments of PrefixSharingBatchSampler, as '{"oversized": """
        """"skip"}'""",
    )
    options.add_argument(
        "--keep-groups",
        action="store_true",
        help="deal out the completions of a prompt together (GRPO, RLOO)",
    )
    parser.add_argument("script", metavar="SCRIPT", help="a Python file, or with -m a module")
    rest = parser.add_argument(
        "arguments", metavar="ARGUMENTS", nargs=argparse.REMAINDER, help="of the script"
    )
    rest.required = False  # or they are named where SCRIPT is missing


def main(arguments: argparse.Namespace) -> None:
    try:
        options = LaunchOptions.of_environment() or LaunchOptions()
    except ValueError as error:
        arguments.parser.error(str(error))
    names = {field.name for field in fields(options)}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    options = replace(options, **given)
    if options.sampler_options is not None and options.max_tokens_per_batch is None:
        arguments.parser.error(
            "--sampler-options are for the batches of --max-tokens-per-batch; give that too"
        )
    if not arguments.module and not os.path.isfile(arguments.script):
        message = f"no file {arguments.script!r}; give a Python file or, after -m, a module"
        if shutil.which(arguments.script):
            message += (
                ". For an installed command set the variable instead: "
                f"{VARIABLE}=1 {arguments.script} ..."
            )
        arguments.parser.error(message)
    os.environ[VARIABLE] = str(options)
    switch = switch_on(options)
    say = atexit.register(lambda: None if switch.used else _say_unused())
    try:
        (run_module if arguments.module else run_file)(arguments.script, _of_script(arguments))
    except BaseException as error:
        if not isinstance(error, SystemExit) or error.code:  # has something else to say
            atexit.unregister(say)
        raise


def _of_script(arguments: argparse.Namespace) -> list[str]:
    """The arguments of the script, of which argparse takes away a `--` that comes first."""
    given: list[str] = arguments.given
    start = len(given) - len(arguments.arguments)
    return given[start - (given[start - 1] == "--") :]


def _say_unused() -> None:
    if int(os.environ.get("RANK") or 0) == 0:
        print(
            "prefix sharing: this process loaded no model and built no trainer; processes that it "
            "started speak for themselves, if hf_prefix_patch is installed for their Python",
            file=sys.stderr,
        )
