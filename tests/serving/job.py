"""A process of its own that generates with vLLM: JSON of folder, engine options and prompts in, JSON of tokens out.

For what would outlast its engine in the process of the tests: vLLM's transformers backend changes transformers, and a
rank of several binds its threads to a core.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tests.serving.engine import engine, generate, groups

if __name__ == "__main__":
    job = json.loads(sys.stdin.read())
    os.environ |= job["environment"]
    with engine(Path(job["folder"]), **job["options"]) as llm:
        found = {"tokens": generate(llm, job["prompts"])}
        if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0":
            found["groups"] = groups(llm)
    print(json.dumps(found), flush=True)
