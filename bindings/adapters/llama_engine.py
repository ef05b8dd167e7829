"""`stars.adapters.llama_cpp`: llama.cpp in this process drafts, any of our rewards scores, libstars decides."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import secrets
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from stars.adapters.asked import checked_params, paired, refuse_settings
from stars.adapters.drawing import Proposal
from stars.adapters.law import law_of
from stars.adapters.llama_context import LlamaContext, load_api
from stars.adapters.llama_sequences import SequenceStack
from stars.adapters.llama_vocabulary import ending_tokens, equal_tokens, vocabulary_of
from stars.adapters.loop import Loop, Response
from stars.adapters.scoring import Scoring
from stars.arguments import integer, refuse_bare_prompt, shown
from stars.errors import ModelError, RequestError, StarsError, TokenizerError
from stars.model.files import is_gguf
from stars.model.gguf_config import eos_ids
from stars.model.gguf_header import read_header
from stars.model.tokenizer import Detokenizer, Tokenizer, finished, load_tokenizer
from stars.outputs import CompletionOutput, Metrics, RequestOutput, warn_of_errors
from stars.policies import Sample
from stars.prompt import Prompt, parse_prompt
from stars.sampling import RequestOutputKind, SamplingParams
from stars.sources import resolve_tokenizer

NAME = "the llama.cpp adapter"
TAKEN = ("temperature", "top_k", "top_p", "min_p", "max_tokens", "n", "stop_token_ids", "ignore_eos", "seed",
         "output_kind")
"""What it takes of SamplingParams."""
DEFAULT_CONTEXT = 4096  # tokens of prompt and response, where a file alone is given and its model reads more
SAME_TOKENS = 0.9  # share of equal tokens from which a tokenizer counts as the model's: some are written otherwise


def llama_cpp(llm: Any, reward: Any = None, policy: Any = None, *, tokenizer: Any = None, n_ctx: int | None = None,
              n_seq_max: int = 64, n_batch: int = 512, n_threads: int | None = None) -> LlamaCpp:
    """An engine of llama.cpp's models, to be called as `stars.Engine` is: `generate`, `stream`, `close`.

    llm: a `llama_cpp.Llama`, or the path of a GGUF file. A Llama's weights and settings are used, its own context is
        not touched; whatever llama.cpp can be told (GPU layers, types of the cache, LoRA) is told to it.
    reward: as of `stars.Engine`; None for plain sampling. policy: `stars.STARS`, `BlockwiseBestOfK` or `Sample`; None:
        plain sampling, where there is no reward.
    tokenizer: a directory with the model's tokenizer.json, or a tokenizer of ours. None: that of the file as this
        package reads it, and where it cannot, as llama.cpp does.
    n_ctx: cells of the KV cache, which all responses and their attempts share. None: the Llama's n_ctx (of a file what
        its model reads, at most 4096), and room for the attempts of n_seq_max sequences.
    n_seq_max: sequences, at most 256: a response takes one and one for each attempt at once. Who finds none free waits;
        where one response alone finds too few, its attempts are drawn after each other, to the same text.
    n_batch: most tokens of a pass. n_threads: of llama.cpp; None: the Llama's, or as many as torch has.

    ModelError, TokenizerError, RewardError or RequestError name what cannot be done.
    """
    return LlamaCpp(llm, reward, policy, tokenizer=tokenizer, n_ctx=n_ctx, n_seq_max=n_seq_max, n_batch=n_batch,
                    n_threads=n_threads)


class LlamaCpp:
    """What `llama_cpp` returns. Any thread may call: one is at work, the others wait. A context manager, which closes.
    """

    def __init__(self, llm: Any, reward: Any, policy: Any, *, tokenizer: Any, n_ctx: int | None, n_seq_max: int,
                 n_batch: int, n_threads: int | None):
        self._context: LlamaContext | None = None
        self._own_model: Any = None
        self._llama: Any = None
        self._turn = threading.Lock()
        self._owner: int | None = None
        if policy is None and reward is not None:
            raise RequestError("a reward is given and policy is None, which samples without one: give "
                               "policy=stars.STARS(reward_threshold=…), or leave reward out")
        self.policy = Sample() if policy is None else policy
        self._law = law = law_of(self.policy, NAME)
        self._api = api = load_api()
        most = api.llama_max_parallel_sequences()
        n_seq_max = integer("n_seq_max", n_seq_max, 3 if law.max_attempts > 1 else 2, most)
        n_batch = integer("n_batch", n_batch, n_seq_max)
        path, model, params, lora = self._model(llm)
        width = law.width if self._pays(law.best) else 1
        spare = int(law.max_attempts > min(width, n_seq_max - 1))
        lanes = min(width, n_seq_max - 1 - spare)
        if n_threads is not None:
            params.n_threads = params.n_threads_batch = integer("n_threads", n_threads, 1)
        try:
            trained = api.llama_model_n_ctx_train(model)
            beside = (lanes + spare - 1) * (law.segment_size - 1)  # cells of attempts, of one response
            if n_ctx is None:
                length = min(trained, DEFAULT_CONTEXT) if self._own_model else params.n_ctx
                cells = length + max(beside, n_seq_max * (law.segment_size - 1))
            else:
                cells = integer("n_ctx", n_ctx, beside + 2)
                length = min(cells - beside, trained) if self._own_model else cells - beside
            self.max_model_len = length
            cells = -(-cells // 256) * 256  # as llama.cpp rounds it
            self._context = LlamaContext(api, model, params, n_ctx=cells, n_seq_max=n_seq_max, n_batch=n_batch,
                                         lora=lora)
            self.vocab_size = self._context.vocab_size
            self.tokenizer = self._tokenizer_of(tokenizer, path, model)
            self._eos = self._ending(path, model)
            self._scoring = None if not law.scores else Scoring(
                reward, self.tokenizer, self.vocab_size, max_model_len=length, segment_size=law.segment_size,
                max_num_seqs=n_seq_max, max_num_lanes=n_seq_max, own=path)
        except BaseException:
            self.close()
            raise
        self._proposals: dict[Response, Proposal] = {}
        self.stack = SequenceStack(self._context, cells=cells, sequences=n_seq_max, lanes=lanes, spare=spare,
                                   segment_size=law.segment_size, proposals=self._proposals)
        self._width = lanes
        self._ids = itertools.count()

    def _model(self, llm: Any) -> tuple[Path | None, Any, Any, tuple[Any, float] | None]:
        """(the file, the model, parameters of a context, a LoRA adapter and its scale)."""
        api = self._api
        if isinstance(llm, (str, Path)):
            path = Path(llm)
            if not is_gguf(path):
                raise ModelError(f"llm is {shown(str(llm))}, which is no GGUF file here: give the path of one, or a "
                                 "llama_cpp.Llama")
            messages = logging.getLogger("llama-cpp-python")  # whose level says what of llama.cpp's is printed
            if messages.level == logging.NOTSET:
                messages.setLevel(logging.ERROR)
            api.llama_backend_init()
            self._own_model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
            if not self._own_model:
                raise ModelError(f"llama.cpp cannot load {path}: see what it says in llama_cpp.Llama(…, verbose=True)")
            params = api.llama_context_default_params()
            params.n_threads = params.n_threads_batch = torch.get_num_threads()
            params.no_perf = True
            return path, self._own_model, params, None
        if not isinstance(llm, api.Llama):
            raise ModelError(f"llm is {shown(llm)}, it must be a llama_cpp.Llama or the path of a GGUF file")
        self._llama = llm
        self._check_open()
        if llm.model_params.vocab_only:
            raise ModelError("this Llama has vocab_only=True, so that it cannot generate: load it without")
        params = type(llm.context_params).from_buffer_copy(llm.context_params)
        params.n_ctx = llm.n_ctx()
        lora = getattr(llm, "_lora_adapter", None)
        return (Path(llm.model_path), llm.model, params, None if lora is None else (lora, float(llm.lora_scale)))

    def _pays(self, best: bool) -> bool:
        """Whether attempts are drawn together that may be in vain. Where the policy leaves that open: on a GPU, as
        on a CPU a pass of llama.cpp over two lanes takes about as long as two passes. best: all are wanted anyhow."""
        api = self._api
        layers = self._llama.model_params.n_gpu_layers if self._llama is not None else -1
        return best or self.policy.plan().lanes.width is not None or bool(layers and api.llama_supports_gpu_offload())

    def _tokenizer_of(self, given: Any, path: Path | None, model: Any) -> Tokenizer | None:
        """The tokenizer given, else the file's by us, else by llama.cpp."""
        if given is not None:
            found = resolve_tokenizer(given, None)
            share = equal_tokens(self._api, model, found) if callable(getattr(found, "tokens", None)) else 1.0
            if share < SAME_TOKENS:
                raise TokenizerError(f"tokenizer has another vocabulary than the model: {share:.0%} of the model's "
                                     "tokens are the same; give the model's own")
            return found
        try:
            found = load_tokenizer(path) if path is not None and is_gguf(path) else None
            if found is not None and found.vocab_size <= self.vocab_size:
                return found
        except StarsError:  # a kind of vocabulary that is llama.cpp's alone
            pass
        return vocabulary_of(self._api, model, str(path))

    def _ending(self, path: Path | None, model: Any) -> tuple[int, ...]:
        """The tokens that end a response: those of `stars.Engine` where the file's tokenizer is ours."""
        own = getattr(self.tokenizer, "eos_token_id", None)
        ids = list(ending_tokens(self._api, model))
        if isinstance(self.tokenizer, Tokenizer) and self.tokenizer.control_tokens is not None and path is not None:
            try:
                ids = eos_ids(read_header(path))
            except ModelError:  # a file that llama.cpp alone can read, and a tokenizer that was given
                pass
        return tuple(dict.fromkeys(one for one in (*ids, own) if one is not None and one < self.vocab_size))

    # -- calls --------------------------------------------------------------------------------------------------------

    def generate(self, prompts: Any, sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
                 ) -> list[RequestOutput]:
        """Completes every prompt; one RequestOutput a prompt, in order, as `stars.Engine.generate`.

        prompts: what the Engine takes, one or a list. sampling_params: one for all, or a list with one for each; what
        the adapter cannot do of them is refused by name. Every input is checked before any work (RequestError).
        """
        refuse_bare_prompt(prompts)
        asked = [self._parse(prompt, params) for prompt, params in paired(prompts, sampling_params)]
        for _ in self._run(asked):
            pass
        outputs = [request.output() for request in asked]
        warn_of_errors(outputs, stacklevel=3)
        return outputs

    def stream(self, prompt: Any, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Yields the output of one prompt each time that segments were committed; each is cumulative. A character that
        lacks bytes is held back. Closing the iterator ends the request."""
        if isinstance(prompt, (list, tuple)):
            raise RequestError("stream takes one prompt: call it for each, or give the list to generate")
        request = self._parse(prompt, sampling_params)
        return self._stream(request)

    def _stream(self, request: Request) -> Iterator[RequestOutput]:
        for changed in self._run([request]):
            if changed and (request.finished or request.params.output_kind is RequestOutputKind.CUMULATIVE):
                yield request.output()

    def _run(self, requests: Sequence[Request]) -> Iterator[list[Response]]:
        proposals = {one: request.proposal for request in requests for one in request.responses}
        responses = list(proposals)
        loop = Loop(self.stack, self._scoring, self._law, None, width=self._width, reserve=self.stack.reserve)
        rounds = loop.run(responses)
        try:
            self._proposals.update(proposals)
            while True:
                with self._taking_turns():
                    self._check_open()
                    changed = next(rounds, None)
                if changed is None:
                    return
                yield changed
        finally:
            with self._taking_turns():
                rounds.close()
                for one in responses:
                    self._proposals.pop(one, None)

    def _taking_turns(self) -> Any:
        if self._owner == threading.get_ident():
            raise RequestError("a reward may not call the engine that asks it")
        return _Turn(self)

    def _parse(self, given: Any, params: SamplingParams | None) -> Request:
        self._check_open()
        refuse_bare_prompt(given)
        params = checked_params(params)
        refuse_settings(params, TAKEN, NAME)
        if params.output_kind is RequestOutputKind.DELTA:
            raise RequestError(f"{NAME} has no RequestOutputKind.DELTA: take CUMULATIVE, or FINAL_ONLY")
        prompt = parse_prompt(given, self.tokenizer, self.vocab_size)
        params = params.settle(len(prompt.token_ids), self.max_model_len, self.vocab_size)
        max_tokens = params.max_tokens
        assert max_tokens is not None
        if len(prompt.token_ids) + max_tokens > self.max_model_len:
            raise RequestError(f"the prompt of {len(prompt.token_ids)} tokens and max_tokens={max_tokens} make "
                               f"{len(prompt.token_ids) + max_tokens}, the limit is {self.max_model_len}: shorten the "
                               "prompt, lower max_tokens or raise n_ctx")
        if self._scoring is not None:
            self._scoring.reward.check(prompt, max_tokens)
        stops = tuple(dict.fromkeys((*(() if params.ignore_eos else self._eos), *(params.stop_token_ids or ()))))
        seed = secrets.randbits(63) if params.seed is None else params.seed
        proposal = Proposal(params.temperature, params.top_k, params.top_p, params.min_p, stops)
        request = Request(str(next(self._ids)), prompt, params, self.policy, seed, proposal, self._eos, [])
        for sample in range(params.n):
            one = Response(prompt, seed, sample, max_tokens, params.temperature == 0.0)
            one.stop_ids = frozenset(stops)
            if self.tokenizer is not None:
                one.decode = Detokenizer(self.tokenizer, prompt.token_ids).decode
            request.responses.append(one)
        return request

    def _check_open(self) -> None:
        if self._llama is not None and getattr(self._llama._model, "model", None) is None:
            raise RequestError("the Llama was closed: make another one, and an adapter for it")
        if self._llama is None and self._own_model is None:
            raise RequestError("this adapter was closed: make another one")

    # -- what was run, and the end ------------------------------------------------------------------------------------

    @property
    def forward_tokens(self) -> int:
        """Rows of forward passes so far: of prompts and of drafts."""
        return self.stack.prompt_tokens + self.stack.draft_tokens

    def close(self) -> None:
        """Gives the context back, and the model where the adapter has loaded it; a second call does nothing."""
        with self._taking_turns():
            context, self._context = self._context, None
            gone = self._llama is not None and getattr(self._llama._model, "model", None) is None
            if context is not None and not gone:  # a context must not outlive its model
                context.close()
            model, self._own_model, self._llama = self._own_model, None, None
            if model:
                self._api.llama_model_free(model)

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_context", None) is not None:
            self.close()


class _Turn:
    """Holds an engine for one round."""

    def __init__(self, engine: LlamaCpp):
        self._engine = engine

    def __enter__(self) -> None:
        self._engine._turn.acquire()
        self._engine._owner = threading.get_ident()

    def __exit__(self, *exception: object) -> None:
        self._engine._owner = None
        self._engine._turn.release()


@dataclasses.dataclass
class Request:
    """One prompt and its responses."""

    request_id: str
    prompt: Prompt
    params: SamplingParams
    policy: Any
    seed: int
    proposal: Proposal
    eos: tuple[int, ...]
    responses: list[Response]

    @property
    def finished(self) -> bool:
        """Whether all have ended."""
        return all(one.finish_reason is not None for one in self.responses)

    def output(self) -> RequestOutput:
        """What the user gets so far."""
        completions = [self._completion(one) for one in self.responses]
        metrics = Metrics()
        for one in completions:
            metrics.add(one.metrics)
        return RequestOutput(self.request_id, self.prompt.asked, list(self.prompt.token_ids), completions,
                             self.finished, self.seed, self.policy, self.responses[0].prompt_reward, metrics)

    def _completion(self, one: Response) -> CompletionOutput:
        output = one.output()
        if output.text is None and one.decode is not None:
            output.text = ""
        if output.finish_reason is None and output.text is not None:
            output.text = finished(output.text)
        last = output.token_ids[-1] if output.finish_reason == "stop" else None
        return dataclasses.replace(output, stop_reason=None if last in self.eos else last)
