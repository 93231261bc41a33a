"""Every wall clock of the process, $DRILL_CLOCK_DAYS away from the true one.

`datetime` and `date` keep their identity, so that isinstance and pickling go on as before: their methods are
exchanged. Only numpy's own "now" reads the machine's clock behind their back.
"""

import ctypes
import datetime
import gc
import os
import time

_OFFSET = int(float(os.environ.get("DRILL_CLOCK_DAYS", "0")) * 86_400)
_time, _time_ns, _localtime, _gmtime = time.time, time.time_ns, time.localtime, time.gmtime
_asctime, _strftime = time.asctime, time.strftime


def _exchange(kind, name, function):
    gc.get_referents(kind.__dict__)[0][name] = classmethod(function)
    ctypes.pythonapi.PyType_Modified(ctypes.py_object(kind))


def _at(seconds):
    return time.time() if seconds is None else seconds


time.time = lambda: _time() + _OFFSET
time.time_ns = lambda: _time_ns() + _OFFSET * 1_000_000_000
time.localtime = lambda seconds=None: _localtime(_at(seconds))
time.gmtime = lambda seconds=None: _gmtime(_at(seconds))
time.ctime = lambda seconds=None: time.asctime(_localtime(_at(seconds)))
time.asctime = lambda moment=None: _asctime(time.localtime() if moment is None else moment)
time.strftime = lambda form, moment=None: _strftime(form, time.localtime() if moment is None else moment)
_exchange(datetime.datetime, "now", lambda kind, tz=None: kind.fromtimestamp(time.time(), tz))
_exchange(datetime.datetime, "utcnow", lambda kind: kind.fromtimestamp(time.time(), datetime.UTC).replace(tzinfo=None))
_exchange(datetime.date, "today", lambda kind: kind.fromtimestamp(time.time()))
