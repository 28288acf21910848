"""Join the parts that a study wrote with `--share` into one file.

    python -m research.merge PART.json [PART.json ...] --out research/results/methods.json

To divide what is left in another way, start each part from a copy of the joined file.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from benchmarks.common import parser_of, write_json


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("parts", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    first, *others = (json.loads(part.read_text()) for part in options.parts)
    for part, record in zip(options.parts[1:], others, strict=True):
        for name in ("settings", "hardware", "versions"):
            if record[name] != first[name]:
                raise SystemExit(f"{part}: {name} is {record[name]}, but {first[name]} in {options.parts[0]}")
        first["rows"] |= record["rows"]
    command = re.sub(r"--share([ =])\d+/", r"--share\1I/", first["command"])
    first["command"] = re.sub(r"--out([ =])\S+", rf"--out\g<1>{options.out}", command)
    write_json(options.out, first)
    print(f"{len(first['rows'])} rows in {options.out}")


if __name__ == "__main__":
    main()
