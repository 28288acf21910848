"""Qwen3-1.7B: as Qwen3-0.6B, adapted at half the learning rate, with the layers' weights sharded over the GPUs.

Memory and time on 1 and 8 GPUs are in recipes/README.md.
"""

from dataclasses import replace

from recipes import qwen3_0_6b as smaller

SHAPE = smaller.SHAPE | {"hidden_size": 2048, "intermediate_size": 6144}
RUN = replace(smaller.RUN, model="Qwen/Qwen3-1.7B")
LEARN = smaller.LEARN
ADAPT = replace(smaller.ADAPT, learning_rate=1e-5, parallel="fsdp")
