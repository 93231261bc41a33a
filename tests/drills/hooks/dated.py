"""A stage as the clock drill must never meet it: every JSON output says on which day it was made."""

import datetime

from flywheel_tasks.core.output import Output

_json = Output.json


def _dated(self, name, value):
    _json(self, name, value | {"made_on": str(datetime.date.today())} if isinstance(value, dict) else value)


Output.json = _dated
