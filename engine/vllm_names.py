"""What users of vLLM (and of transformers) type that this engine has not: the one list of it.

Whoever implements a parameter takes its line out. A value listed as neutral asks for nothing and is accepted; any other
is refused with the parameter's name and what to do.
"""

from __future__ import annotations

from stars.arguments import Absent

_LOGPROBS = "give logprobs, how many of the most probable tokens are wanted"
_CONSTRAINT = "give structured_outputs, whose fields are those of StructuredOutputsParams"
_GUIDED = ("json", "regex", "choice", "grammar")  # guided_json, ..., of older vLLM

SAMPLING = {
    "best_of": Absent((None, 1), "use policy=stars.BestOfN(n), which returns the response of the highest reward"),
    "prompt_logprob_token_ids": Absent((None,), "leave it at None"),
    "prompt_logprob_start": Absent((None,), "leave it at None"),
    "logprob_token_ids": Absent((None,), _LOGPROBS),
    "flat_logprobs": Absent((False, None), "leave it at False"),
    "logits_processors": Absent((None, [], ()), "leave it at None, or judge whole segments with a reward"),
    "reasoning_structured_outputs": Absent((None,), _CONSTRAINT),
    "guided_decoding": Absent((None,), _CONSTRAINT),
    **{f"guided_{name}": Absent((None,), f'give structured_outputs={{"{name}": ...}}') for name in _GUIDED},
    "response_format": Absent((None, {"type": "text"}),
                              'give structured_outputs={"json": SCHEMA}, or {"json_object": True}'),
    "truncation_side": Absent((None,), "leave it at None and shorten the prompt"),
    "spaces_between_special_tokens": Absent((True,), "leave it at True"),
    "stream_interval": Absent((None, 1), "engine.stream yields once a segment, whose size is the policy's"),
    "extra_args": Absent((None, {}), "leave it at None, the policy has the parameters of STARS"),
    "skip_clone": Absent((False, True), "leave it at False"),
    "skip_reading_prefix_cache": Absent((None, False), "beginnings of prompts are always shared, leave it at None"),
    "thinking_token_budget": Absent((None, -1), "leave it at None and lower max_tokens"),
    "repetition_detection": Absent((None,), "leave it at None, or use repetition_penalty"),
    "routed_experts_prompt_start": Absent((0,), "leave it at 0"),
    "trace_decode_token_ids": Absent((None,), "leave it at None"),
    "output_text_buffer_length": Absent((0,), "leave it at 0"),
    "use_beam_search": Absent((False, None), "leave it at False, or use policy=stars.BlockwiseBestOfK(k)"),
    "length_penalty": Absent((1.0, None), "leave it at 1.0"),
    "early_stopping": Absent((False, None), "leave it at False"),
    # Names of transformers and of other engines for what is here.
    "max_new_tokens": Absent((), "it is called max_tokens"),
    "num_return_sequences": Absent((), "it is called n"),
    "stop_strings": Absent((), "it is called stop"),
    "eos_token_id": Absent((), "it is called stop_token_ids"),
    "sampling_seed": Absent((), "it is called seed"),
    "do_sample": Absent((True,), "use temperature=0 for the most probable token"),
    "num_beams": Absent((1,), "leave it at 1, or use policy=stars.BlockwiseBestOfK(k)"),
}
"""Parameters of requests, by name."""

STRUCTURED = {
    "disable_fallback": Absent((False,), "there is one implementation, leave it out"),
    "disable_any_whitespace": Absent((False,), "leave it at False, or write the schema as a grammar"),
    "disable_additional_properties": Absent((False,), 'say "additionalProperties": false in the schema'),
    "whitespace_pattern": Absent((None,), "leave it at None, or write the schema as a grammar"),
    "structural_tag": Absent((None,), "write it as a grammar"),
}
"""Fields of StructuredOutputsParams, by name."""

_ONE_DEVICE = "an engine runs on one device, leave it out and start one process for each GPU"
_REVISION = 'give the model as "org/name@revision"'
_CODE_REVISION = "no code of a repository is run, leave it out"
_HUB_CACHE = "what is downloaded lies in the Hugging Face hub's own cache, leave it out and set HF_HOME"
_TOKEN = "the hub's own login is used, leave it out and run `hf auth login`"
_CACHE = "give cache_tokens, the tokens that each model's KV cache holds"
_SHARED = "beginnings of prompts are always shared, leave it out"
_CONFIG = "change the model directory's config.json"
_NO_CODE = "code in a model directory is never run, leave it out and use a supported model type"
_LORA = ("an adapter is fixed when the engine is built, give its directory as the model, as one of models={NAME: DIR} "
         "or as the reward")
_TEXT_ONLY = "models here read text only, leave it out"

ENGINE = {
    "load_in_8bit": Absent((False,), 'give quantization="int8"'),
    "load_in_4bit": Absent((False,), 'give quantization="int4"'),
    "quantization_config": Absent((None,), 'give quantization="int8" or "int4"; a quantised checkpoint says it itself'),
    "kv_cache_dtype": Absent(("auto",), "the KV cache has the dtype of the computation, leave it out"),
    "tensor_parallel_size": Absent((1,), _ONE_DEVICE),
    "pipeline_parallel_size": Absent((1,), _ONE_DEVICE),
    "data_parallel_size": Absent((1,), _ONE_DEVICE),
    "enable_expert_parallel": Absent((False,), _ONE_DEVICE),
    "distributed_executor_backend": Absent((None,), _ONE_DEVICE),
    "disable_custom_all_reduce": Absent((False, True), _ONE_DEVICE),
    "kv_cache_memory_bytes": Absent((None,), _CACHE),
    "num_gpu_blocks_override": Absent((None,), _CACHE),
    "swap_space": Absent((0, 4), "nothing is swapped, leave it out and give cache_tokens"),
    "cpu_offload_gb": Absent((0,), 'nothing is offloaded, leave it out or use device="cpu"'),
    "block_size": Absent((), "it is called page_size"),
    "enforce_eager": Absent((False, None), 'steps are recorded and replayed on every device, leave it out'),
    "compilation_config": Absent((None,), "nothing is compiled at run time, leave it out"),
    "max_seq_len_to_capture": Absent((None,), "steps of every length are captured, leave it out"),
    "enable_chunked_prefill": Absent((None, True), "long prompts always run in chunks, give max_num_batched_tokens"),
    "enable_prefix_caching": Absent((None, True), _SHARED),
    "attention_backend": Absent((), "it is called prefill_backend"),
    "attn_implementation": Absent((), "it is called prefill_backend"),
    "scheduling_policy": Absent(("fcfs", "priority"), "requests come by priority, then in order, leave it out"),
    "async_scheduling": Absent((None, False), "leave it out"),
    "seed": Absent((None, 0), "give SamplingParams(seed=...)"),
    "trust_remote_code": Absent((False, None), _NO_CODE),
    "load_format": Absent(("auto", "safetensors", "gguf"),
                          "safetensors and GGUF files are read, convert the weights to one of them"),
    "revision": Absent((None,), _REVISION),
    "code_revision": Absent((None,), _CODE_REVISION),
    "tokenizer_revision": Absent((None,), 'give tokenizer="org/name@revision"'),
    "download_dir": Absent((None,), _HUB_CACHE),
    "hf_token": Absent((None, False), _TOKEN),
    "hf_overrides": Absent((None, {}), _CONFIG),
    "rope_scaling": Absent((None,), _CONFIG),
    "rope_theta": Absent((None,), _CONFIG),
    "disable_sliding_window": Absent((False,), _CONFIG),
    "hf_config_path": Absent((None,), "config.json is read from the model directory, leave it out"),
    "model_impl": Absent(("auto",), "there is one implementation of each model type, leave it out"),
    "task": Absent(("auto", "generate", None), "the first model generates and reward=... scores, leave it out"),
    "runner": Absent(("auto", "generate"), "the first model generates and reward=... scores, leave it out"),
    "convert": Absent(("auto", "none"), "the first model generates and reward=... scores, leave it out"),
    "reward_model": Absent((), "it is called reward"),
    "tokenizer_mode": Absent(("auto",), "tokenizer.json is read as it is, leave it out"),
    "skip_tokenizer_init": Absent((False,), "leave it out: prompts may be token ids all the same"),
    "chat_template": Absent((None,), "the template is read from the model directory, put it there"),
    "generation_config": Absent(("vllm", None), "sampling parameters are those of SamplingParams, leave it out"),
    "override_generation_config": Absent((None, {}), "give SamplingParams with each call"),
    "speculative_config": Absent((None,), "there is no speculative decoding, leave it out"),
    "enable_lora": Absent((False,), _LORA),
    "lora_modules": Absent((None,), _LORA),
    "max_loras": Absent((None,), _LORA),
    "max_lora_rank": Absent((None,), _LORA),
    "max_logprobs": Absent((None, 20), "it is 20, leave it out"),
    "structured_outputs_config": Absent((None,), "there is one implementation, leave it out"),
    "guided_decoding_backend": Absent((None, "auto", "guidance"), "there is one implementation, leave it out"),
    "reasoning_parser": Absent((None, ""), "the whole response is returned as it is, leave it out"),
    "logits_processors": Absent((None, []), "leave it out, or judge whole segments with a reward"),
    "limit_mm_per_prompt": Absent((None, {}), _TEXT_ONLY),
    "mm_processor_kwargs": Absent((None, {}), _TEXT_ONLY),
    "allowed_local_media_path": Absent((None, ""), _TEXT_ONLY),
    "disable_log_stats": Absent((True, False), "engine.metrics always counts, which takes under 1 %, leave it out"),
    "otlp_traces_endpoint": Absent((None,), "give tracer_provider, an OpenTelemetry TracerProvider that exports there"),
    "collect_detailed_traces": Absent((None,), "give tracer_provider, whose spans have an event for each segment"),
    "disable_log_requests": Absent((True,), 'log lines go to the logger "stars", set its level and leave this out'),
    "enable_log_requests": Absent((False,), 'log lines go to the logger "stars", set its level and leave this out'),
    "show_hidden_metrics_for_version": Absent((None,), "engine.metrics hides none, leave it out"),
    "prefix_caching_hash_algo": Absent(("sha256", "builtin", None), "pages are compared by their tokens, leave it out"),
    "logprobs_mode": Absent((None,), "log-probabilities are of what a token is drawn from, before temperature and "
                            "filters, leave it out"),
    "enable_sleep_mode": Absent((False,), "an engine keeps its memory until it is deleted, leave it out"),
    "worker_cls": Absent(("auto",), "the engine runs in the process that built it, leave it out"),
    "served_model_name": Absent((None,), "nothing is served here, leave it out"),
    "torch_dtype": Absent((), "it is called dtype"),
    "device_map": Absent((), "it is called device"),
}
"""Arguments of the engine, by name."""

CALL = {
    **{name: f"give SamplingParams({name}=...) as sampling_params" for name in (
        "temperature", "top_k", "top_p", "min_p", "max_tokens", "n", "stop", "stop_token_ids", "ignore_eos", "seed",
        "presence_penalty", "frequency_penalty", "repetition_penalty", "logprobs", "prompt_logprobs", "logit_bias",
        "min_tokens", "bad_words", "allowed_token_ids", "truncate_prompt_tokens", "output_kind", "structured_outputs",
        "attempt_logprobs", "include_stop_str_in_output", "skip_special_tokens", "detokenize")},
    **{name: "give SamplingParams(structured_outputs=...) as sampling_params" for name in (
        "guided_decoding", "response_format", *(f"guided_{name}" for name in _GUIDED))},
    "timeout": "give budget=stars.Budget(seconds=...)",
    "deadline": "give budget=stars.Budget(seconds=...)",
    "prompt_token_ids": 'give {"prompt_token_ids": [...]} as the prompt',
    "messages": 'give {"messages": [...]} as the prompt',
    "tools": 'give {"messages": [...], "tools": [...]} as the prompt, or call engine.chat',
    "chat_template_kwargs": 'give it beside "messages" in the prompt, or call engine.chat',
    "add_generation_prompt": 'give it beside "messages" in the prompt, or call engine.chat',
    "continue_final_message": 'give it beside "messages" in the prompt, or call engine.chat',
    "special_tokens": 'give {"prompt": TEXT, "special_tokens": "text"} as the prompt',
    "chat_template": "the template is read from the model directory, put it there",
    "chat_template_content_format": "what the template reads is found out from it, leave it out",
    "mm_processor_kwargs": _TEXT_ONLY,
    "lora_request": _LORA,
    "tokenization_kwargs": "give the prompt as {\"prompt_token_ids\": [...]}",
    "arrival_time": "leave it out",
    "trace_headers": "give it to add_request or to AsyncEngine, here the span that is current is taken",
    "data_parallel_rank": _ONE_DEVICE,
    "prompt_text": 'give {"prompt": TEXT} as the prompt',
    "documents": "give it in chat_template_kwargs",
    "reasoning_effort": "give it in chat_template_kwargs",
    "reasoning_ended": "the whole response is returned as it is, leave it out",
    "prompt_adapter_request": "leave it out",
    "params": "it is called sampling_params",
}
"""Keywords of `generate`, `stream` and `add_request` that belong elsewhere; None asks for nothing."""
