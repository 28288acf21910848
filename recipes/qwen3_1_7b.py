"""Qwen3-1.7B: three quarters of the KV heads on a window of 128, then the weights adapted to it.

28 layers, hidden size 2,048, 16 query and 8 KV heads of 128, feed-forward 6,144, vocabulary 151,936, output layer tied:
311.2 M (embeddings) + 28 x 50.34 M (layers) = 1,720.6 M parameters. GB are 10^9 bytes. Memory follows from the shapes,
save for what one layer keeps in its backward pass, which is an estimate, as is all of the time.

Shared by both phases, per GPU, at 8,192 tokens a micro-batch and with activation checkpointing:

    layer inputs     28 x 8,192 x 2,048 x 2 bytes                               0.9 GB
    one layer        about 130 KB per token x 8,192                             1.1 GB
    a logits chunk   2,048 x 151,936 x (2 + 2 bfloat16, 4 + 4 float32 bytes)    3.7 GB

Learning, 1 GPU. The weights are frozen: no gradients and no optimiser, but for 224 gates.

    weights          1,720.6 M x 2 bytes                                        3.4 GB
    in all           3.4 + 0.9 + 1.1 + 3.7                                      9.1 GB

Learning, 8 GPUs: the same on each; what is reduced is 225 numbers a step.

Adapting, 1 GPU.

    weights, masters, gradients, Adam    1,720.6 M x (2 + 4 + 4 + 8) bytes     31.0 GB
    in all                               31.0 + 0.9 + 1.1 + 3.7                36.7 GB

Adapting, 8 GPUs (fsdp): layers sharded, embeddings and output layer whole.

    layers           28 x 50.34 M x (4 + 4 + 8) bytes / 8                       2.8 GB
    embeddings       311.2 M x (2 + 4 + 4 + 8) bytes                            5.6 GB
    as it was        the model given, whole, 1,720.6 M x 2 bytes                3.4 GB
    two layers       gathered, 2 x 50.34 M x 2 bytes                            0.2 GB
    in all           2.8 + 5.6 + 3.4 + 0.2 + 0.9 + 1.1 + 3.7                   17.7 GB

Distillation follows the model given: on 1 GPU a frozen copy, 3.4 GB, and the teacher's chunk of logits; on 8 those.
A checkpoint has 1,720.6 M x (4 + 8) bytes = 20.6 GB, and twice that passes through the machine's memory.

Training keeps no KV cache. The hybrid's, at 32,768 tokens: 2 x 28 x 8 x 128 x 2 bytes x 32,768 = 3.76 GB dense;
a quarter of it, and 132 tokens of the other heads, are 0.95 GB.

Time (estimates, at 200 TFLOP/s, a fifth of what an H100 can do in bfloat16). FLOP per token and pass: 2 x 1,720.6 M
for the weights, 2 x 8,192 x 2,048 x 28 = 0.94 G for full attention. Backward counts as 2 passes through weights that
train, 1 through frozen ones and 2.5 through attention, recomputation as 1 more.

    learning     6 x 1.721 + 4.5 x 0.94 = 14.6 GFLOP, 14,000 tokens/s; 200 x 8 x 8,192 = 13.1 M tokens
                 1 GPU: 16 minutes; 8 GPUs: about 2.2 minutes; and a minute of refinement on each
    adapting     8 x 1.721 + 4.5 x 0.94 / 4 = 14.8 GFLOP, 13,500 tokens/s; 1,000 x 32 x 8,192 = 262 M tokens
                 1 GPU: 5.4 hours; 8 GPUs: about 45 minutes
"""

from consa.config import AdaptConfig, LearnConfig, RunConfig

RUN = RunConfig(model="Qwen/Qwen3-1.7B", data="hf:emozilla/pg19", max_tokens=2**28, num_heldout=32)
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
    learning_rate=1e-5,
    seq_len=8192,
    num_steps=1000,
    sequences_per_step=32,
    evaluate_every=100,
    checkpoint_every=100,
    activation_checkpointing=True,
    parallel="fsdp",
)
