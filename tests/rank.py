"""One rank of an MPI job: a Service that gets the calls of a file, as DJLServing gives them.

Arguments: the file, a line of JSON a call, which is a list of bodies; a file for the answers, to
which the rank is added; the properties of the first call as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from handler.config import read_configuration
from handler.ranks import world_of
from handler.service import Service


def main(calls: str, answers: str) -> None:
    service = Service()
    configuration = read_configuration(environment=os.environ)
    service.load(configuration)
    if world_of().rank and configuration.use_passive_workers:
        service.close()  # when rank 0 does
        return
    with open(f"{answers}.{world_of().rank}", "w") as file:
        for line in Path(calls).read_text().splitlines():
            bodies = [json.dumps(body).encode() for body in json.loads(line)]
            got: list[Any] = [
                json.loads(reply.body) for reply in service.answer_on_all_ranks(bodies)
            ]
            file.write(json.dumps(got) + "\n")
            file.flush()
    service.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
