"""One variant, as a job file describes it: `python -m roomplan_lib.training.benchmark JOB.json RESULT.json`."""

import json
import sys
from pathlib import Path

from roomplan_lib.files import write_whole
from roomplan_lib.training.benchmark.measure import measure

write_whole(sys.argv[2], json.dumps(measure(json.loads(Path(sys.argv[1]).read_text()))))
