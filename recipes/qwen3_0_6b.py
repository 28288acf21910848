"""Qwen3-0.6B: three quarters of the KV heads on a window of 128, then the weights adapted to it.

Memory and time on 1 and 8 GPUs are in recipes/README.md.
"""

from consa.config import AdaptConfig, LearnConfig, RunConfig

SHAPE = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
RUN = RunConfig(model="Qwen/Qwen3-0.6B", data="hf:emozilla/pg19", max_tokens=2**28, num_heldout=32)
LEARN = LearnConfig(
    sparsity=0.75,
    granularity="kv_head",
    window=128,
    num_sink_tokens=4,
    seq_len=8192,
    num_steps=200,
    sequences_per_step=8,
    gradient_checkpointing=True,
)
ADAPT = AdaptConfig(
    method="full",
    learning_rate=2e-5,
    seq_len=8192,
    num_steps=1000,
    sequences_per_step=32,
    evaluate_every=100,
    checkpoint_every=100,
    gradient_checkpointing=True,
)
