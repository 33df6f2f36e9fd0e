"""serve.py, week 12: every trained rung behind an API that OpenAI's clients speak, and a page to play with.

A server adds nothing to what a model computes. It takes requests as they come, lets those of one model share
each pass (continuous batching, Yu et al. 2022), sends each token as soon as it is drawn, and says no in time.
It holds no model code: each rung's own is used, by the name in its checkpoint.

Run it with: python serve.py, or with --help to see every flag.
"""

import argparse
import asyncio
import base64
import codecs
import contextlib
import hmac
import importlib
import inspect
import ipaddress
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
import traceback
import uuid
from collections import deque
from dataclasses import dataclass, fields, replace
from functools import partial
from html import escape
from pathlib import Path
from typing import Annotated, Literal

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # nobody is told that this runs

import gradio as gr
import prometheus_client
import torch
import torch.nn.functional as F
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from matplotlib.figure import Figure
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException
from torch.overrides import TorchFunctionMode

import rag
import v7_quantize as v7
import v8_lora as v8
from bpe_tokenizer import BPETokenizer, TokenizerError

# --------------------------------------------- config ---------------------------------------------

# What may be imported by the name in a checkpoint.
RUNGS = ("v0_bigram", "v1_mlp", "v2_attention", "v3_gpt", "v4_rope_alibi", "v5_gpt2", "v6_amp_ddp")
RUNGS += ("v7_quantize", "v8_lora", "v9_rlhf")
BATCHED, CHATTING = RUNGS[5:], RUNGS[8:]  # with a cache for many texts at once; with a template for turns
# What is trained where there is no model: seconds, seconds, half a minute.
FIRST = (["v0_bigram.py"], ["v1_mlp.py"], ["v3_gpt.py", "--max_steps", "500", "--warmup_steps", "50"])
FAILED = "the model has failed, the server's own output says why"
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
            limit = 2**16 if name == "port" else 2**31
            if type(value) in (int, float) and not 0 < value < limit:
                sys.exit(f"error: --{name} {value} is impossible, it must be positive and below {limit}")
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
        """Forget the text."""
        self.sequences[row] = None

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
    """A text to be continued. `put` takes (job, id) from the thread that draws to whoever follows the job."""

    def __init__(self, model, ids, config, put, stops=()):
        self.model, self.ids, self.config, self.put = model, ids, config, put
        self.gone, self.seconds = False, 0.0  # nobody follows it any more; time of the steps it took part in
        self.reason = None  # why it has ended: "stop", "length" or "failed"
        self.n_written, self.stops, self.held = 0, stops, ""  # text that may be the beginning of a stop
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")  # which keeps half a character back

    def add(self, new):
        """Take in an id, or the reason of the end; return the text that can be shown now."""
        if isinstance(new, str):
            self.held, self.reason = self.held + self.decoder.decode(b"", final=True), new
        else:
            self.n_written += 1
            piece = self.model.tokenizer.vocab[new]  # bytes, or a character
            self.held += piece if isinstance(piece, str) else self.decoder.decode(piece)
        found = [at for at in map(self.held.find, self.stops) if at >= 0]
        if found:
            self.reason, self.held = "stop", self.held[: min(found)]
        ends = ((stop, n) for stop in self.stops for n in range(1, min(len(stop), len(self.held) + 1)))
        begun = (n for stop, n in ends if self.held.endswith(stop[:n]))
        n = len(self.held) - (0 if self.reason else max(begun, default=0))
        shown, self.held, self.gone = self.held[:n], self.held[n:], self.reason is not None
        return shown


class Served:
    """A model with its tokenizer, the jobs that wait for it, and an engine for those that it works on."""

    def __init__(self, name, folder, config):
        self.name, self.config, self.created = name, config, int((folder / "checkpoint.pt").stat().st_mtime)
        try:
            checkpoint = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
            self.version = checkpoint["version"]
        except Exception:  # a file that is cut short or something else altogether
            raise ValueError("its checkpoint cannot be read") from None
        if self.version not in RUNGS:
            raise ValueError(f"it was saved by {self.version}")
        rung, self.quantized = importlib.import_module(self.version), ""
        device = v8.pick_device(config.device)
        if self.version == "v7_quantize":
            checkpoint, own = v7.load_checkpoint("sample", {}, str(folder))
            model = v7.load_model(checkpoint["model"], own, device)
        elif self.version in BATCHED:
            checkpoint, own = v8.load_checkpoint("train", {}, str(folder))
            model = v8.LanguageModel(own, own.vocab_size).to(device)
            v8.load_weights(model, checkpoint["model"])
            if config.quantize != "none":
                self.quantized = config.quantize
                model = v7.quantize(model, v7.Config(quantize=config.quantize))
        else:
            checkpoint, own = rung.load_checkpoint("sample", {"out_dir": str(folder)})
            model = rung.LanguageModel(own, len(v8.make_tokenizer(checkpoint["vocab"]).vocab)).to(device)
            rung.load_weights(model, checkpoint["model"])
        self.model, self.folder, self.window = model.eval(), folder, own.block_size
        self.tokenizer = v8.make_tokenizer(checkpoint["vocab"])
        batched = self.version in BATCHED
        self.engine = v8.Engine(model, config.n_rows) if batched else OneByOne(model, own.block_size)
        self.idea = rung.__doc__.split("\n")[0].split(": ", 1)[1]
        self.metrics = {}
        with contextlib.suppress(OSError, ValueError, AttributeError):
            found = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
            self.metrics = {name: x for name, x in found.items() if isinstance(x, int | float)}
        saved = sum(p.numel() for p in checkpoint["model"].values())  # of v7, with the scales
        self.params = self.metrics.get("params", saved)
        self.chats = self.version in CHATTING
        self.ends = {*self.tokenizer.special_tokens.values()}  # what ends a text: <|endoftext|>, another turn
        self.waiting, self.working = (
            deque(),
            {},
        )  # deques of jobs, one a request; row: (job, when it must end)
        self.n_read = self.n_drawn = 0  # tokens since the start

    @property
    def n_waiting(self):
        """How many texts wait."""
        return sum(map(len, self.waiting))

    def check_length(self, text, param):
        """Refused if a text is longer than may be asked for."""
        if len(text) > self.config.max_prompt:
            raise Refused(f"a prompt has at most {self.config.max_prompt:,} characters", param=param)

    def encode(self, text):
        """The ids of a text; of an empty one, those of a line break. Refused if it cannot be read."""
        self.check_length(text, "prompt")
        try:
            return self.tokenizer.encode(text or "\n")
        except (SystemExit, TokenizerError) as error:
            reason = str(error).removeprefix("error: ").partition(";")[0]
            raise Refused(f"{self.name} cannot read this prompt: {reason}", param="prompt") from None

    def encode_turns(self, turns):
        """A conversation, a list of (role, text), to ids; the oldest turns are left out where it is long."""
        self.check_length("".join(text for _, text in turns), "messages")
        try:
            fitting = v8.Config(block_size=self.window, max_new_tokens=min(100, self.window // 2))
            return v8.fit_window(turns, self.tokenizer, fitting)
        except (SystemExit, TokenizerError) as error:
            reason = str(error).removeprefix("error: ").partition(";")[0]
            raise Refused(f"{self.name} cannot read this: {reason}", param="messages") from None

    def take(self):
        """The jobs that get a row now, of each request that waits one in turn."""
        taken = []
        while self.waiting and len(taken) < self.engine.sequences.count(None):
            jobs = self.waiting.popleft()
            job = jobs.popleft()
            if jobs:
                self.waiting.append(jobs)  # the others of this request go behind those of other requests
            taken += [] if job.gone else [job]
        return taken

    def step(self, taken):
        """Read the prompts of the jobs that were taken, then draw a token for each row."""
        start, end = time.monotonic(), self.tokenizer.special_tokens.get("<|endoftext|>")
        for job in taken:
            try:
                row = self.engine.add(job.ids, job.config, end)
            except Exception:
                traceback.print_exc()
                job.put((job, "failed"))
                continue
            self.working[row] = job, time.monotonic() + self.config.max_seconds
            self.n_read += len(job.ids)
        new = self.engine.step() if self.working else {}
        self.n_drawn += len(new)
        seconds = time.monotonic() - start
        for row, (job, deadline) in list(self.working.items()):
            job.seconds += seconds
            if new[row] in self.ends:
                self.free(row, "stop")
                continue
            job.put((job, new[row]))
            if not self.engine.sequences[row].n_left or job.gone or time.monotonic() > deadline:
                self.free(row, "length")  # which is also said when the time is over

    def free(self, row, reason):
        """End what is in a row."""
        job, _ = self.working.pop(row)
        job.put((job, reason))
        self.engine.remove(row)


class Worker(threading.Thread):
    """The one thread that draws. All models take turns, a step each: so each step has all cores."""

    def __init__(self, models):
        super().__init__(daemon=True)
        self.models, self.changed = models, threading.Condition()
        self.start()

    def submit(self, jobs):
        """Let jobs wait for their model; Refused if too many do."""
        model = jobs[0].model
        limit = model.config.max_waiting
        if len(jobs) > limit:
            raise Refused(f"at most {limit} texts can be asked for at once, not {len(jobs)}")
        with self.changed:
            waiting = ([job for job in request if not job.gone] for request in model.waiting)
            model.waiting = deque(
                deque(request) for request in waiting if request
            )  # who has left frees a place
            if model.n_waiting + len(jobs) > limit:
                raise Refused(f"{model.n_waiting} texts wait for {model.name} already", 429, "overloaded")
            model.waiting.append(deque(jobs))
            self.changed.notify()

    def run(self):
        """Go round the models for as long as the server lives."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: any(m.waiting or m.working for m in self.models))
            for model in self.models:
                with self.changed:
                    taken = model.take()
                try:
                    model.step(taken)
                except (Exception, SystemExit):  # a bug: those at work are told, the server goes on
                    traceback.print_exc()
                    for row in list(model.working):
                        model.free(row, "failed")


async def follow(jobs, news):
    """Yield (job, text) as the texts of `jobs` grow; when one has ended, job.reason says why.

    `news` is the asyncio.Queue that gets what they put. If tokens come faster than they are taken, a text
    is of several.
    """
    going = set(jobs)
    try:
        while going:
            fresh, pieces = [await news.get()], {}
            while not news.empty():
                fresh.append(news.get_nowait())
            for job, new in fresh:
                if not job.reason:  # else it has stopped, and this was drawn before the thread knew
                    pieces[job] = pieces.get(job, "") + job.add(new)
            for job, piece in pieces.items():
                if piece or job.reason:
                    yield job, piece
            going -= {job for job in pieces if job.reason}
    finally:  # also when nobody listens any more
        for job in jobs:
            job.gone = True


def find_models(config):
    """All models below --runs that can be served, the lowest rung first, {name: Served}.

    Of the others a note says why not.
    """
    found = []
    for path in sorted(Path(config.runs).glob("*/checkpoint.pt")):
        try:
            found.append(Served(path.parent.name, path.parent, config))
        except (Exception, SystemExit) as error:  # a file that is cut short or something else altogether
            reason = str(error).split("\n")[0].removeprefix("error: ")
            print(f"note: {path.parent} is not served: {reason}", file=sys.stderr)
    return {model.name: model for model in sorted(found, key=lambda model: RUNGS.index(model.version))}


# -------------------------------------------- requests --------------------------------------------

Text = Annotated[str, Field(max_length=100_000)]
Stop = Annotated[str, Field(min_length=1, max_length=200)]
# Of what is not supported, the values that change nothing.
Zero = Annotated[float | None, Field(ge=0, le=0)]
One = Annotated[int | None, Field(ge=1, le=1)]
No = Annotated[bool | None, Field(le=False)]


class Strict(BaseModel):
    """Takes what it knows and refuses the rest; null is as if it had not been said."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def without_null(cls, body):
        """The body without what is null."""
        return {k: v for k, v in body.items() if v is not None} if isinstance(body, dict) else body


class Asked(Strict):
    """What completions and chat completions may ask for. What is not supported is refused, not ignored."""

    model: Text
    stream: bool = False
    stream_options: dict[Literal["include_usage"], bool] | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(1.0, ge=0, le=10, allow_inf_nan=False)
    top_p: float | None = Field(1.0, gt=0, le=1, allow_inf_nan=False)
    n: int | None = Field(1, ge=1, le=16)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] = []
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


class Part(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class Message(Strict):
    """A turn. A system message is what the model reads before the questions: its context."""

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

    messages: Annotated[list[Message], Field(min_length=1, max_length=100)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: No = False
    top_logprobs: None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None


def sampling(asked, config):
    """How to draw the tokens that a request asks for; the seed is not in it."""
    wanted = asked.max_tokens
    if isinstance(asked, ChatCompletion) and asked.max_completion_tokens is not None:
        if wanted not in (None, asked.max_completion_tokens):
            raise Refused("max_tokens and max_completion_tokens differ", param="max_tokens")
        wanted = asked.max_completion_tokens
    n = wanted or (100 if isinstance(asked, ChatCompletion) else 16)  # the second is OpenAI's
    if n > config.max_tokens:
        raise Refused(f"at most {config.max_tokens} tokens can be asked for, not {n}", param="max_tokens")
    if asked.stream_options and not asked.stream:
        raise Refused("stream_options go with stream only", param="stream_options")
    temperature = 1.0 if asked.temperature is None else asked.temperature
    if temperature == 0:
        return v8.Config(greedy=True, max_new_tokens=n)
    return v8.Config(temperature=max(temperature, 1e-3), top_p=max(asked.top_p, 1e-4), max_new_tokens=n)


# ---------------------------------------------- HTTP ----------------------------------------------


def told(reason):
    """A Refused as the JSON that OpenAI's clients understand."""
    body = {"message": str(reason), "type": reason.code, "param": reason.param, "code": reason.code}
    return {"error": body}


def is_number(host):
    """Whether a host is an address and no name: 127.0.0.1, [::1]."""
    try:
        return bool(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        return False


def answer_of(reason, headers=None):
    """The answer to a request that is Refused."""
    return JSONResponse(told(reason), reason.status, headers)


# The routes of Gradio that the page asks for. What else it offers, such as files and uploads, is not found.
QUEUE = "queue/(join|data)$|cancel$|reset$|heartbeat/|startup-events$"
PAGE = rf"/($|config$|theme\.css$|favicon\.ico$|(assets|static)/|gradio_api/({QUEUE}))"


class Guard:
    """Looks at each request first: host name, key, size. count(path, status) is told how it ended."""

    def __init__(self, api, page, config, count):
        self.api, self.page, self.config, self.count = api, page, config, count
        self.hosts = {"localhost", *(name.strip().lower() for name in config.names.split(","))} - {""}

    async def __call__(self, scope, receive, send):
        """An ASGI application (Python's standard for asynchronous web servers)."""
        if scope["type"] == "lifespan":  # the server starts or ends
            return await self.page(scope, receive, send)
        size = 0

        async def counted(message):
            if message["type"] == "http.response.start":
                self.count(scope["path"], message["status"])
            await send(message)

        async def limited():
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.config.max_body:  # the sender gave no length, or a wrong one
                raise HTTPException(413, f"a request has at most {self.config.max_body:,} bytes")
            return message

        try:
            self.check(dict(scope["headers"]))
        except Refused as reason:
            login = {"WWW-Authenticate": 'Basic realm="the key is the password"'}  # a browser asks for it
            refusal = answer_of(reason, login if reason.status == 401 else None)
            return await refusal(scope, receive, counted)
        await (self.page if re.match(PAGE, scope["path"]) else self.api)(scope, limited, counted)

    def check(self, headers):
        """Refused if a request with these headers may not go on."""
        address = headers.get(b"host", b"").decode("latin-1").lower()
        host = re.sub(r":\d+$", "", address)
        if host not in self.hosts and not is_number(host):  # a page elsewhere may have named our address
            raise Refused(f"this server is not called {host!r}, see --names", 421, "invalid_host")
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        if origin and origin.partition("://")[2] != address:
            raise Refused(f"a page of {origin!r} may not ask this server", 403, "cross_origin")
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() == b"basic":  # from a browser: any name, and the key as the password
            with contextlib.suppress(ValueError):
                given = base64.b64decode(given).partition(b":")[2]
        if KEY and not hmac.compare_digest(given, KEY.encode()):
            raise Refused("no key, or a wrong one, in the header Authorization", 401, "invalid_api_key")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.config.max_body:
            raise Refused(f"a request has at most {self.config.max_body:,} bytes", 413, "too_large")


class Numbers:
    """What /metrics tells of each model, read when it is asked for."""

    def __init__(self, models):
        self.models = models

    def collect(self):
        """As Prometheus' client wants it."""
        kinds = [CounterMetricFamily("tokens", "tokens drawn", labels=["model"])]
        kinds += [CounterMetricFamily("prompt_tokens", "tokens read", labels=["model"])]
        kinds += [GaugeMetricFamily("waiting", "texts that wait", labels=["model"])]
        kinds += [GaugeMetricFamily("working", "texts at work", labels=["model"])]
        for model in self.models:
            numbers = (model.n_drawn, model.n_read, model.n_waiting, len(model.working))
            for kind, number in zip(kinds, numbers, strict=True):
                kind.add_metric([model.name], number)
        return kinds


def make_app(models, config):
    """The server of {name: Served}."""
    app = FastAPI(title="serve.py", docs_url=None, redoc_url=None, openapi_url=None)
    worker, registry = Worker(list(models.values())), prometheus_client.CollectorRegistry()

    requests = prometheus_client.Counter(
        "requests", "requests by status", ["route", "status"], registry=registry
    )
    seconds = prometheus_client.Histogram(
        "first_token_seconds", "until a first token", ["model"], registry=registry
    )
    registry.register(Numbers(models.values()))

    @app.exception_handler(Refused)
    async def refused(request, reason):
        return answer_of(reason, {"Retry-After": "1"} if reason.status == 429 else None)

    @app.exception_handler(RequestValidationError)
    async def invalid(request, reason):
        first = reason.errors()[0]
        where, said = ".".join(str(part) for part in first["loc"][1:]), first["msg"]
        if first["type"] == "json_invalid":
            where, said = "", f"it is no JSON ({first['ctx']['error']})"
        elif not where and "json" not in request.headers.get("content-type", ""):
            said = "send JSON, with the header Content-Type: application/json"
        elif first["type"] == "none_required" or first.get("ctx", {}).get("le") == 0:
            said = "it is not supported"
        return answer_of(Refused(f"{where or 'the body'}: {said}", param=where or None))

    @app.exception_handler(HTTPException)
    async def http(request, reason):
        code = "too_large" if reason.status_code == 413 else "invalid_request_error"
        return answer_of(Refused(reason.detail, reason.status_code, code))

    def count(path, status):
        path = re.sub("^/v1/models/.+", "/v1/models/{name}", path)
        requests.labels(path if path in routes else "other", status).inc()

    @app.get("/health")
    async def health():
        if not worker.is_alive():
            raise Refused("the thread that draws has ended", 503, "server_error")
        return {"status": "ok", "models": len(models)}

    @app.get("/metrics")
    async def metrics():
        return PlainTextResponse(
            prometheus_client.generate_latest(registry), media_type="text/plain; version=0.0.4"
        )

    def describe(model):
        known = {"id": model.name, "object": "model", "created": model.created, "owned_by": model.version}
        return known | {"chats": model.chats, "params": model.params, "window": model.window}

    @app.get("/v1/models")
    async def list_models():
        return {"object": "list", "data": [describe(model) for model in models.values()]}

    @app.get("/v1/models/{name}")
    async def one_model(name: str):
        return describe(find(name))

    def find(name):
        if name not in models:
            reason = f"there is no model {name[:80]!r}, choose from: {', '.join(models)}"
            raise Refused(reason, 404, "model_not_found", "model")
        return models[name]

    @app.post("/v1/completions")
    async def complete(asked: Completion, request: Request):
        model = find(asked.model)
        prompts = [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt
        return await respond(asked, request, model, [model.encode(prompt) for prompt in prompts])

    @app.post("/v1/chat/completions")
    async def chat(asked: ChatCompletion, request: Request):
        model = find(asked.model)
        if not model.chats:
            able = ", ".join(name for name, other in models.items() if other.chats) or "none"
            raise Refused(f"{model.name} has not learned to answer; those that have: {able}", param="model")
        turns = [message.turn for message in asked.messages]
        if turns[-1][0] != "user":
            raise Refused("the last message must be the user's", param="messages")
        return await respond(asked, request, model, [model.encode_turns(turns)])

    async def respond(asked, request, model, prompts):
        """Answer a request: continue each list of ids, asked.n times."""
        start, chatting, n = time.monotonic(), isinstance(asked, ChatCompletion), asked.n or 1
        seed = random.randrange(2**30) if asked.seed is None else asked.seed
        news, settings = asyncio.Queue(), sampling(asked, config)
        stops = [asked.stop] if isinstance(asked.stop, str) else asked.stop
        put = partial(asyncio.get_running_loop().call_soon_threadsafe, news.put_nowait)
        jobs = [
            Job(model, ids, replace(settings, seed=(seed + i) % 2**31), put, stops)
            for i, ids in enumerate(ids for ids in prompts for _ in range(n))
        ]
        worker.submit(jobs)
        kind = "chat.completion" if chatting else "text_completion"
        head = {"id": f"{'chatcmpl' if chatting else 'cmpl'}-{uuid.uuid4().hex}", "created": int(time.time())}
        head |= {"model": model.name, "object": kind + ".chunk" * (chatting and asked.stream)}
        n_read = sum(map(len, prompts))

        async def pieces():
            """What is new as it comes: (number of the job, text, why it has ended or None)."""
            waited = False
            async with contextlib.aclosing(follow(jobs, news)) as texts:
                async for job, piece in texts:
                    if not waited:
                        seconds.labels(model.name).observe(time.monotonic() - start)
                    waited = True
                    if job.reason == "failed":
                        raise Refused(FAILED, 500, "server_error")
                    yield jobs.index(job), piece, job.reason

        def choice(i, text, reason, role="assistant"):
            said = ({"role": role} if role else {}) | {"content": text}
            said = {"delta" if asked.stream else "message": said} if chatting else {"text": text}
            return {"index": i, **said, "logprobs": None, "finish_reason": reason}

        def usage():
            written = sum(job.n_written for job in jobs)
            both = {"prompt_tokens": n_read, "completion_tokens": written, "total_tokens": n_read + written}
            return {"usage": both}

        async def whole():
            texts, reasons = [""] * len(jobs), [None] * len(jobs)
            async for i, piece, reason in pieces():
                texts[i], reasons[i] = texts[i] + piece, reason
            choices = [choice(*each) for each in zip(range(len(jobs)), texts, reasons, strict=True)]
            return head | {"choices": choices} | usage()

        async def events():
            def event(content):
                return f"data: {json.dumps(content)}\n\n"

            begun = set()  # whose role has been told
            try:
                async for i, piece, reason in pieces():
                    role = None if i in begun else "assistant"
                    begun.add(i)
                    yield event(head | {"choices": [choice(i, piece, reason, role)]})
                if (asked.stream_options or {}).get("include_usage"):
                    yield event(head | {"choices": []} | usage())
            except Refused as reason:
                yield event(told(reason))
            yield "data: [DONE]\n\n"

        if asked.stream:
            now = {"Cache-Control": "no-store"}
            return StreamingResponse(events(), media_type="text/event-stream", headers=now)
        answer, leaving = asyncio.create_task(whole()), asyncio.create_task(request.receive())
        try:
            await asyncio.wait({answer, leaving}, return_when=asyncio.FIRST_COMPLETED)
            return answer.result() if answer.done() else Response(status_code=499)  # the client has left
        finally:
            answer.cancel()
            leaving.cancel()

    routes = {route.path for route in app.routes}
    page = make_page(models, worker, config)
    fonts = [gr.themes.Font("system-ui"), "sans-serif"]  # no font from elsewhere
    theme = gr.themes.Default(font=fonts, font_mono=[gr.themes.Font("ui-monospace"), "monospace"])
    theme.set(block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300")
    theme.set(
        button_primary_background_fill="*primary_700", button_primary_background_fill_hover="*primary_800"
    )
    theme.set(button_primary_background_fill_dark="*primary_700")  # white on orange could hardly be read
    settings = {"theme": theme, "css": CSS, "footer_links": [], "ssr_mode": False}
    bare = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    page_app = gr.mount_gradio_app(bare, page.queue(max_size=64), path="/", **settings)
    return Guard(app, page_app, config, count)


# ------------------------------------------- playground -------------------------------------------

CSS = """
.rungs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 290px), 1fr)); gap: 12px; }
.rung { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 10px 14px; }
.rung { background: var(--block-background-fill); min-width: 0; }
.rung h3, .rung p { margin: 0 0 4px; }
.rung p { font-size: 0.85rem; opacity: 0.8; }
.rung pre { white-space: pre-wrap; overflow-wrap: anywhere; height: 14em; overflow-y: auto; margin: 6px 0 0; }
.rung pre, .bars { font: 0.85rem/1.45 ui-monospace, monospace; color: var(--body-text-color); }
.rung pre b { font-weight: normal; opacity: 0.65; }
.bars { width: 100%; border-collapse: collapse; border: 0 !important; }
.bars tr, .bars td { padding: 1px 6px; white-space: pre; border: 0 !important; }
.bars td:last-child { width: 99%; }
.bars div { background: var(--color-accent); height: 1em; min-width: 1px; }
.passage { border-left: 3px solid var(--border-color-primary); padding-left: 0.8em; white-space: pre-wrap; }
.passage { margin: 0.7em 0; }
.passage.read { border-color: var(--color-accent); }
:is(input, textarea, button, pre):focus-visible { outline: 2px solid var(--color-accent) !important; }
"""
NO_CHAT = "No model here has learned to answer. `python v8_lora.py` teaches one, in some three minutes, "
NO_CHAT += "and trains v6 first where it is missing, which takes as long. Then start the server again."


async def continuations(worker, wanted):
    """Go on with texts, {key: (model, ids, Config)}; yields {key: (text, Job)} at most ten times a second."""
    news, texts, shown = asyncio.Queue(), {}, 0.0
    put = partial(asyncio.get_running_loop().call_soon_threadsafe, news.put_nowait)
    jobs = {Job(*settings, put): key for key, settings in wanted.items()}
    for job, key in jobs.items():
        texts[key] = "", job
        try:
            worker.submit([job])
        except Refused as reason:
            texts[key], job.reason = (f"({reason})", job), "refused"
    async with contextlib.aclosing(follow([job for job in jobs if not job.reason], news)) as pieces:
        async for job, piece in pieces:
            key = jobs[job]
            texts[key] = texts[key][0] + (FAILED if job.reason == "failed" else piece), job
            if time.monotonic() - shown > 0.1:
                shown = time.monotonic()
                yield texts
    yield texts


def drawing(temperature, top_k, top_p, seed, n):
    """The Config of what the page's sliders say."""
    settings = {"seed": int(seed or 0) % 2**31, "max_new_tokens": int(n)}
    try:
        if temperature == 0:
            return v8.Config(greedy=True, **settings)
        temperature, top_p = max(temperature, 1e-3), max(top_p, 1e-4)
        return v8.Config(temperature=temperature, top_k=int(top_k), top_p=top_p, **settings)
    except SystemExit as error:
        raise gr.Error(str(error)) from None


def card(model, prompt="", text="", job=None):
    """A model and what it has written."""
    of = " of answers" if model.version == "v8_lora" else ""  # the others' is of plain text
    per = "token" if isinstance(model.tokenizer, BPETokenizer) else "character"
    numbers = {"val_loss": f"val loss{of} {{:.3f}} per {per}", "bits_per_char": "{:.2f} bits/char"}
    facts = [f"{model.params:,} parameters"]
    if model.quantized:
        facts.append(f"weights in {model.quantized}")  # and the losses were measured without
    else:
        facts += [form.format(model.metrics[name]) for name, form in numbers.items() if name in model.metrics]
    if job and job.seconds:
        facts.append(f"{job.n_written / job.seconds:,.0f} tokens/s")
    if job and job.reason == "stop":
        facts.append("has ended its text")
    return (
        f"<section class='rung' aria-label='{escape(model.name)}'><h3>{escape(model.name)}</h3>"
        f"<p>{escape(model.idea)}</p><p>{' &middot; '.join(facts)}</p>"
        f"<pre tabindex='0'><b>{escape(prompt)}</b>{escape(text)}</pre></section>"
    )


def cards(parts):
    """HTML of several of them."""
    return f"<div class='rungs'>{''.join(parts)}</div>"


def ladder_tab(models, worker, config):
    """One prompt, continued by every rung."""
    info = "Shift+Enter continues it, and so does the button"
    prompt = gr.Textbox("ROMEO:\n", label="Prompt", info=info, lines=2, max_length=config.max_prompt)
    with gr.Row():
        n = gr.Slider(10, min(500, config.max_tokens), 150, step=10, label="tokens")
        temperature = gr.Slider(0, 2, 0.8, step=0.1, label="temperature (0: the likeliest)")
        seed = gr.Number(1, label="seed", precision=0, minimum=0)
    go = gr.Button("Continue", variant="primary")
    page = gr.HTML(cards(card(model) for model in models.values()), padding=False)

    async def climb(prompt, n, temperature, seed):
        settings, wanted, refused = drawing(temperature, 0, 1.0, seed, n), {}, {}
        for name, model in models.items():
            try:
                wanted[name] = model, model.encode(prompt), settings
            except Refused as reason:
                refused[name] = card(model, text=f"({reason})")
        async for texts in continuations(worker, wanted):
            written = {name: card(models[name], prompt, *found) for name, found in texts.items()}
            yield cards((written | refused)[name] for name in models)

    events, inputs = [go.click, prompt.submit], [prompt, n, temperature, seed]
    gr.on(events, climb, inputs, page, concurrency_limit=8, show_progress="hidden", api_visibility="private")


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
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            self.layers.append(scores.masked_fill(later, -torch.inf).softmax(dim=-1))
        return function(*args, **kwargs)


@torch.inference_mode()
def read(model, prompt):
    """The logits (V,) that follow a prompt, its ids, and what the heads of each layer attend to."""
    ids = model.encode(prompt)[-model.window :]
    idx = torch.tensor([ids], device=next(model.model.parameters()).device)
    with Watch() as watched:
        logits = model.model(idx)[0, -1]
    layers = watched.layers
    if model.version == "v2_attention":  # which computes its weights itself
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


def is_text(model, i, text):
    """Whether a prompt can end with this token: not half a character, nor the end of a turn."""
    try:
        return model.encode(text) == [i]
    except Refused:
        return False


def bars(rows):
    """next_tokens as a table of bars."""
    lines = [
        f"<tr><td>{escape(shown(text))}</td><td>{after:7.2%}</td>"
        f"<td><div style='width:{100 * after:.2f}%'></div></td></tr>"
        for _, text, _, after in rows
    ]
    return f"<table class='bars' aria-label='next tokens and their probabilities'>{''.join(lines)}</table>"


def draw_attention(model, prompt, layer, head):
    """A heat map of who reads from whom in one head, of the last 40 tokens; None without attention."""
    _, ids, layers = read(model, prompt)
    if not layers:
        return None
    layer, head, n = min(int(layer), len(layers)) - 1, min(int(head), len(layers[0])) - 1, min(len(ids), 40)
    fig = Figure(figsize=(6, 6), layout="constrained", facecolor="none")
    ax, labels = fig.subplots(), [shown(model.tokenizer.decode([i])) for i in ids[-n:]]
    ax.imshow(layers[layer][head, -n:, -n:].cpu(), cmap="Blues", vmin=0, vmax=1)
    ax.set_title(f"{model.name}: layer {layer + 1} of {len(layers)}, head {head + 1} of {len(layers[0])}")
    ax.set(xlabel="reads from", ylabel="reader")
    ax.set_xticks(range(n), labels, rotation=90, parse_math=False)
    ax.set_yticks(range(n), labels, parse_math=False)
    ax.tick_params(colors="gray")
    for text in (ax.title, ax.xaxis.label, ax.yaxis.label):
        text.set_color("gray")  # to be read on light and on dark
    return fig


def next_token_tab(models, page, config):
    """The distribution of the next token, to choose from, and what a head attends to."""
    names = list(models)
    with gr.Row():
        which = gr.Dropdown(names, value=names[-1], label="model")
        temperature = gr.Slider(0, 2, 1.0, step=0.1, label="temperature (0: the likeliest)")
        top_k = gr.Slider(0, 50, 0, step=1, label="top-k (0: all)")
        top_p = gr.Slider(0.05, 1, 1.0, step=0.05, label="top-p (1: all)")
    prompt = gr.Textbox("ROMEO:\nI", label="Prompt", lines=3, max_length=config.max_prompt)
    chart = gr.HTML(padding=False)
    choice = gr.Radio([], label="choose the next token")
    with gr.Row():
        layer = gr.Number(1, label="layer", precision=0, minimum=1)
        head = gr.Number(1, label="head", precision=0, minimum=1)
    picture = gr.Plot(label="attention: who reads from whom", show_label=False)

    def look(name, prompt, temperature, top_k, top_p, layer, head):
        try:
            rows = next_tokens(models[name], prompt, temperature, top_k, top_p)
            figure = draw_attention(models[name], prompt, layer or 1, head or 1)
        except Refused as reason:
            return f"<p>{escape(str(reason))}</p>", gr.Radio(choices=[], value=None), gr.Plot(visible=False)
        can = [(text, after) for i, text, _, after in rows if after and is_text(models[name], i, text)]
        options = [(f"{shown(text)}  {after:.1%}", text) for text, after in can]
        picture = gr.Plot(figure, visible=figure is not None)  # v0 and v1 have no attention
        return bars(rows), gr.Radio(choices=options, value=None), picture

    inputs, outputs = [which, prompt, temperature, top_k, top_p, layer, head], [chart, choice, picture]
    events = [page.load, *(part.change for part in inputs)]
    private = dict(show_progress="hidden", api_visibility="private")
    gr.on(events, look, inputs, outputs, trigger_mode="always_last", **private)
    choice.input(lambda text, new: text + (new or ""), [prompt, choice], prompt, **private)


def chat_tab(models, worker):
    """The models that answer, beside each other."""
    chatting = [model for model in models.values() if model.chats]
    if not chatting:
        return gr.Markdown(NO_CHAT)
    with gr.Row():
        box = partial(gr.Chatbot, height=400, min_width=290, buttons=["copy"])  # none that sends it elsewhere
        boxes = [box(label=model.name) for model in chatting]
    example = "Good morrow, cousin."
    said = gr.Textbox(label="You (Enter sends)", placeholder=f"{example} Answer as ROMEO.", max_length=2000)
    clear = gr.Button("Begin anew")

    async def talk(said, *histories):
        if not said.strip():
            yield [gr.skip(), *(gr.skip() for _ in histories)]
            return
        # Text alone: Gradio would open whatever else a browser sends back, such as the path of a file.
        kept = [
            [{"role": t["role"], "content": plain(t["content"])} for t in history] for history in histories
        ]
        asked, wanted = [[*history, {"role": "user", "content": said}] for history in kept], {}
        for i, model in enumerate(chatting):
            turns = [(turn["role"], turn["content"]) for turn in asked[i]]
            try:
                wanted[i] = model, model.encode_turns(turns), drawing(0.7, 0, 1.0, len(turns), 100)
            except Refused as reason:
                asked[i].append({"role": "assistant", "content": f"({reason})"})
        yield ["", *asked]  # from here on the box is yours again
        async for texts in continuations(worker, wanted):
            answers = {i: [{"role": "assistant", "content": text}] for i, (text, _) in texts.items()}
            yield [gr.skip(), *(history + answers.get(i, []) for i, history in enumerate(asked))]

    private = dict(show_progress="hidden", api_visibility="private")
    said.submit(talk, [said, *boxes], [said, *boxes], concurrency_limit=8, **private)
    clear.click(lambda: [[] for _ in boxes], None, boxes, **private)


def ask_tab(models, worker, config):
    """A question, the passages that are found for it, and the answer of the model that reads the best."""
    chatting = [model for model in models.values() if model.chats]
    if not chatting:
        return gr.Markdown(NO_CHAT)
    model, find = chatting[0], finder(chatting[0], config)
    question = gr.Textbox("Who says: Asses are made to bear", label="Question (Enter asks)", max_length=2000)
    go = gr.Button("Ask", variant="primary")
    answer, passages = gr.Textbox(label=f"Answer of {model.name}"), gr.HTML(padding=False)

    async def ask(question):
        try:
            model.check_length(question, "question")
            found = await asyncio.to_thread(find, question)
            asked = question if question[-1] in ".?!" else question + "?"
            ids = model.encode_turns([("context", found[0][1].shown), ("user", asked)])
        except (Refused, SystemExit, TokenizerError) as reason:
            yield "", f"({str(reason).removeprefix('error: ').partition(';')[0]})"
            return
        parts = [
            f"<div class='passage{' read' * (i == 0)}'><b>{score:.2f}</b> {escape(passage.place)}\n"
            f"{escape(passage.shown)}</div>"
            for i, (score, passage) in enumerate(found)
        ]
        async for texts in continuations(worker, {0: (model, ids, drawing(0, 0, 1.0, 0, 32))}):
            yield "".join(parts), texts[0][0]

    events = [question.submit, go.click]
    gr.on(events, ask, question, [passages, answer], concurrency_limit=1, api_visibility="private")


def make_page(models, worker, config):
    """The playground: all rungs side by side, the next token, a conversation, questions about passages."""
    with gr.Blocks(title="The ladder", analytics_enabled=False) as page:
        gr.Markdown("# The ladder\nFrom a table of pairs to a model that answers: one prompt, every rung.")
        with gr.Tab("Ladder"):
            ladder_tab(models, worker, config)
        with gr.Tab("Next token"):
            next_token_tab(models, page, config)
        with gr.Tab("Chat"):
            chat_tab(models, worker)
        with gr.Tab("Ask"):
            ask_tab(models, worker, config)
    return page


def plain(content):
    """The text of what a Chatbot holds: a text, or parts of which some are no text."""
    parts = [content] if isinstance(content, str | dict) else content or []
    return "".join(part if isinstance(part, str) else str(part.get("text") or "") for part in parts)


def finder(model, config):
    """A function from a question to the passages for it, best first; the index is opened at the first."""
    settings = rag.Config(
        model=str(model.folder), out_dir=str(Path(config.runs, "rag")), device=config.device
    )
    opened = []

    def find(question):
        """[(score, passage)], none if the best is too bad."""
        if not re.search(r"\w", question):
            raise Refused("the question is empty")
        if not opened:
            opened.append(rag.Library(settings, rag.HashedWords()).open(rag.read_texts(settings)))
        found = opened[0].search(question, settings.show)
        if found[0][0] < opened[0].embedder.threshold:
            needed = f"below the {opened[0].embedder.threshold:.2f} that it takes"
            raise Refused(
                f"nothing in the texts has these words: the best passage scores {found[0][0]:.2f}, {needed}"
            )
        return found

    return find


# ---------------------------------------------- main ----------------------------------------------


def train_first(config):
    """Where there is no model at all, train three small ones."""
    print(
        f"there is no model in {config.runs}: trains v0, v1 and a short v3 first, a minute on two cores",
        flush=True,
    )
    for script, *flags in FIRST:
        path = Path(__file__).with_name(script)
        out_dir = Path(config.runs, path.stem)
        if subprocess.run([sys.executable, path, *flags, "--out_dir", out_dir]).returncode:
            sys.exit(f"error: {script} has failed")


def check_address(config):
    """Return where the server can be reached; exits if it cannot listen there."""
    try:
        family, kind, _, _, place = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, os.name == "posix")
            one.bind(place)
    except OSError as error:
        sys.exit(
            f"error: cannot listen at {config.host}, port {config.port} ({error}); see --host and --port"
        )
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    if not KEY and not (is_number(host) and ipaddress.ip_address(place[0]).is_loopback):
        print(
            "note: others can reach this server; SERVE_API_KEY in the environment sets a key", file=sys.stderr
        )
    return f"http://[{host}]:{config.port}" if ":" in host else f"http://{host}:{config.port}"


def main():
    config = parse_flags()
    address = check_address(config)
    if not any(Path(config.runs).glob("*/checkpoint.pt")):
        train_first(config)
    models = find_models(config)
    if not models:
        sys.exit(f"error: no model in {config.runs} can be served")
    for name, model in models.items():
        weights = f", weights in {model.quantized}" if model.quantized else ""
        print(f"{name:>20} {model.version}, {model.params:,} parameters{weights}")
    print(f"serves {len(models)} models: the page {address}, the API {address}/v1", flush=True)
    settings = {"log_level": "warning", "timeout_graceful_shutdown": 2}
    uvicorn.run(make_app(models, config), host=config.host, port=config.port, **settings)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell says it of Ctrl-C
