"""Runs at the start of every Python whose path has this folder: with FOEDUS_AUDIT=FILE, whatever that process executes,
compiles, imports, unpickles or starts is written there, by the interpreter's own audit hook (PEP 578).

One JSON list a line: process id, event, and what tells it apart. Hooks cannot be removed again, so nothing escapes it.
"""

import json
import os
import sys

SEEN_TEXT = 20_000
"""Characters kept of a text or a code object without a file."""
OFTEN = ("exec", "compile", "import", "open")
"""Written once for a process."""


def describe(event, arguments):
    """What tells the event apart; None for one that is of no interest."""
    if event == "exec":
        code = arguments[0]
        name = getattr(code, "co_filename", "")
        return [name, "" if name[:1] != "<" or "frozen" in name else contents(code)]
    if event == "compile":
        return [str(arguments[1]), str(arguments[0])[:SEEN_TEXT]]
    if event == "import":
        return [str(arguments[0]), str(arguments[1] or "")]
    if event == "open":
        return [str(arguments[0])]
    if event in ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.system", "ctypes.dlopen", "pickle.find_class"):
        return [str(argument)[:SEEN_TEXT] for argument in arguments[:2]]
    return None


def contents(code):
    """Names and constants of a code object, of those within it too."""
    within = [contents(each) if hasattr(each, "co_names") else repr(each) for each in code.co_consts]
    return " ".join([*code.co_names, *within])[:SEEN_TEXT]


def watch(path):
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    seen = set()

    def hook(event, arguments):
        what = describe(event, arguments)
        if what is not None:
            line = json.dumps([os.getpid(), event, *what]) + "\n"
            if line not in seen:
                os.write(descriptor, line.encode())
            if event in OFTEN:
                seen.add(line)

    sys.addaudithook(hook)


if os.environ.get("FOEDUS_AUDIT"):
    watch(os.environ["FOEDUS_AUDIT"])
