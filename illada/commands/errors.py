"""Errors in the words of whoever typed the command: options under their own names, wrong usage told apart."""

import re

from typer.core import TyperArgument, TyperCommand

# Arguments of the functions that commands call, where the option that sets them has another name.
OTHER_NAMES = {
    "max_denoising_steps": "--steps",
    "num_rounds": "--rounds",
    "path": "--trace",
    "repo_id": "--push",
    "source": "--model",
    "stop_strings": "--stop",
}


class CommandError(Exception):
    """The work failed; the message is one line."""

    exit_code = 1


class WrongUsage(CommandError):
    """What was typed cannot be done."""

    exit_code = 2


class Command(TyperCommand):
    """A command whose errors name arguments as they are typed: `--top-p` for `top_p`, `PROMPT` for `prompt`.

    An error whose message begins with an argument of the command is wrong usage: so do the package's errors about
    arguments.
    """

    def parse_args(self, context, args):
        """Adds to an error about a value, which the parser's own leaves out, the value."""
        typed = list(args)
        try:
            return super().parse_args(context, args)
        except Exception as error:
            parameter = getattr(error, "param", None)
            value = None if parameter is None else _typed_value(parameter, typed)
            if value is None:
                raise
            reason = error.message.rstrip(".")
            raise WrongUsage(f"`{_name(parameter)}`: {reason[0].lower()}{reason[1:]}, got {value!r}.") from error

    def invoke(self, context):
        try:
            return super().invoke(context)
        except (CommandError, ValueError, OSError, ImportError) as error:
            message, begins_with_argument = self._as_typed(" ".join(str(error).split()) or type(error).__name__)
            is_usage = begins_with_argument and isinstance(error, (ValueError, FileNotFoundError))
            kind = WrongUsage if is_usage or isinstance(error, WrongUsage) else CommandError
            raise kind(message) from error

    def _as_typed(self, message: str) -> tuple[str, bool]:
        """The message with the names that were typed, and whether one of them begins it."""
        typed = {parameter.name: _name(parameter) for parameter in self.params}
        options = set(typed.values())
        typed |= {name: option for name, option in OTHER_NAMES.items() if option in options and name not in typed}
        names = "|".join(map(re.escape, typed))
        message = re.sub(f"`({names})`", lambda name: f"`{typed[name[1]]}`", message)
        return message, any(message.startswith(f"`{option}`") for option in options)


def _name(parameter) -> str:
    """An option's long form, an argument's name in the help."""
    return parameter.name.upper() if isinstance(parameter, TyperArgument) else max(parameter.opts, key=len)


def _typed_value(parameter, args: list[str]) -> str | None:
    """The last value that was typed for an option."""
    for index in reversed(range(len(args))):
        option, equals, value = args[index].partition("=")
        if option in parameter.opts:
            return value if equals else next(iter(args[index + 1 :]), None)
    return None
