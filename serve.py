"""serve.py, week 12: every trained rung behind an API that OpenAI's clients speak, and a page to play with.

A server adds nothing to what a model computes. It takes requests as they come, lets those of one model share
each pass (continuous batching, Yu et al. 2022), sends each token as soon as it is drawn, and says no in time.
It holds no model code: each rung's own is used, by the name in its checkpoint.

Run it with: python serve.py, or with --help to see every flag.
"""

import argparse
import asyncio
import contextlib
import hmac
import importlib
import inspect
import json
import os
import random
import re
import sys
import threading
import time
import uuid
from collections import deque
from dataclasses import dataclass, fields
from html import escape
from pathlib import Path
from typing import Annotated, Literal

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # nobody is told that this runs

import gradio as gr
import matplotlib.pyplot as plt
import prometheus_client
import torch
import torch.nn.functional as F
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from torch.overrides import TorchFunctionMode

import rag
import v7_quantize as v7
import v8_lora as v8
from bpe_tokenizer import TokenizerError

# --------------------------------------------- config ---------------------------------------------

# What may be imported by the name in a checkpoint.
RUNGS = ("v0_bigram", "v1_mlp", "v2_attention", "v3_gpt", "v4_rope_alibi", "v5_gpt2", "v6_amp_ddp")
RUNGS += ("v7_quantize", "v8_lora", "v9_rlhf")
BATCHED, CHATTING = RUNGS[5:], RUNGS[8:]  # with a cache for many texts at once; with a template for turns
# What is trained where there is no model: seconds, seconds, half a minute.
FIRST = (["v0_bigram.py"], ["v1_mlp.py"], ["v3_gpt.py", "--max_steps", "500", "--warmup_steps", "50"])
KEY = os.environ.get("SERVE_API_KEY", "")  # if it is set, every request must carry it


@dataclass
class Config:
    """Every field is a command-line flag of the same name: --port 8080."""

    runs: str = "runs"  # folder whose subfolders hold the models
    host: str = "127.0.0.1"  # address to listen at; 0.0.0.0: at all of this machine's
    port: int = 8000  # port to listen at
    names: str = ""  # more host names, separated by commas, under which browsers may reach the server
    quantize: str = "none"  # weights of v5 to v9 as int8 or int4
    n_rows: int = 16  # requests that a model works on at once
    max_waiting: int = 256  # requests that may wait for a model
    max_tokens: int = 1000  # tokens that a request may ask for
    max_prompt: int = 20_000  # characters of a prompt
    max_body: int = 1_000_000  # bytes of a request
    max_seconds: float = 120.0  # time that a request may take once it is at work
    device: str = "auto"  # auto, cuda, mps or cpu

    def __post_init__(self):
        for name, value in vars(self).items():
            if type(value) in (int, float) and value <= 0:
                sys.exit(f"error: --{name} {value} is impossible, it must be positive")
        if self.quantize not in v7.KINDS:
            sys.exit(f"error: no --quantize {self.quantize}, choose from: {', '.join(v7.KINDS)}")


def parse_flags():
    """Return the Config of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: sys.exit(f"error: {message}; --help lists every flag")
    # --help shows the comment beside each field of Config
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(Config), re.MULTILINE))
    for field in fields(Config):
        meaning = f"{comments.get(field.name, '')} (default: {field.default!r})".replace("%", "%%")
        parser.add_argument(f"--{field.name}", type=field.type, default=field.default, help=meaning)
    return Config(**vars(parser.parse_args()))


# --------------------------------------------- models ---------------------------------------------


class Refused(Exception):
    """What a request asks for cannot be done; `status` and `code` are those of the answer."""

    def __init__(self, message, status=400, code="invalid_request_error", param=None):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


class OneByOne:
    """Continues a text with a rung that has no cache, as v8's Engine does with one row."""

    def __init__(self, model, window):
        self.model, self.window, self.sequences = model.eval(), window, [None]

    def add(self, ids, config, stop=None):
        """Take in a list of ids, to be continued as `config` says; return its row."""
        generator = torch.Generator(next(self.model.parameters()).device).manual_seed(config.seed)
        self.sequences[0] = v8.Sequence(list(ids), config, stop, config.max_new_tokens, 0, generator)
        return 0

    def remove(self, row):
        """Forget the text; return its ids."""
        sequence, self.sequences[row] = self.sequences[row], None
        return sequence.ids

    @torch.inference_mode()
    def step(self):
        """Draw the next id; return {0: id}."""
        sequence = self.sequences[0]
        idx = torch.tensor([sequence.ids[-self.window :]], device=sequence.generator.device)
        logits = self.model(idx)[:, -1]  # (1, V)
        new = v8.sample_next(logits, sequence.config, sequence.generator).item()
        sequence.ids.append(new)
        sequence.n_left = 0 if new == sequence.stop else sequence.n_left - 1
        return {0: new}


class Job:
    """One text to be continued. A thread puts ids in, the coroutine of its request takes them out."""

    def __init__(self, ids, config, stop, loop):
        self.ids, self.config, self.stop, self.loop = ids, config, stop, loop
        self.new, self.gone = asyncio.Queue(), False  # None ends it, an exception breaks it off

    def put(self, item):
        """Called in the thread of the model."""
        with contextlib.suppress(RuntimeError):  # the server is closing
            self.loop.call_soon_threadsafe(self.new.put_nowait, item)


class Served:
    """A model, its tokenizer, and the thread that works on its requests."""

    def __init__(self, name, folder, config):
        self.name, self.config, self.created = name, config, int((folder / "checkpoint.pt").stat().st_mtime)
        self.version = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)["version"]
        if self.version not in RUNGS:
            raise ValueError(f"it was saved by {self.version}")
        rung = importlib.import_module(self.version)
        device = v8.pick_device(config.device)
        if self.version == "v7_quantize":
            checkpoint, own = v7.load_checkpoint("sample", {}, str(folder))
            model = v7.load_model(checkpoint["model"], own, device)
        elif self.version in BATCHED:
            checkpoint, own = v8.load_checkpoint("train", {}, str(folder))
            model = v8.LanguageModel(own, own.vocab_size).to(device)
            v8.load_weights(model, checkpoint["model"])
            if config.quantize != "none":
                model = v7.quantize(model, v7.Config(quantize=config.quantize))
        else:
            checkpoint, own = rung.load_checkpoint("sample", {"out_dir": str(folder)})
            model = rung.LanguageModel(own, len(v8.make_tokenizer(checkpoint["vocab"]).vocab)).to(device)
            rung.load_weights(model, checkpoint["model"])
        self.model, self.folder = model.eval(), folder
        self.tokenizer, self.window = v8.make_tokenizer(checkpoint["vocab"]), own.block_size
        batched = self.version in BATCHED
        self.engine = v8.Engine(model, config.n_rows) if batched else OneByOne(model, own.block_size)
        self.params = sum(p.numel() for p in checkpoint["model"].values())
        self.metrics = {}
        with contextlib.suppress(OSError, ValueError):
            self.metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        self.waiting, self.changed, self.n_working = deque(), threading.Condition(), 0
        threading.Thread(target=self.work, name=name, daemon=True).start()

    @property
    def chats(self):
        """Whether it answers turns."""
        return self.version in CHATTING

    @property
    def end(self):
        """The id that ends an answer; None if the model was never taught one."""
        return self.tokenizer.special_tokens.get("<|endoftext|>") if self.chats else None

    def encode(self, text):
        """Text to ids, of an empty one where a sample starts; Refused if the vocabulary lacks a character."""
        try:
            return self.tokenizer.encode(text) or self.tokenizer.encode("\n") or [0]
        except (SystemExit, TokenizerError) as error:
            reason = str(error).removeprefix("error: ").partition(";")[0]
            raise Refused(f"{self.name} cannot read this prompt: {reason}", param="prompt") from None

    def encode_turns(self, turns):
        """A conversation, a list of (role, text), to ids; the oldest turns are left out where it is long."""
        try:
            fitting = v8.Config(block_size=self.window, max_new_tokens=min(100, self.window // 2))
            return v8.fit_window(turns, self.tokenizer, fitting)
        except (SystemExit, TokenizerError) as error:
            reason = str(error).removeprefix("error: ").partition(";")[0]
            raise Refused(f"{self.name} cannot read this: {reason}", param="messages") from None

    def submit(self, jobs):
        """Let jobs wait for their turn; Refused if too many do."""
        with self.changed:
            if len(self.waiting) + len(jobs) > self.config.max_waiting:
                raise Refused(f"{len(self.waiting)} requests wait for {self.name} already", 429, "overloaded")
            self.waiting.extend(jobs)
            self.changed.notify()

    def work(self):
        """The thread: take in what waits while there are rows, draw a token for each row, and so on."""
        working = {}  # row: (job, when it must end)
        while True:
            with self.changed:
                while not self.waiting and not working:
                    self.changed.wait()
                while self.waiting and None in self.engine.sequences:
                    job = self.waiting.popleft()
                    if not job.gone:
                        row = self.engine.add(job.ids, job.config, job.stop)
                        working[row] = job, time.monotonic() + self.config.max_seconds
            self.n_working = len(working)
            try:
                new = self.engine.step() if working else {}
            except Exception as error:  # a bug: those at work are told, the server goes on
                print(f"error: {self.name}: {error!r}", file=sys.stderr)
                for row, (job, _) in working.items():
                    job.put(error)
                    self.engine.remove(row)
                working = {}
                continue
            for row, (job, deadline) in list(working.items()):
                if row in new and new[row] != job.stop:
                    job.put(new[row])
                left = self.engine.sequences[row].n_left
                if not left or job.gone or time.monotonic() > deadline:
                    job.put(None)
                    self.engine.remove(row)
                    del working[row]
            self.n_working = len(working)


def find_models(config):
    """All models below --runs that can be served, {name: Served}; of the others a note says why not."""
    found = {}
    for path in sorted(Path(config.runs).glob("*/checkpoint.pt")):
        try:
            found[path.parent.name] = Served(path.parent.name, path.parent, config)
        except (Exception, SystemExit) as error:  # a file that is cut short or something else altogether
            reason = str(error).split("\n")[0].removeprefix("error: ")
            print(f"note: {path.parent} is not served: {reason}", file=sys.stderr)
    return found


# -------------------------------------------- requests --------------------------------------------

Text = Annotated[str, Field(max_length=100_000)]
# Of what is not supported, the values that change nothing.
Zero = Annotated[float | None, Field(ge=0, le=0)]
One = Annotated[int | None, Field(ge=1, le=1)]
No = Annotated[bool | None, Field(le=False)]


class Asked(BaseModel):
    """What completions and chat completions may ask for. What is not supported is refused, not ignored."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: Text
    stream: bool = False
    stream_options: dict[Literal["include_usage"], bool] | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(1.0, ge=0, le=10, allow_inf_nan=False)
    top_p: float | None = Field(1.0, gt=0, le=1, allow_inf_nan=False)
    n: int | None = Field(1, ge=1, le=16)
    seed: int | None = Field(None, ge=0, lt=2**31)
    stop: Text | list[Text] | None = Field(None)
    user: Text | None = None  # who asks: taken in, of no use here
    presence_penalty: Zero = 0
    frequency_penalty: Zero = 0
    logit_bias: dict[str, Zero] | None = None


class Completion(Asked):
    """The body of POST /v1/completions."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=16)]
    echo: No = False
    best_of: One = None
    suffix: Literal["", None] = None
    logprobs: None = None


class Part(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """A turn. A system message is what the model reads before the questions: its context."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part]
    name: Text | None = None

    @property
    def turn(self):
        """(role, text) as the rungs have it."""
        text = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)
        return {"system": "context", "developer": "context"}.get(self.role, self.role), text


class ChatCompletion(Asked):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: No = False
    top_logprobs: None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None


def sampling(asked, config, seed):
    """How to draw the tokens that a request asks for."""
    wanted = asked.max_tokens
    if isinstance(asked, ChatCompletion) and asked.max_completion_tokens is not None:
        if wanted not in (None, asked.max_completion_tokens):
            raise Refused("max_tokens and max_completion_tokens differ", param="max_tokens")
        wanted = asked.max_completion_tokens
    default = 100 if isinstance(asked, ChatCompletion) else 16  # the second is OpenAI's
    if (wanted or default) > config.max_tokens:
        raise Refused(
            f"at most {config.max_tokens} tokens can be asked for, not {wanted}", param="max_tokens"
        )
    temperature = 1.0 if asked.temperature is None else asked.temperature
    settings = {"seed": seed, "max_new_tokens": wanted or default}
    if temperature == 0:
        return v8.Config(greedy=True, **settings)
    return v8.Config(temperature=max(temperature, 1e-3), top_p=asked.top_p or 1.0, **settings)


def stops_of(asked):
    """The texts that end an answer."""
    stops = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
    if len(stops) > 4 or "" in stops:
        raise Refused("stop takes at most four texts, none of them empty", param="stop")
    return stops


class Writer:
    """Makes text of ids as they come, and finds where it stops."""

    def __init__(self, tokenizer, stops):
        self.tokenizer, self.stops, self.ids, self.sent, self.reason = tokenizer, stops, [], 0, None

    def text(self, ended):
        """The text so far; until it has ended, without a character or a stop that may have only begun."""
        text = self.tokenizer.decode(self.ids)
        found = [at for at in (text.find(stop) for stop in self.stops) if at >= 0]
        if found:
            self.reason = "stop"
            return text[: min(found)]
        if not ended:
            text = text.rstrip("\ufffd")
            begun = (n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
            text = text[: len(text) - max(begun, default=0)]
        return text

    def add(self, new):
        """Take in an id, or None for the end; return the text that is new."""
        if new is not None:
            self.ids.append(new)
        text = self.text(ended=new is None)
        piece, self.sent = text[self.sent :], max(self.sent, len(text))
        return piece


async def write(job, writer, request):
    """The pieces of a job's text, as they come, and None when nothing happens for a while."""
    looked = time.monotonic()
    try:
        while writer.reason is None:
            if time.monotonic() - looked > 0.5:
                looked = time.monotonic()
                if await request.is_disconnected():
                    return
            try:
                new = await asyncio.wait_for(job.new.get(), timeout=1.0)
            except asyncio.TimeoutError:
                continue
            if isinstance(new, Exception):
                raise Refused("the model has failed, the server's own output says why", 500, "server_error")
            if piece := writer.add(new):
                yield piece
            if new is None:
                full = len(writer.ids) >= job.config.max_new_tokens
                writer.reason = writer.reason or ("length" if full or job.stop is None else "stop")
    finally:
        job.gone = True  # it frees its row


# ---------------------------------------------- HTTP ----------------------------------------------


def error(message, status=400, code="invalid_request_error", param=None, headers=None):
    """An answer in the form that OpenAI's clients understand."""
    body = {"message": message, "type": code, "param": param, "code": code}
    return JSONResponse({"error": body}, status, headers)


class Guard:
    """Looks at each request first: host name, key, size. count(path, status) is told how it ended."""

    def __init__(self, api, page, config, count):
        self.api, self.page, self.config, self.count = api, page, config, count
        known = {"localhost", "127.0.0.1", "[::1]", *config.names.split(",")} - {""}
        self.hosts = known | ({config.host} - {"0.0.0.0", "::"})

    async def __call__(self, scope, receive, send):
        """An ASGI application (Python's standard for asynchronous web servers)."""
        if scope["type"] != "http":
            if scope["type"] == "websocket" and self.refusal(dict(scope["headers"])):
                return
            return await self.page(scope, receive, send)
        size = 0

        async def counted(message):
            if message["type"] == "http.response.start":
                self.count(scope["path"], message["status"])
            await send(message)

        if refusal := self.refusal(dict(scope["headers"])):
            return await refusal(scope, receive, counted)

        async def limited():
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.config.max_body:  # the sender gave no length, or a wrong one
                raise HTTPException(413, f"a request has at most {self.config.max_body:,} bytes")
            return message

        is_api = re.match("/(v1|health|metrics)(/|$)", scope["path"])
        await (self.api if is_api else self.page)(scope, limited, counted)

    def refusal(self, headers):
        """What to answer to a request with these headers, None if it may go on."""
        host = re.sub(r":\d+$", "", headers.get(b"host", b"").decode("latin-1")).lower()
        if (
            host not in self.hosts and "*" not in self.hosts
        ):  # a page elsewhere may have given our address a name
            return error(f"this server is not called {host!r}, see --names", 421, "invalid_host")
        given = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
        if KEY and not hmac.compare_digest(given, KEY.encode()):
            basic = {"WWW-Authenticate": "Bearer"}
            return error(
                "no key, or a wrong one, in the header Authorization", 401, "invalid_api_key", None, basic
            )
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.config.max_body:
            return error(f"a request has at most {self.config.max_body:,} bytes", 413, "too_large")
        return None


def make_app(models, config):
    """The server of {name: Served}."""
    app = FastAPI(title="serve.py", docs_url=None, redoc_url=None, openapi_url=None)
    registry = prometheus_client.CollectorRegistry()
    counters = {"requests": "requests by status", "tokens": "tokens drawn", "prompt_tokens": "tokens read"}
    labels = {"requests": ["route", "status"]}
    counts = {
        name: prometheus_client.Counter(name, meaning, labels.get(name, ["model"]), registry=registry)
        for name, meaning in counters.items()
    }
    seconds = prometheus_client.Histogram(
        "first_token_seconds", "until the first token", ["model"], registry=registry
    )
    for name, of in {"waiting": lambda m: len(m.waiting), "working": lambda m: m.n_working}.items():
        gauge = prometheus_client.Gauge(name, f"requests {name}", ["model"], registry=registry)
        for model in models.values():
            gauge.labels(model.name).set_function(lambda model=model, of=of: of(model))

    @app.exception_handler(Refused)
    async def refused(request, reason):
        headers = {"Retry-After": "1"} if reason.status == 429 else None
        return error(str(reason), reason.status, reason.code, reason.param, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request, reason):
        first = reason.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return error(f"{where or 'the body'}: {first['msg']}", param=where or None)

    @app.exception_handler(HTTPException)
    async def http(request, reason):
        return error(str(reason.detail), reason.status_code)

    def count(path, status):
        route = path if path in {route.path for route in app.routes} else "other"
        counts["requests"].labels(route, status).inc()

    @app.get("/health")
    async def health():
        return {"status": "ok", "models": len(models)}

    @app.get("/metrics")
    async def metrics():
        return PlainTextResponse(
            prometheus_client.generate_latest(registry), media_type="text/plain; version=0.0.4"
        )

    def describe(model):
        told = {"id": model.name, "object": "model", "created": model.created, "owned_by": model.version}
        return told | {"chats": model.chats, "params": model.params, "window": model.window}

    @app.get("/v1/models")
    async def list_models():
        return {"object": "list", "data": [describe(model) for model in models.values()]}

    @app.get("/v1/models/{name}")
    async def one_model(name: str):
        return describe(find(name))

    def find(name):
        if name not in models:
            known = ", ".join(models)
            raise Refused(
                f"there is no model {name[:80]!r}, choose from: {known}", 404, "model_not_found", "model"
            )
        return models[name]

    @app.post("/v1/completions")
    async def complete(asked: Completion, request: Request):
        model = find(asked.model)
        prompts = [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt
        if sum(map(len, prompts)) > config.max_prompt:
            raise Refused(f"a prompt has at most {config.max_prompt:,} characters", param="prompt")
        return await respond(asked, request, model, [model.encode(prompt) for prompt in prompts], None)

    @app.post("/v1/chat/completions")
    async def chat(asked: ChatCompletion, request: Request):
        model = find(asked.model)
        if not model.chats:
            able = ", ".join(name for name, other in models.items() if other.chats) or "none"
            raise Refused(f"{model.name} has not learned to answer; those that have: {able}", param="model")
        turns = [message.turn for message in asked.messages]
        if turns[-1][0] != "user" or sum(len(text) for _, text in turns) > config.max_prompt:
            reason = f"the last message must be the user's, all at most {config.max_prompt:,} characters"
            raise Refused(reason, param="messages")
        return await respond(asked, request, model, [model.encode_turns(turns)], model.end)

    async def respond(asked, request, model, prompts, end):
        """Answer a request for continuations of lists of ids, each asked.n times."""
        stops, n, loop = stops_of(asked), asked.n or 1, asyncio.get_running_loop()
        seed = random.randrange(2**30) if asked.seed is None else asked.seed
        jobs = [
            Job(ids, sampling(asked, config, (seed + i * n + j) % 2**31), end, loop)
            for i, ids in enumerate(prompts)
            for j in range(n)
        ]
        model.submit(jobs)
        counts["prompt_tokens"].labels(model.name).inc(sum(map(len, prompts)))
        chatting, start = isinstance(asked, ChatCompletion), time.monotonic()
        kind = "chat.completion" if chatting else "text_completion"
        head = {"id": f"{'chatcmpl' if chatting else 'cmpl'}-{uuid.uuid4().hex}", "created": int(time.time())}
        head |= {"model": model.name}
        writers = [Writer(model.tokenizer, stops) for _ in jobs]

        async def pieces(i):
            first = True
            async for piece in write(jobs[i], writers[i], request):
                if first:
                    seconds.labels(model.name).observe(time.monotonic() - start)
                first = False
                yield piece

        def usage():
            written = sum(len(writer.ids) for writer in writers)
            read = sum(map(len, prompts))
            counts["tokens"].labels(model.name).inc(written)
            return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

        if not asked.stream:

            async def whole(i):
                return "".join([piece async for piece in pieces(i)])

            texts = await asyncio.gather(*(whole(i) for i in range(len(jobs))))
            choices = []
            for i, (text, writer) in enumerate(zip(texts, writers, strict=True)):
                said = {"message": {"role": "assistant", "content": text}} if chatting else {"text": text}
                choices.append(
                    {"index": i, **said, "logprobs": None, "finish_reason": writer.reason or "stop"}
                )
            return head | {"object": kind, "choices": choices, "usage": usage()}

        def event(choices, **more):
            name = "chat.completion.chunk" if chatting else kind
            return f"data: {json.dumps(head | {'object': name, 'choices': choices} | more)}\n\n"

        def choice(i, text, reason=None, role=False):
            said = {"delta": ({"role": "assistant"} if role else {}) | ({"content": text} if text else {})}
            return [
                {
                    "index": i,
                    **(said if chatting else {"text": text}),
                    "logprobs": None,
                    "finish_reason": reason,
                }
            ]

        async def events():
            queue, left = asyncio.Queue(), len(jobs)

            async def run(i):
                try:
                    async for piece in pieces(i):
                        await queue.put(event(choice(i, piece)))
                    await queue.put(event(choice(i, "", writers[i].reason or "stop")))
                except Refused as reason:
                    await queue.put(f"data: {error(str(reason), 500, reason.code).body.decode()}\n\n")
                await queue.put(None)

            tasks = [asyncio.create_task(run(i)) for i in range(len(jobs))]
            try:
                for i in range(len(jobs) if chatting else 0):
                    yield event(choice(i, "", role=True))
                while left:
                    item = await queue.get()
                    left -= item is None
                    if item is not None:
                        yield item
                if (asked.stream_options or {}).get("include_usage"):
                    yield event([], usage=usage())
                else:
                    usage()
                yield "data: [DONE]\n\n"
            finally:  # also when the client has left
                for task, job in zip(tasks, jobs, strict=True):
                    task.cancel()
                    job.gone = True

        return StreamingResponse(
            events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
        )

    page = make_page(models)
    fonts = [gr.themes.Font("system-ui"), "sans-serif"]  # no font from elsewhere
    theme = gr.themes.Default(font=fonts, font_mono=[gr.themes.Font("ui-monospace"), "monospace"])
    settings = {"theme": theme, "css": CSS, "footer_links": [], "ssr_mode": False}
    page_app = gr.mount_gradio_app(FastAPI(), page, path="/", **settings)
    return Guard(app, page_app, config, count)


# ------------------------------------------- playground -------------------------------------------

CSS = """
.card textarea { font-family: ui-monospace, monospace; font-size: 0.85rem; }
.bars { width: 100%; border-collapse: collapse; font-family: ui-monospace, monospace; }
.bars td { padding: 1px 6px; white-space: pre; }
.bars td:last-child { width: 99%; }
.bars div { background: var(--color-accent); height: 1em; min-width: 1px; }
.passage { border-left: 3px solid var(--border-color-primary); padding-left: 0.8em; white-space: pre-wrap; }
.passage { margin: 0.7em 0; }
.passage.read { border-color: var(--color-accent); }
"""


def label(model):
    """What stands above a model's text."""
    bits = model.metrics.get("bits_per_char")
    told = f", {bits:.2f} bits a character" if isinstance(bits, float) else ""
    return f"{model.name}: {model.params:,} parameters{told}"


async def continuations(wanted):
    """Go on with several texts at once, {key: (model, ids, Config, stop)}: yields {key: (text, is_done)}."""
    loop, jobs, writers, found = asyncio.get_running_loop(), {}, {}, {}
    start = time.monotonic()
    try:
        for key, (model, ids, config, stop) in wanted.items():
            job = Job(ids, config, stop, loop)
            try:
                model.submit([job])
            except Refused as reason:
                found[key] = f"({reason})", True
                continue
            jobs[key], writers[key], found[key] = job, Writer(model.tokenizer, []), ("", False)
        while going := [key for key, (_, is_done) in found.items() if not is_done]:
            await asyncio.sleep(0.05)
            for key in going:
                text, is_done = found[key]
                while not jobs[key].new.empty() and not is_done:
                    new = jobs[key].new.get_nowait()
                    if isinstance(new, Exception):
                        text, is_done = "(the model has failed)", True
                    else:
                        text, is_done = text + writers[key].add(new), new is None
                found[key] = text, is_done
            seconds = time.monotonic() - start
            yield found, {key: len(writer.ids) / seconds for key, writer in writers.items()}
    finally:
        for job in jobs.values():
            job.gone = True


def drawing(temperature, top_k, top_p, seed, n):
    """The Config of what the page's sliders say."""
    settings = {"seed": int(seed or 0) % 2**31, "max_new_tokens": int(n)}
    if temperature == 0:
        return v8.Config(greedy=True, **settings)
    return v8.Config(temperature=temperature, top_k=int(top_k), top_p=top_p, **settings)


class Watch(TorchFunctionMode):
    """Keeps the attention weights of each layer while a model reads: (n_head, T, T)."""

    def __init__(self):
        super().__init__()
        self.layers = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            q, k = args[0][0], args[1][0]  # (n_head, T, head_size)
            scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
            if (mask := kwargs.get("attn_mask")) is not None and mask.dtype != torch.bool:
                scores = scores + mask
            later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            self.layers.append(scores.masked_fill(later, -torch.inf).softmax(dim=-1))
        return function(*args, **kwargs)


@torch.inference_mode()
def read(model, prompt, watch=False):
    """The logits (V,) that follow a prompt, its ids, and what the heads of each layer attend to."""
    ids = model.encode(prompt)[-model.window :]
    idx = torch.tensor([ids], device=next(model.model.parameters()).device)
    with Watch() as watched:
        logits = model.model(idx)[0, -1]
    layers = watched.layers
    if watch and model.version == "v2_attention":
        x = model.model.embed(idx)
        layers = [torch.cat([head.weights(x) for head in model.model.attention.heads])]
    return logits, ids, layers


def shown(text):
    """A token as one can see it."""
    return ascii(text)[1:-1] if not text.isprintable() else text.replace(" ", "\u2423")


def next_tokens(model, prompt, temperature, top_k, top_p, n=12):
    """The n likeliest next tokens: [(id, text, probability before, probability that is drawn with)]."""
    logits, _, _ = read(model, prompt)
    before = logits.softmax(dim=-1)
    values, order = logits.sort(descending=True)
    drawn = torch.zeros_like(values)
    if temperature == 0:
        drawn[0] = 1
    else:
        drawn = ((values - values[0]) / temperature).softmax(dim=-1)
        if top_k:
            drawn[int(top_k) :] = 0
        if top_p < 1:
            drawn = drawn / drawn.sum()
            drawn[drawn.cumsum(dim=0) - drawn >= top_p] = 0
        drawn = drawn / drawn.sum()
    ids = order[:n].tolist()
    return [(i, model.tokenizer.decode([i]), before[i].item(), drawn[j].item()) for j, i in enumerate(ids)]


def bars(rows):
    """next_tokens as a table of bars."""
    lines = [
        f"<tr><td>{escape(shown(text))}</td><td>{after:7.2%}</td>"
        f"<td><div style='width:{100 * after:.2f}%'></div></td></tr>"
        for _, text, _, after in rows
    ]
    return f"<table class='bars' aria-label='next tokens and their probabilities'>{''.join(lines)}</table>"


def draw_attention(model, prompt, layer, head):
    """A heat map of who reads from whom in one head."""
    _, ids, layers = read(model, prompt, watch=True)
    fig, ax = plt.subplots(figsize=(6, 6), layout="constrained")
    if not layers:
        ax.text(0.5, 0.5, f"{model.name} has no attention", ha="center")
        ax.axis("off")
    else:
        layer, head = min(int(layer), len(layers)) - 1, min(int(head), len(layers[0])) - 1
        n = min(len(ids), 40)
        labels = [shown(model.tokenizer.decode([i])) for i in ids[-n:]]
        ax.imshow(layers[layer][head, -n:, -n:].cpu(), cmap="Blues", vmin=0, vmax=1)
        ax.set(title=f"layer {layer + 1}, head {head + 1}", xlabel="reads from", ylabel="reader")
        ax.set_xticks(range(n), labels, rotation=90)
        ax.set_yticks(range(n), labels)
    plt.close(fig)
    return fig


def make_page(models):
    """The playground: all rungs side by side, the next token, a conversation, questions about passages."""
    names, chatting = list(models), [name for name in models if models[name].chats]
    with gr.Blocks(title="The ladder", analytics_enabled=False) as page:
        gr.Markdown("# The ladder\nOne prompt, every rung.")
        with gr.Tab("Ladder"):
            prompt = gr.Textbox("ROMEO:\n", label="Prompt", lines=3, max_length=20_000)
            with gr.Row():
                n = gr.Slider(10, 300, 100, step=10, label="tokens")
                temperature = gr.Slider(0, 2, 0.8, step=0.1, label="temperature (0: the likeliest)")
                seed = gr.Number(1, label="seed", precision=0)
            go = gr.Button("Continue", variant="primary")
            with gr.Row():
                cards = [
                    gr.Textbox(
                        label=label(models[name]), lines=8, max_lines=8, min_width=300, elem_classes="card"
                    )
                    for name in names
                ]

            async def climb(prompt, n, temperature, seed):
                config, wanted, texts = drawing(temperature, 0, 1.0, seed, n), {}, {}
                for name in names:
                    try:
                        wanted[name] = models[name], models[name].encode(prompt), config, models[name].end
                    except Refused as reason:
                        texts[name] = f"({reason})"
                async for found, speed in continuations(wanted):
                    for name, (text, is_done) in found.items():
                        rate = f"\n\n[{speed.get(name, 0):.0f} tokens/s]" if is_done and name in speed else ""
                        texts[name] = prompt + text + rate
                    yield [texts.get(name, "") for name in names]
                yield [texts.get(name, "") for name in names]

            inputs = [prompt, n, temperature, seed]
            gr.on(
                [go.click, prompt.submit], climb, inputs, cards, concurrency_limit=8, api_visibility="private"
            )

        with gr.Tab("Next token"):
            with gr.Row():
                which = gr.Dropdown(names, value=names[-1], label="model")
                heat = gr.Slider(0, 2, 1.0, step=0.1, label="temperature")
                k = gr.Slider(0, 50, 0, step=1, label="top-k (0: all)")
                p = gr.Slider(0.05, 1, 1.0, step=0.05, label="top-p")
            text = gr.Textbox("ROMEO:\nI", label="Prompt", lines=3, max_length=20_000)
            chart = gr.HTML()
            choice = gr.Radio([], label="choose the next token")
            with gr.Row():
                layer = gr.Number(1, label="layer", precision=0, minimum=1)
                head = gr.Number(1, label="head", precision=0, minimum=1)
            picture = gr.Plot(label="attention")

            def look(name, prompt, temperature, top_k, top_p, layer, head):
                try:
                    rows = next_tokens(models[name], prompt, temperature, top_k, top_p)
                    options = [(f"{shown(text)}  {after:.1%}", text) for _, text, _, after in rows if after]
                    figure = draw_attention(models[name], prompt, layer, head)
                except Refused as reason:
                    return f"<p>{escape(str(reason))}</p>", gr.Radio(choices=[], value=None), None
                return bars(rows), gr.Radio(choices=options, value=None), figure

            inputs, outputs = [which, text, heat, k, p, layer, head], [chart, choice, picture]
            events = [page.load, *(part.change for part in inputs)]
            gr.on(events, look, inputs, outputs, show_progress="hidden", api_visibility="private")
            choice.input(lambda text, new: text + (new or ""), [text, choice], text, api_visibility="private")

        with gr.Tab("Chat"):
            if not chatting:
                gr.Markdown("No model has learned to answer yet: `python v8_lora.py` teaches one.")
            said = gr.Textbox(
                label="You", placeholder="Good morrow, cousin. Answer as ROMEO.", max_length=2000
            )
            with gr.Row():
                boxes = [
                    gr.Chatbot(label=label(models[name]), height=400, min_width=300) for name in chatting
                ]
            clear = gr.Button("Begin anew")

            async def talk(said, *histories):
                asked = [[*history, {"role": "user", "content": said}] for history in histories]
                wanted = {}
                for i, name in enumerate(chatting):
                    turns = [(turn["role"], plain(turn["content"])) for turn in asked[i]]
                    try:
                        ids = models[name].encode_turns(turns)
                        wanted[i] = models[name], ids, drawing(0.7, 0, 1.0, 1, 100), models[name].end
                    except Refused as reason:
                        asked[i].append({"role": "assistant", "content": f"({reason})"})
                async for found, _ in continuations(wanted):
                    answers = [
                        [*history, {"role": "assistant", "content": found[i][0]}] if i in found else history
                        for i, history in enumerate(asked)
                    ]
                    yield ["", *answers]

            if chatting:
                said.submit(
                    talk, [said, *boxes], [said, *boxes], concurrency_limit=8, api_visibility="private"
                )
                clear.click(lambda: [[] for _ in boxes], None, boxes, api_visibility="private")

        with gr.Tab("Ask"):
            question = gr.Textbox(label="Question", value="Who says: Asses are made to bear", max_length=2000)
            passages, answer = gr.HTML(), gr.Textbox(label="Answer")
            if chatting:
                find = finder(models[chatting[0]])
                question.submit(
                    find, question, [passages, answer], concurrency_limit=1, api_visibility="private"
                )
            else:
                gr.Markdown("No model has learned to answer yet: `python v8_lora.py` teaches one.")
    return page


def plain(content):
    """The text of what a Chatbot holds."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def finder(model):
    """A function from a question to its passages as HTML and the answer; the index is opened at the first."""
    opened = []

    def find(question):
        try:
            if not re.search(r"\w", question):
                raise Refused("the question is empty")
            if not opened:
                settings = rag.Config(model=str(model.folder))
                library = rag.Library(settings, rag.HashedWords()).open(rag.read_texts(settings))
                opened.extend([library, rag.Reader(settings)])
            library, reader = opened
            found = library.search(question, 3)
            if found[0][0] < library.embedder.threshold:
                return "", f"nothing found: the best passage scores {found[0][0]:.2f}"
            prompt, _ = reader.prompt(question, [found[0][1]])
            parts = [
                f"<div class='passage{' read' * (i == 0)}'><b>{score:.2f}</b> {escape(p.place)}\n"
                f"{escape(p.shown)}</div>"
                for i, (score, p) in enumerate(found)
            ]
            return "".join(parts), reader.answer([prompt])[0]
        except (Refused, SystemExit, TokenizerError) as reason:
            return "", f"({str(reason).removeprefix('error: ')})"

    return find


# ---------------------------------------------- main ----------------------------------------------


def train_first(config):
    """Where there is no model at all, train three small ones."""
    import subprocess

    print(
        f"there is no model in {config.runs}: trains v0, v1 and a short v3 first, a minute on two cores",
        flush=True,
    )
    for script, *flags in FIRST:
        path = Path(__file__).with_name(script)
        out_dir = Path(config.runs, path.stem)
        if subprocess.run([sys.executable, path, *flags, "--out_dir", out_dir]).returncode:
            sys.exit(f"error: {script} has failed")


def main():
    config = parse_flags()
    if not any(Path(config.runs).glob("*/checkpoint.pt")):
        train_first(config)
    models = find_models(config)
    if not models:
        sys.exit(f"error: no model in {config.runs} can be served")
    for name, model in models.items():
        print(f"{name:>20} {model.version}, {model.params:,} parameters")
    address = f"http://{config.host}:{config.port}"
    print(f"serves {len(models)} models: the page {address}, the API {address}/v1", flush=True)
    uvicorn.run(make_app(models, config), host=config.host, port=config.port, log_level="warning")


if __name__ == "__main__":
    main()
