"""The one exception that means "the user can mend this": it is shown as a single line, without a traceback."""


class UserError(ValueError):
    """A mistake in what was asked for: settings, model, data or folder.

    The message is one line that says what was given, what was expected and what to do next. The command line turns
    it into exit code 2; from Python it is an ordinary `ValueError`.
    """
