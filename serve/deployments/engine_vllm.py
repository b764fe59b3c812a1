"""vLLM inside this process: the engine, its own OpenAI serving classes, and the checks that they run as we need them.

Everything that knows vLLM's module paths is here (and in `serve.lora_cpu`). Importing this module loads vLLM.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any, Literal

from prometheus_client import generate_latest
from pydantic import ValidationError
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest, StreamingResponsesResponse
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.prometheus import get_prometheus_registry

from serve import lora_cpu
from serve.config import EngineConfig
from serve.deployments.engine_context import ENGINE_DEAD, EngineContext, EngineRefusal
from serve.deployments.engine_threads import thread_binding
from serve.vllm_executor import EXECUTOR_PATH

logger = logging.getLogger(__name__)

Kind = Literal["chat", "completion", "responses"]
BASE_NAME = "base"
# Set by the server or not at all, whatever the body says.
SERVER_FIELDS = ("kv_transfer_params", "ec_transfer_params", "vllm_xargs", "session_id", "prompt_embeds")
# Options of vLLM's serving classes that `engine.extra` may carry beside those of AsyncEngineArgs.
SERVING_OPTIONS = ("chat_template", "tool_call_parser", "reasoning_parser")

_PROMPT: dict[Kind, str] = {"chat": "messages", "completion": "prompt", "responses": "input"}
_TOO_LONG = ("input_text", "input_tokens")  # what vLLM's refusals of a prompt that is too long name
_MEDIA = ("image", "audio", "video", "file")  # in the types of parts that are no text

_shown_model: ContextVar[str | None] = ContextVar("shown_model", default=None)


class _Models(OpenAIServingModels):
    """Shows clients the model name that they sent, instead of the adapter's."""

    def model_name(self, lora_request: LoRARequest | None = None) -> str:
        return _shown_model.get() or super().model_name(lora_request)


class VllmRuntime:
    """One vLLM engine with its OpenAI front. Blocks while the engine starts (tens of seconds on CPU)."""

    def __init__(self, model: str, config: EngineConfig) -> None:
        """``model``: folder or name of the base. Raises what vLLM raises when it cannot start."""
        if (binding := thread_binding(config)) != "auto":
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = binding
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        if current_platform.is_cpu():
            # vLLM compiles parts of its sampler at the first sampled or logprobs request: seconds of silence for
            # everybody, and a C++ compiler needed. Its model code runs eagerly on CPU with LoRA anyway.
            os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
        extra = dict(config.extra)
        if current_platform.is_cpu() and int(extra.get("tensor_parallel_size") or 1) == 1:
            extra.setdefault("distributed_executor_backend", EXECUTOR_PATH)
        serving = {name: extra.pop(name, None) for name in SERVING_OPTIONS}
        args = {
            "model": model,
            "served_model_name": BASE_NAME,
            "dtype": config.dtype,
            "max_model_len": config.max_model_len,
            "max_num_seqs": config.max_num_seqs,
            "block_size": config.block_size,
            "kv_cache_memory_bytes": config.kv_cache_gib << 30,
            "enable_prefix_caching": True,
            "enable_lora": True,
            "max_loras": config.max_loras,
            "max_lora_rank": config.max_lora_rank,
            "max_cpu_loras": config.max_cpu_loras,
            "scheduling_policy": "priority",
            "worker_extension_cls": "serve.vllm_plugin.LoraWorkerExtension",
        }
        self.engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**{**args, **extra}))
        self._drop_unbounded_labels()
        self.models = _Models(self.engine, [BaseModelPath(BASE_NAME, model)])
        tools = {"enable_auto_tools": serving["tool_call_parser"] is not None}
        parsers = {"tool_parser": serving["tool_call_parser"], "reasoning_parser": serving["reasoning_parser"] or ""}
        template = {"chat_template": serving["chat_template"], "chat_template_content_format": "auto"}
        renderer = OnlineRenderer(
            self.engine.model_config, self.engine.renderer, request_logger=None, **template, **tools, **parsers
        )
        renderer.warmup()
        self._chat = OpenAIServingChat(
            self.engine,
            self.models,
            "assistant",
            online_renderer=renderer,
            request_logger=None,
            enable_prompt_tokens_details=True,
            **template,
            **tools,
            **parsers,
        )
        self._responses = OpenAIServingResponses(
            self.engine,
            self.models,
            renderer,
            request_logger=None,
            enable_prompt_tokens_details=True,
            **template,
            **tools,
            **parsers,
        )
        self._completion = OpenAIServingCompletion(
            self.engine,
            self.models,
            online_renderer=renderer,
            request_logger=None,
            enable_prompt_tokens_details=True,
        )

    async def verify(self) -> None:
        """Raises RuntimeError when a CPU worker runs without `serve.lora_cpu`: tenants' adapters would leak."""
        if not current_platform.is_cpu():
            return
        for wrappers in await self.engine.collective_rpc("imprint_lora_wrappers"):
            if list(wrappers) != [lora_cpu.WRAPPER_PATH]:
                raise RuntimeError(
                    f"vLLM runs LoRA through {wrappers} instead of {lora_cpu.WRAPPER_PATH}. The plugin "
                    "imprint_lora_cpu was not loaded: is the project installed, and does VLLM_PLUGINS allow it?"
                )

    async def create(
        self, kind: Kind, body: dict[str, Any], context: EngineContext, lora: LoRARequest | None
    ) -> AsyncGenerator[str, None] | dict[str, Any]:
        """Runs one request and gives an OpenAI object, or the server-sent events of a stream.

        The answer names the model as ``body`` does. Raises EngineRefusal for everything that goes wrong before the
        first token.
        """
        if not self.engine.model_config.is_multimodal_model:
            _refuse_media(kind, body)
        fields = {name: value for name, value in body.items() if name not in SERVER_FIELDS}
        fields |= {
            "model": lora.lora_name if lora else BASE_NAME,
            "request_id": context.request_id,
            "cache_salt": context.cache_salt,
            "priority": context.priority,
        }
        _shown_model.set(body.get("model") or None)
        if lora:
            self.models.lora_requests[lora.lora_name] = lora
        try:
            if kind == "chat":
                result = await self._chat.create_chat_completion(ChatCompletionRequest(**fields))
            elif kind == "responses":
                # Its ID is the answer's. Nothing is stored: vLLM would keep answers in memory for ever.
                fields |= {"request_id": f"resp_{context.request_id.removeprefix('req_')}", "store": False}
                result = await self._responses.create_responses(ResponsesRequest(**fields))
            else:
                result = await self._completion.create_completion(CompletionRequest(**fields))
        except ValidationError as error:
            raise _invalid(error) from error
        except EngineDeadError as error:
            raise self.dead_refusal() from error
        except Exception as error:
            if self.dead:
                raise self.dead_refusal() from error
            answer = create_error_response(error)
            if answer.error.code >= 500:
                logger.exception("request %s failed in the engine", context.request_id)
            raise _refusal(answer, kind) from error
        if isinstance(result, ErrorResponse):
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                # vLLM turns a cancellation into an error answer.
                raise asyncio.CancelledError
            raise self.dead_refusal() if self.dead else _refusal(result, kind)
        if isinstance(result, AsyncGenerator):
            return _as_text(result) if kind == "responses" else result
        answer_body: dict[str, Any] = result.model_dump(mode="json", by_alias=kind == "responses")
        return answer_body

    @property
    def dead(self) -> bool:
        """Whether the engine's processes have ended; they do not come back."""
        return bool(self.engine.errored)

    def dead_refusal(self) -> EngineRefusal:
        """The answer to a request that another replica can take."""
        return EngineRefusal(503, "the engine has stopped and is being restarted", "server_error", ENGINE_DEAD)

    def metrics(self) -> str:
        """This process's Prometheus metrics, vLLM's under their own names."""
        return generate_latest(get_prometheus_registry()).decode()

    def shutdown(self) -> None:
        """Ends the engine's processes."""
        self.engine.shutdown()

    def _drop_unbounded_labels(self) -> None:
        """vLLM's LoRA gauge has a label that lists adapter names: a new time series for each mix of adapters."""
        for stat_logger in getattr(self.engine.logger_manager, "stat_loggers", ()):
            if getattr(stat_logger, "gauge_lora_info", None) is not None:
                stat_logger.gauge_lora_info = None


async def _as_text(events: AsyncGenerator[StreamingResponsesResponse, None]) -> AsyncGenerator[str, None]:
    """The events of `/v1/responses` as server-sent ones; an error becomes the last, as in vLLM's other streams."""
    try:
        async with aclosing(events):
            async for event in events:
                yield f"event: {event.type}\ndata: {event.model_dump_json(by_alias=True)}\n\n"
    except Exception as error:
        logger.exception("a stream of events failed")
        yield f"data: {create_error_response(error).model_dump_json()}\n\n"


def _refuse_media(kind: Kind, body: dict[str, Any]) -> None:
    """Raises EngineRefusal for a part of a message that a base which reads text alone cannot read."""
    turns = body.get(_PROMPT[kind])
    for number, turn in enumerate(turns if isinstance(turns, list) else []):
        content = turn.get("content") if isinstance(turn, dict) else None
        for place, part in enumerate(content if isinstance(content, list) else []):
            found = str(part.get("type")) if isinstance(part, dict) else ""
            if any(word in found for word in _MEDIA):
                param = f"{_PROMPT[kind]}.{number}.content.{place}"
                message = f"'{param}' is of type '{found}', but the base model reads text alone."
                raise EngineRefusal(400, message, "invalid_request_error", "invalid_value", param)


def _refusal(answer: ErrorResponse, kind: Kind) -> EngineRefusal:
    error = answer.error
    if error.param in _TOO_LONG:
        message = error.message.partition(" (parameter=")[0]
        return EngineRefusal(400, message, "invalid_request_error", "context_length_exceeded", _PROMPT[kind])
    error_type = "server_error" if error.code >= 500 else "invalid_request_error"
    return EngineRefusal(error.code, error.message, error_type, code=error.type, param=error.param)


def _invalid(error: ValidationError) -> EngineRefusal:
    first = error.errors(include_url=False, include_context=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    message = f"{field}: {first['msg']}" if field else str(first["msg"])
    return EngineRefusal(400, message, "invalid_request_error", param=field or None)
