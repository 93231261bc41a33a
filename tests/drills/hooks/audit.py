"""Writes down every unpickling of the process: by whom of the product, by way of which files, and of what.

Python's own audit event tells of classes only, so the doors of `pickle` are watched as well: a list of plain numbers
comes in without any class.
"""

import os
import pickle
import sys

_CALLS = os.environ["DRILL_AUDIT"]
_PRODUCT = os.environ["DRILL_AUDIT_OF"].rstrip(os.sep) + os.sep
_seen = set()


def _note(what):
    frame, between, own = sys._getframe(2), [], ""
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_PRODUCT):
            own = f"{name}:{frame.f_code.co_name}"
            break
        if name not in between and name not in (pickle.__file__, __file__):
            between.append(name)
        frame = frame.f_back
    line = "\t".join([own, what, " ".join(between if own else between[:3])])
    if line not in _seen:
        _seen.add(line)
        with open(_CALLS, "a") as file:
            file.write(f"{line}\n")


class _Door:
    """A function of `pickle`, watched. Unlike a function it is no method where a class keeps it."""

    def __init__(self, name):
        self._name, self._real = name, getattr(pickle, name)
        self.__module__ = "pickle"

    def __call__(self, *arguments, **named):
        _note(f"pickle.{self._name}")
        return self._real(*arguments, **named)

    def __reduce__(self):
        return self._name


class Unpickler(pickle.Unpickler):
    def load(self):
        _note("pickle.Unpickler.load")
        return super().load()


def _by_hand(self, _load=pickle._Unpickler.load):
    _note("pickle._Unpickler.load")
    return _load(self)


def _hook(event, arguments):
    if event == "pickle.find_class":
        _note(f"{arguments[0]}.{arguments[1]}")


sys.addaudithook(_hook)
Unpickler.__module__ = "pickle"
pickle.load, pickle.loads, pickle.Unpickler, pickle._Unpickler.load = _Door("load"), _Door("loads"), Unpickler, _by_hand
