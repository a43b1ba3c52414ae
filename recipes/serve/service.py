"""The service: OpenAI's /v1/completions as far as it goes here, and an instruction beside it."""

import asyncio
import json
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import StreamingResponse
from peft import PeftModel
from pydantic import BaseModel, ConfigDict, Field

from recipes.serve.answers import Answer

BASE = "__base__"  # PEFT's name, in `adapter_names`, of no adapter


class Asked(BaseModel):
    """The body of a request. Other fields of OpenAI's are refused: they would change nothing."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(description="an adapter, or __base__ for the model without one")
    prompt: str
    max_tokens: int = Field(default=16, ge=1)
    temperature: float = Field(default=0.0, ge=0.0, description="0, the default, is greedy")
    stream: bool = False
    instruction: str | None = Field(default=None, description="None: the adapter's default")


class Service:
    """Answers requests with one model and all its adapters.

    Args:
        model: a `PeftModel` with Queryable LoRA.
        tokenizer: its tokenizer.
        length: the most tokens that prompt and answer may have together.
        threads: the most answers that are made at once; others wait.
    """

    def __init__(self, model: PeftModel, tokenizer: Any, length: int, threads: int) -> None:
        self.model, self.tokenizer, self.length = model.eval(), tokenizer, length
        self.pool = ThreadPoolExecutor(threads)

    @property
    def names(self) -> list[str]:
        return [*self.model.peft_config, BASE]

    def arguments(self, asked: Asked) -> dict[str, Any]:
        """What `generate` is called with.

        Raises:
            HTTPException: 404 for an adapter that is not there, 400 for what it cannot be asked.
        """
        if asked.model not in self.names:
            raise HTTPException(404, f"There is no adapter {asked.model!r}, but {self.names}.")
        inputs = self.tokenizer(asked.prompt, return_tensors="pt").to(self.model.device)
        prompt = inputs["input_ids"].shape[1]
        if prompt == 0:
            raise HTTPException(400, "The prompt has no tokens.")
        if prompt + asked.max_tokens > self.length:
            raise HTTPException(
                400,
                f"The prompt has {prompt} tokens and `max_tokens` is {asked.max_tokens}, which makes "
                f"{prompt + asked.max_tokens}: at most {self.length} are possible.",
            )
        given = {} if asked.instruction is None else {"instruction_embeds": self.embed(asked.model, asked.instruction)}
        sampling = {"do_sample": True, "temperature": asked.temperature} if asked.temperature else {"do_sample": False}
        return {
            "input_ids": inputs["input_ids"],
            "attention_mask": inputs["attention_mask"],
            "adapter_names": [asked.model],
            "max_new_tokens": asked.max_tokens,
            "pad_token_id": self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
            **given,
            **sampling,
        }

    def embed(self, adapter: str, instruction: str) -> Any:
        """The embedding [1, d_c] of an instruction, by the encoder that the adapter's configuration names."""
        if adapter == BASE:
            raise HTTPException(400, f"{BASE} is the model without an adapter, and takes no instruction.")
        try:
            return self.model.base_model.instruction_encoder(adapter)([instruction])
        except ValueError as error:
            raise HTTPException(400, str(error)) from error

    async def answer(self, asked: Asked) -> Answer:
        arguments = await asyncio.get_running_loop().run_in_executor(self.pool, self.arguments, asked)
        return Answer(self.model, self.tokenizer, arguments, self.pool)

    def report(self, asked: Asked, text: str, answer: Answer | None = None) -> dict[str, Any]:
        """A piece of a stream, or, with the `answer` that has ended, the last piece or a whole completion."""
        if answer is None:
            return {"object": "text_completion", "model": asked.model, "choices": [choice(text, None)]}
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        reason = "stop" if len(answer.ids) and answer.ids[-1].item() in ends else "length"
        return {
            "object": "text_completion",
            "model": asked.model,
            "choices": [choice(text, reason)],
            "usage": {"completion_tokens": len(answer.ids)},
        }

    async def events(self, asked: Asked, answer: Answer) -> AsyncIterator[str]:
        """Server-sent events, the last of which is [DONE]; a stream without it has failed."""
        async with aclosing(answer.pieces()) as pieces:
            async for piece in pieces:
                yield event(self.report(asked, piece))
        yield event(self.report(asked, "", answer))
        yield "data: [DONE]\n\n"


def choice(text: str, reason: str | None) -> dict[str, Any]:
    return {"index": 0, "text": text, "finish_reason": reason}


def event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def make_app(service: Service) -> FastAPI:
    """The routes of `service`: GET /v1/models and POST /v1/completions."""
    app = FastAPI(title="Queryable LoRA")

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model"} for name in service.names]}

    @app.post("/v1/completions", response_model=None)
    async def completions(asked: Asked, request: Request) -> Response | dict[str, Any]:
        answer = await service.answer(asked)
        if asked.stream:
            return StreamingResponse(service.events(asked, answer), media_type="text/event-stream")
        async with aclosing(answer.pieces()) as pieces:
            async for _ in pieces:
                if await request.is_disconnected():
                    return Response(status_code=499)  # nobody reads it
        text = service.tokenizer.decode(answer.ids, skip_special_tokens=True)
        return service.report(asked, text, answer)

    return app
