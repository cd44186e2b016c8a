"""`rr-flex completion`: a completion script for the user's shell, made from the parser by shtab."""

import argparse

from rr_flex.cli.arguments import DONE, add_command, told

SHELLS = ("bash", "fish", "tcsh", "zsh")

EXAMPLES = """
examples:
  rr-flex completion bash > ~/.local/share/bash-completion/completions/rr-flex
  rr-flex completion zsh > ~/.zfunc/_rr-flex        (with ~/.zfunc in $fpath)
  rr-flex completion fish > ~/.config/fish/completions/rr-flex.fish
"""


def add_to(commands: argparse._SubParsersAction) -> None:
    about = {"help": "a completion script for a shell", "description": "Prints a completion script for a shell."}
    completion = add_command(commands, "completion", run, EXAMPLES, **about)
    completion.add_argument("shell", choices=SHELLS)


def run(arguments: argparse.Namespace) -> int:
    with told():
        import shtab
    from rr_flex import registry

    registry.fill()
    rules = {"budget": registry.BUDGETS, "pool": registry.ESTIMATORS}
    for command in subcommands(arguments.parser).values():
        for action in command._actions:
            if action.dest in rules:  # not checked by the parser: help would need the rules' modules, and so torch
                action.choices = list(rules[action.dest])
            if set(str(action.metavar).split("|")) & {"FILE", "PNG", "HTML", "RUN.json"}:
                action.complete = shtab.FILE
    print(shtab.complete(arguments.parser, arguments.shell))
    return DONE


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (action,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return action.choices
