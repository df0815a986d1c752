"""The ``genkl`` command.

    main.py      the list of commands, exit codes, one line for an error
    parser.py    options from a function's signature and docstring
    progress.py  a bar on a terminal, lines in a log
    score.py, scan.py, info.py, ...    one file per command, one function of the same name
    data.py      the group ``genkl data``: one function per command

A command is a typed function with a docstring; the parser is made from both. It returns None or an
exit status, and raises to fail. Only the module of the command that was asked for is imported.
"""


class UsageError(Exception):
    """The command line is wrong in a way that its parser cannot see; exit status 2."""
