"""`rr-flex completion`: a completion script for the user's shell, made from the parser itself."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rr_flex.cli.arguments import DONE, add_command

EXAMPLES = """
examples:
  rr-flex completion bash > ~/.local/share/bash-completion/completions/rr-flex
  rr-flex completion zsh > ~/.zfunc/_rr-flex        (with ~/.zfunc in $fpath)
  rr-flex completion fish > ~/.config/fish/completions/rr-flex.fish
"""


@dataclass(frozen=True, kw_only=True)
class Flag:
    names: tuple[str, ...]  # empty for a positional argument
    help: str
    takes_value: bool
    choices: tuple[str, ...]
    is_file: bool


def add_to(commands: argparse._SubParsersAction) -> None:
    completion = add_command(
        commands,
        "completion",
        run,
        help="a completion script for bash, zsh or fish",
        description="Prints a completion script for a shell.",
        examples=EXAMPLES,
    )
    completion.add_argument("shell", choices=sorted(SCRIPTS))


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    print(SCRIPTS[arguments.shell](parser))
    return DONE


def subcommands(parser: argparse.ArgumentParser) -> dict[str, tuple[str, list[Flag]]]:
    """By name: its help, and its arguments."""
    (action,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
    return {name: (helps[name], list(flags(command))) for name, command in action.choices.items()}


def flags(parser: argparse.ArgumentParser) -> Iterator[Flag]:
    for action in parser._actions:
        if action.help == argparse.SUPPRESS:
            continue
        text = (action.help or "") % {**vars(action), "prog": parser.prog}
        # --json takes a file, or nothing.
        is_file = action.type is Path or (action.metavar == "FILE" and action.nargs == "?")
        yield Flag(
            names=tuple(action.option_strings),
            help=text,
            takes_value=action.nargs != 0,
            choices=tuple(str(choice) for choice in action.choices or ()),
            is_file=is_file,
        )


def bash(parser: argparse.ArgumentParser) -> str:
    commands = subcommands(parser)
    values, words = [], []
    for command, (_, arguments) in commands.items():
        for flag in arguments:
            if flag.names and flag.takes_value:
                pattern = "|".join(f"'{command} {name}'" for name in flag.names)
                reply = f"COMPREPLY=({complete(flag)});" if flag.choices or flag.is_file else ""
                values.append(f"    {pattern}) {reply} return ;;")
        names = " ".join(name for flag in arguments for name in flag.names)
        replies = [f'$(compgen -W "{names}" -- "$current")']
        replies += [complete(flag) for flag in arguments if not flag.names]
        words.append(f"    {command}) COMPREPLY=({' '.join(replies)}) ;;")
    return "\n".join(
        [
            "# bash completion of rr-flex",
            "_rr_flex() {",
            "  local current=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} command=${COMP_WORDS[1]}",
            "  if (( COMP_CWORD == 1 )); then",
            f'    COMPREPLY=($(compgen -W "--help --version {" ".join(commands)}" -- "$current")); return',
            "  fi",
            '  case "$command $before" in',
            *values,
            "  esac",
            '  case "$command" in',
            *words,
            "  esac",
            "}",
            "complete -o filenames -F _rr_flex rr-flex",
        ]
    )


def complete(flag: Flag) -> str:
    """The words that bash offers as an argument's value."""
    if flag.choices:
        return f'$(compgen -W "{" ".join(flag.choices)}" -- "$current")'
    return '$(compgen -f -- "$current")' if flag.is_file else ""


def zsh(parser: argparse.ArgumentParser) -> str:
    commands = subcommands(parser)
    named = " ".join(quoted(f"{name}:{help}") for name, (help, _) in commands.items())
    lines = ["#compdef rr-flex", "_rr_flex() {", "  local -a commands", f"  commands=({named})"]
    lines += ["  if (( CURRENT == 2 )); then _describe command commands; return; fi"]
    lines += ["  local command=$words[2]", "  shift words; (( CURRENT-- ))", '  case "$command" in']
    for command, (_, arguments) in commands.items():
        lines.append(f"    {command}) _arguments {' '.join(zsh_spec(flag) for flag in arguments)} ;;")
    return "\n".join([*lines, "  esac", "}", '_rr_flex "$@"'])


def zsh_spec(flag: Flag) -> str:
    value = f"({' '.join(flag.choices)})" if flag.choices else "_files" if flag.is_file else ""
    if not flag.names:
        return quoted(f"*: :{value}")
    about = flag.help.replace("[", "\\[").replace("]", "\\]").replace(":", "\\:")
    return " ".join(quoted(f"{name}[{about}]" + (f": :{value}" if flag.takes_value else "")) for name in flag.names)


def fish(parser: argparse.ArgumentParser) -> str:
    commands = subcommands(parser)
    lines = ["# fish completion of rr-flex", "complete -c rr-flex -f"]
    for name, (help, arguments) in commands.items():
        lines.append(f"complete -c rr-flex -n __fish_use_subcommand -a {name} -d {quoted(help)}")
        for flag in arguments:
            parts = [f"complete -c rr-flex -n '__fish_seen_subcommand_from {name}'"]
            for option in flag.names:
                parts.append(f"-l {option[2:]}" if option.startswith("--") else f"-s {option[1:]}")
            if flag.is_file:
                parts.append("-r -F" if flag.names else "-F")
            elif flag.choices:
                parts.append(f"{'-x ' if flag.names else ''}-a {quoted(' '.join(flag.choices))}")
            elif flag.names and flag.takes_value:
                parts.append("-x")
            elif not flag.names:
                continue
            lines.append(" ".join([*parts, f"-d {quoted(flag.help)}"]))
    return "\n".join(lines)


def quoted(text: str) -> str:
    """For bash, zsh and fish alike, which differ in what a quote within quotes may be."""
    return "'" + text.replace("'", "’") + "'"


SCRIPTS = {"bash": bash, "zsh": zsh, "fish": fish}
