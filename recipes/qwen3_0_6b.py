"""Qwen3-0.6B: three quarters of the KV heads on a window of 128, then the weights adapted to it.

28 layers, hidden size 1,024, 16 query and 8 KV heads of 128, feed-forward 3,072, vocabulary 151,936, output layer tied:
155.6 M (embeddings) + 28 x 15.73 M (layers) = 596.0 M parameters. GB are 10^9 bytes. Memory follows from the shapes,
save for what one layer keeps in its backward pass, which is an estimate, as is all of the time.

Shared by both phases, per GPU, at 8,192 tokens a micro-batch and with activation checkpointing:

    layer inputs     28 x 8,192 x 1,024 x 2 bytes                               0.5 GB
    one layer        about 80 KB per token x 8,192                              0.7 GB
    a logits chunk   2,048 x 151,936 x (2 + 2 bfloat16, 4 + 4 float32 bytes)    3.7 GB

Learning, 1 GPU. The weights are frozen: no gradients and no optimiser, but for 224 gates.

    weights          596.0 M x 2 bytes                                          1.2 GB
    in all           1.2 + 0.5 + 0.7 + 3.7                                      6.1 GB

Learning, 8 GPUs: the same on each; what is reduced is 225 numbers a step.

Adapting, 1 GPU.

    weights, masters, gradients, Adam    596.0 M x (2 + 4 + 4 + 8) bytes       10.7 GB
    in all                               10.7 + 0.5 + 0.7 + 3.7                15.6 GB

Distillation would add a frozen copy, 1.2 GB, and the teacher's chunk of logits. Adapting, 8 GPUs (ddp): as on 1.
A checkpoint has 596.0 M x (4 + 8) bytes = 7.2 GB, and twice that passes through the machine's memory.

Training keeps no KV cache. The hybrid's, at 32,768 tokens: 2 x 28 x 8 x 128 x 2 bytes x 32,768 = 3.76 GB dense;
a quarter of it, and 132 tokens of the other heads, are 0.95 GB.

Time (estimates, at 200 TFLOP/s, a fifth of what an H100 can do in bfloat16). FLOP per token and pass: 2 x 596.0 M
for the weights, 2 x 8,192 x 2,048 x 28 = 0.94 G for full attention. Backward counts as 2 passes through weights that
train, 1 through frozen ones and 2.5 through attention, recomputation as 1 more.

    learning     6 x 0.596 + 4.5 x 0.94 = 7.8 GFLOP, 26,000 tokens/s; 200 x 8 x 8,192 = 13.1 M tokens
                 1 GPU: 8.5 minutes; 8 GPUs: about 1.2 minutes; and half a minute of refinement on each
    adapting     8 x 0.596 + 4.5 x 0.94 / 4 = 5.8 GFLOP, 34,000 tokens/s; 1,000 x 32 x 8,192 = 262 M tokens
                 1 GPU: 2.1 hours; 8 GPUs: about 18 minutes
"""

from consa.config import AdaptConfig, LearnConfig, RunConfig

RUN = RunConfig(model="Qwen/Qwen3-0.6B", data="hf:emozilla/pg19", max_tokens=2**28, num_heldout=32)
LEARN = LearnConfig(
    sparsity=0.75,
    granularity="kv_head",
    window=128,
    num_sink_tokens=4,
    seq_len=8192,
    num_steps=200,
    sequences_per_step=8,
    activation_checkpointing=True,
)
ADAPT = AdaptConfig(
    method="full",
    learning_rate=2e-5,
    seq_len=8192,
    num_steps=1000,
    sequences_per_step=32,
    evaluate_every=100,
    checkpoint_every=100,
    activation_checkpointing=True,
)
