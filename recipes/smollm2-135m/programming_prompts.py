"""Questions about Python that the standard library's own documentation gives: `python programming_prompts.py > FILE`.

Functions are asked for, explained and documented; module descriptions are summarised. The texts are the installed Python's
docstrings and sources (PSF licence), so another Python version gives slightly other prompts.
"""

import importlib
import inspect
import json
import random
import sys
import textwrap

MODULES = [
    "argparse",
    "bisect",
    "calendar",
    "collections",
    "colorsys",
    "configparser",
    "contextlib",
    "copy",
    "csv",
    "dataclasses",
    "datetime",
    "difflib",
    "enum",
    "fnmatch",
    "fractions",
    "functools",
    "getpass",
    "glob",
    "graphlib",
    "gzip",
    "hashlib",
    "heapq",
    "html",
    "http.client",
    "imaplib",
    "inspect",
    "ipaddress",
    "json",
    "keyword",
    "linecache",
    "locale",
    "logging",
    "mimetypes",
    "netrc",
    "numbers",
    "operator",
    "optparse",
    "os",
    "os.path",
    "pathlib",
    "pickle",
    "pkgutil",
    "platform",
    "plistlib",
    "poplib",
    "pprint",
    "queue",
    "quopri",
    "random",
    "reprlib",
    "sched",
    "secrets",
    "shelve",
    "shlex",
    "shutil",
    "smtplib",
    "socket",
    "sqlite3",
    "stat",
    "statistics",
    "string",
    "subprocess",
    "tarfile",
    "tempfile",
    "textwrap",
    "threading",
    "timeit",
    "token",
    "tokenize",
    "traceback",
    "types",
    "unittest",
    "urllib.parse",
    "urllib.request",
    "uuid",
    "warnings",
    "wave",
    "weakref",
    "zipfile",
]


def functions(module):
    """Documented public functions and methods of a module, with their dotted names."""
    for name, thing in vars(module).items():
        if name.startswith("_") or getattr(thing, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(thing):
            yield f"{module.__name__}.{name}", thing
        elif inspect.isclass(thing):
            for method, body in vars(thing).items():
                if not method.startswith("_") and inspect.isfunction(body):
                    yield f"{module.__name__}.{name}.{method}", body


def prompts():
    """Every prompt, in a fixed order."""
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        text = inspect.getdoc(module)
        if text and 300 < len(text) < 3500:
            yield f"Summarize: {text}"
        for name, function in functions(module):
            text = inspect.getdoc(function)
            if not text or len(text) < 40:
                continue
            first = " ".join(text.split("\n\n")[0].split()).rstrip(".")
            yield f"What does `{name}` do in Python? Give a short example."
            yield f"Write a Python function with this description: {first}."
            try:
                source = inspect.getsource(function)
            except (OSError, TypeError):
                continue
            if 200 < len(source) < 1500:
                yield f"Explain what this Python code does:\n\n```python\n{textwrap.dedent(source).rstrip()}\n```"


if __name__ == "__main__":
    everything = sorted(set(prompts()))
    random.Random(0).shuffle(everything)
    for prompt in everything:
        sys.stdout.write(json.dumps({"source": "python-stdlib", "prompt": prompt}) + "\n")
