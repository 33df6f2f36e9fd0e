"""The experiments of week 12: python tools/week_12.py [experiment ...]

They ask a server of its own, a process that serves the default runs of all rungs, as clients over HTTP. The
clients run on the same cores. Give them the machine for themselves.
"""

import asyncio
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import torch
from common import ROOT, machine, run_experiments, table

import serve
import v8_lora as v8

MODEL = "v6_amp_ddp"
SPEAKERS = ("ROMEO", "JULIET", "KATHARINA", "DUKE VINCENTIO", "GLOUCESTER", "MENENIUS", "LEONTES", "CAMILLO")
WORDS = ("What", "I", "My lord", "Good", "No", "Come", "The king", "Sir")
PROMPTS = [f"{name}:\n{word}" for name in SPEAKERS for word in WORDS]  # 64


@contextlib.asynccontextmanager
async def server(**flags):
    """A server as a process; (it, a client of OpenAI's that does not try again)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [f"--{name}={value}" for name, value in (flags | {"port": port}).items()]
    process = subprocess.Popen(
        [sys.executable, ROOT / "serve.py", *flags], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    limits = httpx.Limits(max_connections=1000)
    http = httpx.AsyncClient(timeout=300, limits=limits)
    base = f"http://127.0.0.1:{port}"
    try:
        while True:
            with contextlib.suppress(httpx.ConnectError):
                if (await http.get(f"{base}/health")).status_code == 200:
                    break
            await asyncio.sleep(0.2)
        yield (
            process,
            openai.AsyncOpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0, http_client=http),
        )
    finally:
        process.kill()
        process.wait()
        await http.aclose()


async def stream(client, model, prompt, n):
    """One greedy request: its text, seconds to the first piece, seconds in all, tokens."""
    start, first, text, usage = time.perf_counter(), None, "", None
    settings = dict(max_tokens=n, temperature=0, stream=True, stream_options={"include_usage": True})
    async for chunk in await client.completions.create(model=model, prompt=prompt, **settings):
        first = first or time.perf_counter() - start
        text += "".join(choice.text for choice in chunk.choices)
        usage = chunk.usage or usage
    return text, first, time.perf_counter() - start, usage.completion_tokens


def batching():
    """Tokens a second that all clients get together, by their number; each asks four times for 100 tokens."""

    async def measure():
        results = {}
        async with server() as (_, client):
            await stream(client, MODEL, PROMPTS[0], 100)
            for n in (1, 2, 4, 8, 16, 64):

                async def ask(i):
                    return [await stream(client, MODEL, PROMPTS[(i + 7 * k) % 64], 100) for k in range(4)]

                start = time.perf_counter()
                found = [one for each in await asyncio.gather(*map(ask, range(n))) for one in each]
                seconds = time.perf_counter() - start
                results[str(n)] = {
                    "tokens_per_second": sum(tokens for *_, tokens in found) / seconds,
                    "first_token": statistics.median(first for _, first, _, _ in found),
                    "each": statistics.median(tokens / took for _, _, took, tokens in found),
                }
        return results

    return asyncio.run(measure()) | {"machine": machine()}


def memory(process):
    """Megabytes that a process has in memory."""
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def load():
    """64 clients that stream for a minute, and after a third of it 300 more requests at once.

    Every text is compared with that of the same request alone.
    """

    async def measure():
        n, seconds = 100, 60
        async with server() as (process, client):
            alone = {prompt: (await stream(client, MODEL, prompt, n))[0] for prompt in PROMPTS}
            done, refused, errors, begin, used = [], 0, [], time.perf_counter(), []

            async def ask(prompt):
                nonlocal refused
                try:
                    text, *_ = await stream(client, MODEL, prompt, n)
                    done.append((prompt, text))
                except openai.RateLimitError as error:
                    refused += 1
                    await asyncio.sleep(float(error.response.headers["retry-after"]))
                except Exception as error:
                    errors.append(repr(error))

            async def one_client(i):
                while time.perf_counter() - begin < seconds:
                    await ask(PROMPTS[(i + len(done)) % 64])

            async def crowd():
                await asyncio.sleep(seconds / 3)
                await asyncio.gather(*(ask(PROMPTS[i % 64]) for i in range(300)))

            async def watch():
                while time.perf_counter() - begin < seconds:
                    used.append(memory(process))
                    await asyncio.sleep(1)

            await asyncio.gather(*map(one_client, range(64)), crowd(), watch())
            took = time.perf_counter() - begin
        parted = [(prompt, text) for prompt, text in done if text != alone[prompt]]
        gaps = [gap_where_parted(prompt, text, n) for prompt, text in set(parted)]
        return {
            "requests": len(done),
            "tokens_per_second": len(done) * n / took,
            "refused": refused,
            "errors": errors,
            "parted": len(parted),
            "largest_gap": max(gaps, default=0.0),
            "megabytes": {"after 5 s": used[5], "most": max(used[5:]), "at the end": used[-1]},
        }

    return asyncio.run(measure()) | {"machine": machine()}


def gap_where_parted(prompt, text, n):
    """How much the two likeliest logits differ where a text parts from what the model writes alone."""
    model = serve.Served(MODEL, ROOT / "runs" / MODEL, serve.Config())
    ids, tokenizer = model.encode(prompt), model.tokenizer
    alone = v8.generate(model.model, [ids], v8.Config(greedy=True, max_new_tokens=n))[0]
    parts = [k for k in range(n) if not text.startswith(tokenizer.decode(alone[: k + 1]))]
    with torch.no_grad():
        top = model.model(torch.tensor([ids + alone[: parts[0]]]))[0, -1].topk(2).values
    return (top[0] - top[1]).item()


def first_token():
    """Milliseconds to the first piece of a stream from each rung, on an idle machine: median, worst of 20."""

    async def measure():
        results = {}
        async with server() as (_, client):
            for name in serve.RUNGS:
                times = [1000 * (await stream(client, name, "ROMEO:\n", 8))[1] for _ in range(21)][1:]
                results[name] = {"median": statistics.median(times), "most": max(times)}
        return results

    return asyncio.run(measure()) | {"machine": machine()}


EXPERIMENTS = {"batching": batching, "load": load, "first_token": first_token}


def tables(results):
    """The tables of logs/week_12.md."""
    week = results["week_12"]
    alone = week["batching"]["1"]["tokens_per_second"]
    rows = [
        [
            clients,
            f"{m['tokens_per_second']:,.0f}",
            f"{m['tokens_per_second'] / alone:.1f}",
            f"{m['each']:,.0f}",
            f"{1000 * m['first_token']:,.0f} ms",
        ]
        for clients, m in week["batching"].items()
        if clients != "machine"
    ]
    header = ["clients", "tokens/s in all", "against one", "tokens/s for each", "to the first token, median"]
    firsts = [
        [name, f"{m['median']:.0f} ms", f"{m['most']:.0f} ms"]
        for name, m in week["first_token"].items()
        if name != "machine"
    ]
    return {
        "week_12": {
            "batching": table(header, sorted(rows, key=lambda row: int(row[0]))),
            "first": table(["model", "median of 20", "slowest"], firsts),
        }
    }


if __name__ == "__main__":
    run_experiments(12, EXPERIMENTS, tables)
