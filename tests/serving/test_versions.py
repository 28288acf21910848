"""What the plugin rests on in vLLM: a version that changed any of it fails here, by name, and not in its results."""

from __future__ import annotations

import ast
import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vLLM; run make test-vllm")

import vllm
from vllm.config import AttentionConfig, CompilationConfig, SchedulerConfig, VllmConfig
from vllm.forward_context import ForwardContext
from vllm.model_executor.layers.attention import Attention, attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from consa.serving import limits
from consa.serving.attention import HybridBackend, HybridBuilder, HybridImpl
from consa.serving.pages import SinkManager, SinkSpec

pytestmark = pytest.mark.vllm
SIZES: dict[str, Any] = {"block_size": 16, "num_kv_heads": 1, "head_size": 8, "dtype": None}


def arguments(function: Any) -> str:
    """Names of a function's arguments, without `self`."""
    names = [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]
    return " ".join(names)


SIGNATURES = [
    (
        Attention.__init__,
        "num_heads head_size scale num_kv_heads alibi_slopes use_alibi_sqrt cache_config quant_config logits_soft_cap"
        " per_layer_sliding_window prefix attn_type kv_sharing_target_layer_name mm_prefix_clamp_sliding_window"
        " attn_backend head_size_v extra_impl_args",
    ),
    (AttentionImpl.forward, "layer query key value kv_cache attn_metadata output output_scale output_block_scale"),
    (AttentionMetadataBuilder.__init__, "kv_cache_spec layer_names vllm_config device"),
    (AttentionMetadataBuilder.build, "common_prefix_len common_attn_metadata fast_build"),
    (AttentionBackend.get_supported_kernel_block_sizes, "kv_cache_spec"),
    (AttentionLayerBase.bind_kv_cache, "kv_cache"),
    (AttentionLayerBase.get_kv_cache_spec, "vllm_config"),
    (SlidingWindowSpec.max_admission_blocks_per_request, "max_in_flight_tokens max_model_len"),
    (SlidingWindowSpec.max_memory_usage_bytes, "vllm_config"),
    (SlidingWindowSpec.is_uniform_with_collection, "kv_cache_specs"),
    (SlidingWindowManager.get_num_skipped_tokens, "num_computed_tokens"),
    (SlidingWindowManager.remove_skipped_blocks, "request_id processed_computed_tokens num_prompt_tokens"),
    (SlidingWindowManager._remove_blocks_in_range, "request_id first_block last_block"),
    (SlidingWindowManager._get_num_evictable_blocks, "blocks"),
    (
        SlidingWindowManager.get_num_blocks_to_allocate,
        "request_id num_tokens new_computed_blocks total_computed_tokens num_local_computed_tokens"
        " num_tokens_main_model apply_admission_cap prefill_end",
    ),
    (
        SlidingWindowManager.add_local_computed_blocks,
        "request_id new_computed_blocks num_local_computed_tokens num_external_computed_tokens",
    ),
    (
        SlidingWindowManager.find_longest_cache_hit,
        "block_hashes max_length kv_cache_group_ids block_pool kv_cache_spec drop_eagle_block alignment_tokens"
        " dcp_world_size pcp_world_size",
    ),
    (
        SlidingWindowManager.reachable_block_mask,
        "start_block end_block alignment_tokens kv_cache_spec use_eagle retention_interval reachable_boundaries"
        " dcp_world_size final_segment_end_block",
    ),
    (BlockPool.touch, "blocks"),
    (BlockPool.get_cached_block, "block_hash kv_cache_group_ids"),
    (BlockPool.get_num_free_blocks, ""),
    (
        resolve_block_hashes,
        "block_hashes hash_block_size block_size supports_fine_grained_hash_lookup alignment_tokens",
    ),
    (KVCacheSpecRegistry.register, "kvcache_spec_cls manager_class uniform_type_base_spec"),
    (KVCacheSpecRegistry.check_kv_cache_spec_registry, "kv_cache_spec"),
]


@pytest.mark.parametrize(("function", "wanted"), SIGNATURES, ids=lambda x: getattr(x, "__qualname__", ""))
def test_signatures(function: Any, wanted: str):
    assert arguments(function) == wanted


FIELDS = [
    (
        CommonAttentionMetadata,
        "query_start_loc seq_lens num_actual_tokens max_query_len max_seq_len block_table_tensor slot_mapping",
    ),
    (KVCacheConfig, "num_blocks kv_cache_tensors kv_cache_groups"),
    (ForwardContext, "attn_metadata no_compile_layers"),
    (SchedulerConfig, "watermark disable_hybrid_kv_cache_manager"),
    (AttentionConfig, "flash_attn_max_num_splits_for_cuda_graph"),
    (CompilationConfig, "static_forward_context cudagraph_mode max_cudagraph_capture_size"),
    (FullAttentionSpec, "block_size num_kv_heads head_size dtype"),
    (SlidingWindowSpec, "block_size num_kv_heads head_size dtype sliding_window"),
]


@pytest.mark.parametrize(("kind", "wanted"), FIELDS, ids=lambda x: getattr(x, "__name__", ""))
def test_fields(kind: Any, wanted: str):
    assert set(wanted.split()) <= {field.name for field in fields(kind)}
    assert isinstance(VllmConfig.max_in_flight_tokens, property)


def test_what_a_window_s_cache_and_its_manager_decide_is_known():
    """vLLM 0.33 added `num_retained_tokens`, by which sinks would be lost: a further addition is to be read too."""
    spec = {name for name in vars(SlidingWindowSpec) if not name.startswith("__")}
    wanted = {"extra_retained_tokens", "num_retained_tokens", "max_admission_blocks_per_request"}
    wanted |= {"max_memory_usage_bytes", "is_uniform_with_collection"}
    assert spec - {"num_retained_tokens"} == wanted - {"num_retained_tokens"}
    if limits.vllm_version().startswith("0.33"):  # pyright: ignore[reportOptionalMemberAccess]
        assert "num_retained_tokens" in spec
    manager = {name for name in vars(SlidingWindowManager) if not name.startswith("_")}
    assert manager == {"find_longest_cache_hit", "get_num_skipped_tokens", "reachable_block_mask"}


def test_our_classes_take_what_vllm_s_take():
    for ours, theirs in (
        (HybridImpl.forward, AttentionImpl.forward),
        (HybridBuilder.__init__, AttentionMetadataBuilder.__init__),
        (HybridBuilder.build, AttentionMetadataBuilder.build),
        (HybridBackend.get_supported_kernel_block_sizes, AttentionBackend.get_supported_kernel_block_sizes),
        (SinkManager.remove_skipped_blocks, SlidingWindowManager.remove_skipped_blocks),
        (SinkManager.add_local_computed_blocks, SlidingWindowManager.add_local_computed_blocks),
        (SinkSpec.max_admission_blocks_per_request, SlidingWindowSpec.max_admission_blocks_per_request),
    ):
        assert arguments(ours) == arguments(theirs)
    positional = "num_heads head_size scale num_kv_heads alibi_slopes sliding_window kv_cache_dtype logits_soft_cap"
    assert arguments(HybridImpl.__init__).startswith(positional)
    source = inspect.getsource(attention)
    assert "if (\n                not self.attn_backend.forward_includes_kv_cache_update" in source


def test_flash_attention_takes_what_it_is_given():
    """Read, not imported: it takes a GPU."""
    path = Path(vllm.__file__).parent / "vllm_flash_attn/flash_attn_interface.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    (function,) = (
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "flash_attn_varlen_func"
    )
    names = {argument.arg for argument in function.args.args}
    given = "q k v out cu_seqlens_q max_seqlen_q seqused_k max_seqlen_k softmax_scale causal block_table num_splits"
    assert {*given.split(), "fa_version"} <= names


@pytest.mark.parametrize("num_sink_tokens", [0, 4])
def test_sinks_stay_in_page_tables(num_sink_tokens: int):
    """vLLM 0.33 clears the entries of pages before the first new token's window; not those of sinks."""
    spec = SinkSpec(**SIZES, sliding_window=64, num_sink_tokens=num_sink_tokens)
    if num_sink_tokens:
        assert 10_000_000 < spec.num_retained_tokens < 2**31
    elif limits.vllm_version().startswith("0.33"):  # pyright: ignore[reportOptionalMemberAccess]
        assert spec.num_retained_tokens == 63
